"""Sound: in time with the picture, copied or encoded, and past what is damaged."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.audio import AudioCopy
from diffusionact.runtime.media import FRAME_NS, NS, open_reader
from diffusionact.runtime.writer import open_writer
from tests.clips import grey, times_of, write

# A beep is found in steps of this; a copied packet moves not at all.
BEEP_STEP_S = 0.001
# Re-encoded AAC starts with a frame of padding that players skip: 1024 samples at 48 kHz.
AAC_FRAME_S = 1024 / 48_000


def test_a_sound_file_is_no_video(tmp_path: Path) -> None:
    write_sound(tmp_path / "tone.wav", "pcm_s16le", 0.1)
    with pytest.raises(MediaError, match="no video stream"):
        open_reader(tmp_path / "tone.wav")


def write_sound(path: Path, codec: str, at_s: float, video_times_ns: Sequence[int] = ()) -> None:
    """A file with a beep of 50 ms at a time, and a flash at the video frame that shows then."""
    rate = 48_000
    samples = np.zeros(rate * 2, np.int16)
    begin = round(at_s * rate)
    wave = 12_000 * np.sin(np.arange(rate // 20) * 2 * np.pi * 1000 / rate)
    samples[begin : begin + len(wave)] = wave.astype(np.int16)
    with av.open(str(path), "w") as container:
        video = None
        if video_times_ns:
            video = container.add_stream("libx264", rate=25, options={"bf": "0"})
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            video.time_base = video.codec_context.time_base = Fraction(1, 90_000)
        sound = container.add_stream(codec, rate=rate)
        sound.layout = "mono"
        for i, pts_ns in enumerate(video_times_ns):
            until = video_times_ns[i + 1] if i + 1 < len(video_times_ns) else pts_ns + FRAME_NS
            flash = 250 if pts_ns <= at_s * NS < until else 20
            frame = av.VideoFrame.from_ndarray(grey(flash), format="bgr24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = round(pts_ns * 90_000 / NS), Fraction(1, 90_000)
            assert video is not None
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
        for start in range(0, len(samples), 1024):
            block = np.ascontiguousarray(samples[None, start : start + 1024])
            part = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            part.sample_rate, part.pts = rate, start
            part.time_base = Fraction(1, rate)
            container.mux(sound.encode(part))
        container.mux(sound.encode(None))


def beep_time_s(path: Path) -> float:
    """When the sound of a file first gets loud."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono")
        for frame in container.decode(audio=0):
            for part in resampler.resample(frame):
                loud = np.flatnonzero(np.abs(part.to_ndarray()[0]) > 0.05)
                if len(loud) and part.pts is not None:
                    assert part.time_base is not None
                    return float(
                        part.pts * part.time_base + Fraction(int(loud[0]), part.sample_rate)
                    )
    raise AssertionError("no beep")


RATES = {"25": Fraction(25), "29.97": Fraction(30_000, 1001), "23.976": Fraction(24_000, 1001)}


@pytest.mark.parametrize("rate", [*RATES, "variable"])
@pytest.mark.parametrize(("ending", "codec"), [(".mp4", "aac"), (".mkv", "pcm_s16le")])
def test_sound_stays_in_time_with_the_picture(
    tmp_path: Path, face: Landmarks, rate: str, ending: str, codec: str
) -> None:
    if rate == "variable":
        times = np.cumsum(np.random.default_rng(1).integers(20, 70, 40)) * 1_000_000
        times = (times - times[0]).tolist()
    else:
        times = [round(i / RATES[rate] * NS) for i in range(45)]
    driver, out = tmp_path / f"driver{ending}", tmp_path / "out.mp4"
    write_sound(driver, codec, 1.0, times)
    reader = open_reader(driver)
    with open_writer(out, time_base=reader.time_base, audio_from=driver) as writer:
        for frame in reader:
            writer.write(frame.image_bgr, frame.pts_ns, frame.duration_ns, face)
    assert times_of(out) == times_of(driver)
    flashes = [f.pts_ns / NS for f in open_reader(out) if f.image_bgr is not None
               and f.image_bgr.mean() > 128]  # fmt: skip
    assert len(flashes) == 1
    allowed = BEEP_STEP_S if codec == "aac" else AAC_FRAME_S
    assert beep_time_s(out) == pytest.approx(beep_time_s(driver), abs=allowed)


