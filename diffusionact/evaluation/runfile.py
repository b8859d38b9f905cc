"""A run on disk: its head, a line a frame, its summary, and where it was interrupted.

RUN/run.json says what was measured and how; RUN/frames.jsonl has a line for each frame and one for
the end of each clip; RUN/summary.json is there when the run is complete. Lines are added as they
are made. What the measures of a clip remember is kept every few seconds, so that an interrupted
run goes on at the frame where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusionact.errors import MediaError, SettingsError
from diffusionact.evaluation.measure import ClipMeasure
from diffusionact.files import write_whole
from diffusionact.landmarks import load_npz, save_npz

HEAD, LINES, SUMMARY, STATE = "run.json", "frames.jsonl", "summary.json", "state.npz"
FORMAT = 1
KEEP_SECONDS = 5.0


class RunFile:
    """A run that is being written. Use it with `with`."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        """Opens a new run, or the interrupted one that has this head.

        Raises: SettingsError when the folder holds a run of other settings, MediaError when it
        cannot be written.
        """
        self.folder = folder
        self._head = {"format": FORMAT, **_as_json(head)}
        self._kept_s = time.monotonic()
        self._open_clip: tuple[str, int] | None = None
        self._state: dict[str, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            done = self._resume()
            self._file = open(folder / LINES, "r+b" if done else "w+b")
            self._file.seek(done)
            self._file.truncate()
        except OSError as error:
            raise MediaError(
                f"{folder}: cannot be written ({error.strerror}); name another with -o"
            ) from error
        self.rows: list[dict[str, Any]] = []  # what was done before, for the totals
        if done:
            self._file.seek(0)
            self.rows = [json.loads(line) for line in self._file]
        self.done = {row["clip"] for row in self.rows if row.get("end")}

    def resumed_at(self, clip: str, measure: ClipMeasure) -> int:
        """Return how many frames of a clip are done; its measures remember them again."""
        if self._open_clip is None or self._open_clip[0] != clip:
            return 0
        for name, part in measure.running.items():
            thaw(part, name, self._state)
        return self._open_clip[1]

    def add(self, row: Mapping[str, Any]) -> None:
        """Return nothing; the line is on disk soon, and certainly at `keep` or the end."""
        self._file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")

    def keep(self, clip: str, frames: int, measure: ClipMeasure, now: bool = False) -> None:
        """Return nothing; every few seconds, or now, notes where the clip is."""
        if not now and time.monotonic() - self._kept_s < KEEP_SECONDS:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        state: dict[str, Any] = {"clip": np.array(clip), "frames": np.array(frames)}
        state["bytes"] = np.array(self._file.tell())
        for name, part in measure.running.items():
            state |= freeze(part, name)
        save_npz(self.folder / STATE, **state)
        self._kept_s = time.monotonic()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Return nothing; the run is complete."""
        self._file.flush()
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        (self.folder / STATE).unlink(missing_ok=True)

    def close(self) -> None:
        """Return nothing; what was measured stays."""
        self._file.close()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self) -> int:
        """How many bytes of lines are kept: those of complete clips, and of the open one up to
        where its measures were kept."""
        head, lines = self.folder / HEAD, self.folder / LINES
        if not head.exists():
            if lines.exists():
                raise SettingsError(f"{self.folder}: has {LINES} but no {HEAD}; name another")
            write_whole(head, json.dumps(self._head, indent=1) + "\n")
            return 0
        seen = _read_json(head)
        if seen != self._head:
            names = sorted(k for k in {*seen, *self._head} if seen.get(k) != self._head.get(k))
            raise SettingsError(
                f"{self.folder}: holds a run of other settings ({', '.join(names)}); name another "
                "folder with -o, or remove this one"
            )
        if not lines.exists():
            return 0
        end = _end_of_clips(lines)
        if (self.folder / STATE).exists():
            state = load_npz(self.folder / STATE, "state of a run")
            place = int(np.asarray(state["bytes"]))
            if end <= place <= lines.stat().st_size:
                self._open_clip = str(state["clip"]), int(np.asarray(state["frames"]))
                self._state = dict(state)
                return place
        return end


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the head and the summary of a complete run.

    Raises: MediaError when it is none, or not complete.
    """
    if not (folder / HEAD).exists():
        raise MediaError(f"{folder}: no run of `diffusionact eval` (no {HEAD} in it)")
    if not (folder / SUMMARY).exists():
        raise MediaError(f"{folder}: the run was interrupted; give its command again to go on")
    return _read_json(folder / HEAD), _read_json(folder / SUMMARY)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's folder, or of a file of such lines (`eval --json > FILE`),
    without its summary.

    Raises: MediaError when it is missing or holds something else.
    """
    file = path / LINES if path.is_dir() else path
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if not isinstance(row, dict) or not ("clip" in row or "summary" in row):
                    raise ValueError("a line that is no frame of `diffusionact eval`")
                if not row.get("summary"):
                    yield row
    except (OSError, ValueError) as error:
        raise MediaError(f"{file}: not the lines of a run ({error})") from error


def freeze(part: object, prefix: str) -> dict[str, Any]:
    """Return what an object of plain numbers, arrays and lists of arrays holds, as arrays."""
    made = {}
    for name, value in vars(part).items():
        if value is None:
            continue
        kind = "list" if isinstance(value, list) else "value"
        if kind == "value" or value:
            made[f"{prefix}.{name}.{kind}"] = np.asarray(value)
    return made


def thaw(part: object, prefix: str, state: Mapping[str, Any]) -> None:
    """Return nothing; the object holds again what `freeze` took of it."""
    for name, value in vars(part).items():
        array = state.get(f"{prefix}.{name}.value")
        listed = state.get(f"{prefix}.{name}.list")
        if listed is not None:
            setattr(part, name, list(listed))
        elif isinstance(value, list):
            setattr(part, name, [])
        elif array is not None:
            setattr(part, name, array.item() if array.ndim == 0 else array)


def _end_of_clips(lines: Path) -> int:
    """The byte behind the last whole line that ends a clip."""
    end = place = 0
    with open(lines, "rb") as file:
        for line in file:
            place += len(line)
            if line.endswith(b"\n") and b'"end":true' in line:
                end = place
    return end


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise MediaError(f"{path}: not an object of JSON")
    return values


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return made
