"""A run: clips in, lines and a summary out, whoever made the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np

from diffusionact.evaluation.compared import Clip, Image
from diffusionact.evaluation.measure import ClipMeasure, Instruments
from diffusionact.evaluation.runfile import RunFile
from diffusionact.evaluation.statistics import Totals, summary_values
from diffusionact.evaluation.worst import Worst
from diffusionact.files import write_whole

Tell: TypeAlias = Callable[[Mapping[str, Any]], None]
Progress: TypeAlias = Callable[[int, "int | None"], None]


def run_clips(
    clips: Iterable[Clip],
    instruments: Instruments,
    head: Mapping[str, Any],
    *,
    folder: Path | None = None,
    tell: Tell | None = None,
    progress: Progress | None = None,
    total: int | None = None,
    pictures: bool = False,
) -> dict[str, Any]:
    """Return the summary of a run.

    head: what was measured and how; folder: where the run is kept, which makes it go on after an
    interruption, None keeps nothing; tell: takes every line, those of before an interruption
    first, and the summary last; total: frames, for the progress; pictures: results are kept too,
    as FOLDER/pictures/CLIP/FRAME.png.

    Raises: SettingsError when the folder holds another run, MediaError.
    """
    told = tell or (lambda _: None)
    steps = progress or (lambda _done, _total: None)
    totals = Totals()
    if folder is None:
        for clip in clips:
            for row in _rows(clip, instruments):
                totals.add(row)
                told(row)
                steps(totals.frames, total)
        summary = summary_values(totals, instruments.absent)
        told(summary)
        return summary
    with RunFile(folder, {**head, "instruments": dict(instruments.described)}) as file:
        worst = Worst(folder / "worst")
        for row in file.rows:
            totals.add(row)
            told(row)
        for clip in clips:
            if clip.name in file.done:
                continue
            place = folder / "pictures" if pictures else None
            for row in _rows(clip, instruments, file, worst, place):
                totals.add(row)
                told(row)
                steps(totals.frames, total)
        summary = summary_values(totals, instruments.absent)
        file.finish(summary)
    told(summary)
    return summary


def _rows(
    clip: Clip,
    instruments: Instruments,
    file: RunFile | None = None,
    worst: Worst | None = None,
    pictures: Path | None = None,
) -> Iterable[dict[str, Any]]:
    measure = ClipMeasure(instruments, clip)
    done = file.resumed_at(clip.name, measure) if file is not None else 0
    for count, frame in enumerate(clip.frames, start=1):
        if count <= done:
            continue
        row = measure.frame(frame)
        if worst is not None:
            worst.offer(row, clip, *measure.seen)
        if pictures is not None and measure.seen[1] is not None:
            _write_picture(pictures / clip.name / f"{frame.key}.png", measure.seen[1])
        if file is not None:
            file.add(row)
            file.keep(clip.name, count, measure)
        yield row
    end = measure.end()
    if file is not None:
        file.add(end)
    yield end


def _write_picture(path: Path, image: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, np.asarray(cv2.imencode(".png", image)[1]).tobytes())