def test_a_driver_without_sound_gives_a_silent_video(tmp_path: Path, face: Landmarks) -> None:
    driver, out = tmp_path / "driver.mp4", tmp_path / "out.mp4"
    write(driver, [grey(9)] * 3, [0, FRAME_NS, 2 * FRAME_NS], face)
    write(out, [grey(9)] * 3, [0, FRAME_NS, 2 * FRAME_NS], face, audio_from=driver)
    with av.open(str(out)) as container:
        assert not container.streams.audio


def damaged_copy(path: Path, packets: range) -> Path:
    """A Matroska file with some packets of its sound overwritten."""
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(container.streams.audio[0])]
    content = bytearray(path.read_bytes())
    for i in packets:
        pos, size = places[i]
        assert pos is not None
        content[pos + 4 : pos + 4 + size] = b"\x55" * size  # behind the block's header
    damaged = path.with_stem("damaged")
    damaged.write_bytes(content)
    return damaged


def test_damaged_sound_is_skipped_with_one_warning(
    tmp_path: Path, face: Landmarks, caplog: pytest.LogCaptureFixture
) -> None:
    times = [i * FRAME_NS for i in range(50)]
    write_sound(tmp_path / "driver.mkv", "flac", 1.0, times)
    driver, out = damaged_copy(tmp_path / "driver.mkv", range(3, 6)), tmp_path / "out.mp4"
    write(out, [grey(9)] * 50, times, face, audio_from=driver)
    assert [r.message for r in caplog.records] == [
        f"{driver}, its sound: 3 damaged packets skipped"
    ]
    assert beep_time_s(out) == pytest.approx(beep_time_s(tmp_path / "driver.mkv"), abs=AAC_FRAME_S)


class FakePacket(types.SimpleNamespace):
    """What the copier looks at; time base 1/1000."""

    def __init__(self, pts: int | None, dts: int | None, size: int = 9, bad: bool = False) -> None:
        super().__init__(pts=pts, dts=dts, size=size, is_corrupt=bad, duration=20, stream=None)
        self.time_base = Fraction(1, 1000)


def fake_source(*parts: FakePacket | Exception) -> Any:
    """A container of one AAC stream; a demuxer ends at an error, and the next one goes on."""
    left = iter(parts)

    def demux(_stream: object) -> Iterator[FakePacket]:
        for part in left:
            if isinstance(part, Exception):
                raise part
            yield part

    codec = types.SimpleNamespace(name="aac")
    stream = types.SimpleNamespace(codec_context=codec, time_base=Fraction(1, 1000))
    return types.SimpleNamespace(
        name="driver.mkv", demux=demux, start_time=0, closed=[],
        streams=types.SimpleNamespace(audio=[stream]),
    )  # fmt: skip


class FakeSink:
    def __init__(self) -> None:
        self.packets: list[Any] = []
        self.mux = self.packets.append

    def add_stream_from_template(self, stream: object) -> str:
        return "output"


def test_packets_that_cannot_be_copied_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    broken = av.error.InvalidDataError(1094995529, "Invalid data")
    source = fake_source(
        FakePacket(0, 0), FakePacket(None, 20), FakePacket(40, None), FakePacket(None, None),
        broken, FakePacket(70, 70), FakePacket(80, 80, bad=True), FakePacket(100, 100),
        FakePacket(120, 120), FakePacket(None, None, size=0),
    )  # fmt: skip
    sink = FakeSink()
    copier = AudioCopy(source, sink)
    copier.copy_until(Fraction(1, 50))
    assert [p.pts for p in sink.packets] == [0, 20]
    copier.copy_until(None)
    assert [(p.pts, p.dts) for p in sink.packets] == [(t, t) for t in (0, 20, 40, 60, 70, 100, 120)]
    assert [r.message for r in caplog.records] == [
        "driver.mkv, its sound: 2 damaged packets skipped"
    ]


def test_an_encoded_packet_without_a_time_is_written_at_once() -> None:
    copier = AudioCopy(fake_source(), sink := FakeSink())
    copier._packets = (packet for packet in [FakePacket(None, None), FakePacket(900, 900)])
    copier.copy_until(Fraction(0))
    assert [p.pts for p in sink.packets] == [None]


def test_sound_that_fits_no_stream_leaves_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sound(tmp_path / "driver.mkv", "aac", 0.1)
    opened: list[Any] = []
    real = av.open

    def watched(*arguments: Any, **options: Any) -> Any:
        opened.append(real(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(av, "open", watched)
    with pytest.raises(AttributeError):
        AudioCopy.open(tmp_path / "driver.mkv", None)
    with pytest.raises(AssertionError, match="not open"):
        next(opened[0].demux())
