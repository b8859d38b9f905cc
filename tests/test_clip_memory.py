"""A clip of any length needs the memory of a few of its pictures."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.assets import bundle_path, driver_path, portrait_paths
from diffusionact.landmarks import Landmarks, Track, sidecar_path
from diffusionact.runtime.media import FRAME_NS
from diffusionact.runtime.writer import make_track
from tests.clips import grey, moving, write, write_portrait

UInt8Array = npt.NDArray[np.uint8]
ROOT = Path(__file__).parents[1]
SHORT, LONG = 100, 1000  # frames
# 900 frames of landmarks and stage times are 3 MB; the driver's pictures would be 33 MB, the results 78.
MORE_BYTES = 16_000_000
CHILD_S = 1800.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in /proc")

CHILD = """
    import re, sys
    from diffusionact.runtime.clip import run_clip
    from diffusionact.runtime.reenactor import Reenactor
    from diffusionact.runtime.settings import Settings
    with Reenactor.load(sys.argv[1], settings=Settings(threads=1)) as act:
        report = run_clip(act, *sys.argv[2:5], progress=lambda *_: None)
    # ru_maxrss would be no less than that of the process which started this one
    print(report.frames, re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


def peak_bytes(bundle: Path, portrait: Path, driver: Path, output: Path, frames: int) -> int:
    words = [sys.executable, "-c", textwrap.dedent(CHILD), bundle, portrait, driver, output]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT, capture_output=True, text=True, timeout=CHILD_S, check=True,
    )  # fmt: skip
    count, peak_kib = map(int, done.stdout.split())
    assert count == frames
    return peak_kib * 1024


def test_memory_does_not_grow_with_the_clip(
    toy_bundle: Path, portrait: tuple[UInt8Array, Landmarks], face: Landmarks, tmp_path: Path
) -> None:
    large = cv2.resize(portrait[0], (160, 180), interpolation=cv2.INTER_NEAREST)
    wide = Landmarks(portrait[1].points * 2.0, portrait[1].gaze * 2.0)
    still = write_portrait(tmp_path / "portrait.png", np.asarray(large, np.uint8), wide)
    peaks = []
    for frames in (SHORT, LONG):
        driver = tmp_path / f"{frames}.mp4"
        times = [i * FRAME_NS for i in range(frames)]
        write(driver, [grey(i % 200, 96, 128) for i in range(frames)], times, face)
        faces = moving(face, 10) * (frames // 10)
        make_track(faces, times, (128, 96)).save(sidecar_path(driver))
        peaks.append(peak_bytes(toy_bundle, still, driver, tmp_path / f"{frames}.out.mp4", frames))
    print("peak MB:", *(peak / 1e6 for peak in peaks))
    assert peaks[1] - peaks[0] < MORE_BYTES


@pytest.mark.slow
def test_memory_does_not_grow_with_a_clip_of_the_shipped_model(tmp_path: Path) -> None:
    known = Track.load(sidecar_path(driver_path()))
    peaks = []
    for frames in (SHORT, LONG):
        which = np.arange(frames) % len(known)
        driver = tmp_path / f"{frames}.npz"
        times = np.arange(frames) * FRAME_NS
        Track(known.landmarks[which], known.gaze[which], times, known.size).save(driver)
        output = tmp_path / f"{frames}.mp4"
        peaks.append(peak_bytes(bundle_path(), portrait_paths()[0], driver, output, frames))
    print("peak MB:", *(peak / 1e6 for peak in peaks))
    assert peaks[1] - peaks[0] < MORE_BYTES
