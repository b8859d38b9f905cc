"""What a run tells of itself: curves.jsonl and, where TensorBoard is installed, its event files."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffusionact.files import write_whole
from diffusionact.training.memory import peak_bytes
from diffusionact.training.state import Progress

log = logging.getLogger(__name__)

NAME = "curves.jsonl"
BOARD = "tensorboard"


class Curves:
    """The means of the losses over `every` steps, the sample sheets, and each stage's summary: as
    lines of JSON, and as TensorBoard's scalars and pictures over the images seen."""

    def __init__(self, folder: Path, every: int, device: torch.device, *, board: bool) -> None:
        self._path, self._every, self._device = folder / NAME, every, device
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]
        self._steps = 0
        self._start, self._seen = time.monotonic(), 0
        # Until the run is resumed or has written, what lies there is not its own.
        self._fresh = True
        self._board = _open_board(folder / BOARD, None) if board else None

    def add(self, kind: str, progress: Progress, over: float, parts: dict[str, float]) -> None:
        """Takes the parts of one step; writes a line where `every` steps are full."""
        for name, value in parts.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + value, total[1] + 1
        self._steps += 1
        if self._steps < self._every:
            return
        speed = (progress.seen - self._seen) / (time.monotonic() - self._start)
        peak = peak_bytes(self._device)
        record = {
            "stage": kind, "step": progress.step, "images": progress.images,
            "seen": progress.seen, "seconds": round(progress.seconds, 1),
            "fraction": round(over, 4), "images_per_s": round(speed, 1),
            "peak_memory_mb": None if peak is None else round(peak / 1e6),
            **{name: float(f"{total / count:.5g}") for name, (total, count) in self._sums.items()},
        }  # fmt: skip
        self._write(record)
        log.info("%s", " ".join(f"{k}={v}" for k, v in record.items()))
        self._scalars(kind, record, progress.seen)
        self._sums, self._steps = {}, 0
        self._start, self._seen = time.monotonic(), progress.seen

    def sheet(
        self, name: str, psnrs: dict[str, float], picture: npt.NDArray[np.uint8], seen: int
    ) -> None:
        """Notes a sample sheet. picture: uint8 [H,W,3] RGB."""
        self._write({"sheet": name, "seen": seen, "psnr": psnrs})
        log.info("sheet %s: %s", name, ", ".join(f"{k} {v:.1f}" for k, v in psnrs.items()))
        if self._board is not None:
            self._board.add_image("sheet", picture, seen, dataformats="HWC")
            for row, value in psnrs.items():
                self._board.add_scalar(f"psnr/{row}", value, seen)
            self._board.flush()

    def stage_is_over(self, kind: str, progress: Progress) -> None:
        """Writes what the stage took: images, seconds, images a second, memory."""
        peak = peak_bytes(self._device)
        record = {
            "summary": kind, "seen": progress.seen, "images": progress.images,
            "seconds": round(progress.seconds, 1),
            "images_per_s": round(progress.images / max(progress.seconds, 1e-9), 1),
            "peak_memory_mb": None if peak is None else round(peak / 1e6),
        }  # fmt: skip
        self._write(record)
        log.info("%s", " ".join(f"{k}={v}" for k, v in record.items()))

    def begin(self, seen: int) -> None:
        """Lets the speed count from here."""
        self._start, self._seen = time.monotonic(), seen

    def record(self) -> dict[str, Any]:
        """Returns what is not written yet, for a checkpoint."""
        return {"sums": self._sums, "steps": self._steps}

    def resume(self, record: dict[str, Any] | None, seen: int) -> None:
        """Goes back to a checkpoint at which so many images had been seen: what was written after
        it will be written again."""
        self._fresh = False
        if record is not None:
            self._sums, self._steps = record["sums"], record["steps"]
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _seen(line) <= seen]
            write_whole(self._path, "".join(f"{line}\n" for line in kept))
        if self._board is not None:
            self._board.close()
            self._board = _open_board(self._path.parent / BOARD, seen + 1)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("w" if self._fresh else "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._fresh = False

    def _scalars(self, kind: str, record: dict[str, Any], seen: int) -> None:
        if self._board is None:
            return
        for name, value in record.items():
            if isinstance(value, float | int) and name not in ("step", "images", "seen"):
                self._board.add_scalar(f"{kind}/{name}", value, seen)


def _seen(line: str) -> float:
    """How many images a line is about; a line cut short by a crash is about none there will be."""
    try:
        return float(json.loads(line).get("seen", 0))
    except ValueError:
        return float("inf")


def _open_board(folder: Path, purge: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no tensorboard installed: the curves are in %s alone", NAME)
        return None
    return SummaryWriter(str(folder), purge_step=purge)
