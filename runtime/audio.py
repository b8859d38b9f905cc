"""The driver's sound in the result: packets copied where the file format allows, else AAC."""

from __future__ import annotations

from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from typing import Any

from diffusionact.runtime.media import NS, decoded, demuxed, start_offset_ns, warn_of_damage

COPIED_CODECS = ("aac", "mp3", "ac3", "eac3", "alac")  # what mp4, mov and mkv all hold


class AudioCopy:
    """The first audio stream of one file on its way into another, on the same clock."""

    def __init__(self, source: Any, sink: Any) -> None:
        self._source, self._sink = source, sink
        self._input = source.streams.audio[0]
        self._name = f"{source.name}, its sound"
        self._start = Fraction(start_offset_ns(source), NS)
        if self._input.codec_context.name in COPIED_CODECS:
            self._output = sink.add_stream_from_template(self._input)
            self._packets = self._copied()
        else:
            self._output = sink.add_stream("aac", rate=self._input.rate)
            # By count: raw sound often comes without a layout that an encoder knows.
            self._output.layout = "mono" if self._input.layout.nb_channels == 1 else "stereo"
            self._packets = self._encoded()
        self._next: Any = None

    @classmethod
    def open(cls, path: str | Path, sink: Any) -> AudioCopy | None:
        """Return the copier, or None where the file is no container or holds no sound."""
        import av

        try:
            source = av.open(str(path))
        except (av.FFmpegError, OSError, ValueError):
            return None
        if not source.streams.audio:
            source.close()
            return None
        try:
            return cls(source, sink)
        except BaseException:
            source.close()
            raise

    def copy_until(self, time_s: Fraction | None) -> None:
        """Write the packets that start no later than this; None: all that are left."""
        while True:
            if self._next is None:
                self._next = next(self._packets, None)
            if self._next is None:
                return
            packet = self._next
            if time_s is not None and packet.pts is not None:
                if packet.pts * packet.time_base > time_s:
                    return
            self._sink.mux(packet)
            self._next = None

    def close(self) -> None:
        """Close the file that is read; the other belongs to the writer."""
        self._packets.close()
        self._source.close()

    def _copied(self) -> Generator[Any, None, None]:
        shift = round(self._start / self._input.time_base)
        damaged, last, end = 0, None, 0
        for packet in demuxed(self._source, self._input):
            if packet is not None and not packet.size:
                continue  # the demuxer's flush packet
            if packet is None or packet.is_corrupt:
                damaged += 1
                continue
            # A packet without times follows the one before it.
            dts = _known(packet.dts, packet.pts, end + shift) - shift
            if last is not None and dts <= last:
                damaged += 1
                continue
            packet.pts, packet.dts = _known(packet.pts, dts + shift) - shift, dts
            last, end = dts, dts + (packet.duration or 0)
            packet.stream = self._output
            yield packet
        warn_of_damage(self._name, damaged)

    def _encoded(self) -> Generator[Any, None, None]:
        end = Fraction(0)
        for frame in decoded(self._source, self._input, self._name):
            start = end if frame.pts is None else frame.pts * frame.time_base - self._start
            frame.pts = round(start / frame.time_base)
            end = start + Fraction(frame.samples, frame.sample_rate)
            yield from self._output.encode(frame)
        yield from self._output.encode(None)


def _known(*times: int | None) -> int:
    return next(time for time in times if time is not None)
