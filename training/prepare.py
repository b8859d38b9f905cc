"""Data sets of real faces -> shards: which clips go where, what is done already, and the report.

A shard is a fixed run of clips. It is made whole, renamed into place, and then its report beside it
says that it is done: a run that was killed is taken up at the next shard, and ends with the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2

from diffusionact.errors import SettingsError
from diffusionact.evaluation.layouts import Footage
from diffusionact.files import write_whole
from diffusionact.progress import ProgressCallback
from diffusionact.training.prepare_clip import (
    REASONS,
    ClipReport,
    Example,
    Reader,
    Request,
    prepare_clip,
)
from diffusionact.training.shard_files import Entry, write_shard
from diffusionact.training.shards import FORMAT, META, Shards, Take, write_index

REQUEST, REPORT, REPORT_TEXT, DROPPED = "request.json", "report.json", "report.txt", "dropped"
SHARDS_WITH_EXAMPLES = 16  # of dropped frames: enough to see what goes wrong, of any size of data
MOST_FRAMES = 1024  # of a clip: those of one clip are held in memory, encoded
UNUSED_SHOWN = 20  # clips that the readable report names

OpenReader = Callable[[], Reader]


@dataclass(frozen=True)
class Prepared:
    """What lies in the folder. report: as in report.json."""

    folder: Path
    report: dict[str, Any]


def prepare(
    clips: Sequence[Footage],
    folder: Path,
    request: Request,
    open_reader: OpenReader,
    *,
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> Prepared:
    """Returns what was prepared in `folder`, or is there already. A run that was cut short is taken
    up again, by the same call.

    clips: in their order, which decides the shards; open_reader: makes a reader, once a process;
    it can be pickled where workers > 1.

    Raises: SettingsError: the folder holds something else, or nothing could be kept.
    """
    _check(request, workers)
    _claim(folder, request, clips)
    runs = _runs(clips, request.clips_per_shard)
    todo = [number for number, run in enumerate(runs) if not _is_done(folder, number)]
    if todo or not (folder / META).exists():
        (folder / META).unlink(missing_ok=True)
        tasks = [_Task(folder, request, n, n * request.clips_per_shard, runs[n]) for n in todo]
        done = sum(len(run) for run in runs) - sum(len(task.clips) for task in tasks)
        with _making(open_reader, workers, tasks) as made:
            for count in made:
                done += count
                if progress is not None:
                    progress(done, len(clips))
        _finish(folder, request, len(runs))
    return Prepared(folder, json.loads((folder / REPORT).read_text(encoding="utf-8")))


def _check(request: Request, workers: int) -> None:
    for name, value, least, most in (
        ("--size", request.size, 16, 1024),
        ("--frames-per-clip", request.frames_per_clip, 1, MOST_FRAMES),
        ("--clips-per-shard", request.clips_per_shard, 1, 100_000),
        ("--workers", workers, 1, 1024),
    ):
        if not least <= value <= most:
            raise SettingsError(f"{name} {value}; wanted {least} to {most}")


def _claim(folder: Path, request: Request, clips: Sequence[Footage]) -> None:
    """Returns nothing; the folder is this request's. Raises: SettingsError."""
    named = "\n".join(f"{clip.identity}\t{clip.name}" for clip in clips)
    wanted = {
        "format": FORMAT, **asdict(request), "clips": len(clips),
        "clips_sha256": hashlib.sha256(named.encode()).hexdigest(),
    }  # fmt: skip
    path = folder / REQUEST
    if path.exists():
        seen = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in wanted if seen.get(name) != wanted[name]]
        if differing:
            name = differing[0]
            raise SettingsError(
                f"{folder} was begun with {name} = {seen.get(name)}, wanted {wanted[name]}; name "
                "another folder with -o, or give the same settings to go on"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} holds other files; name an empty or new folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(wanted, indent=1))


def _runs(clips: Sequence[Footage], length: int) -> list[Sequence[Footage]]:
    return [clips[first : first + length] for first in range(0, len(clips), length)]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def _report(folder: Path, number: int) -> Path:
    return _shard(folder, number).with_suffix(".json")


def _is_done(folder: Path, number: int) -> bool:
    """Whether a shard is there, of the size that its report, which is written last, says."""
    try:
        said = json.loads(_report(folder, number).read_text(encoding="utf-8"))["bytes"]
        return bool(_shard(folder, number).stat().st_size == said)
    except (OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class _Task:
    """A shard to make: its number, the number of its first clip in the data set, its clips."""

    folder: Path
    request: Request
    number: int
    first: int
    clips: Sequence[Footage]


_reader: Reader | None = None  # of a worker process


def _begin(open_reader: OpenReader) -> None:
    global _reader
    _reader = open_reader()
    cv2.setNumThreads(1)  # one process a core, rather than threads that wait for each other


def _work(task: _Task) -> int:
    assert _reader is not None
    for _ in _make(task, _reader):
        pass
    return len(task.clips)


@contextmanager
def _making(
    open_reader: OpenReader, workers: int, tasks: Sequence[_Task]
) -> Iterator[Iterable[int]]:
    """Yields an iterator that makes the shards, and tells how many clips were done with each of
    its steps."""
    if workers == 1:
        reader = open_reader()
        try:
            yield (count for task in tasks for count in _make(task, reader))
        finally:
            reader.close()
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, max(len(tasks), 1)), _begin, (open_reader,)) as processes:
        yield processes.imap_unordered(_work, tasks)


def _make(task: _Task, reader: Reader) -> Iterator[int]:
    """Makes one shard; yields 1 for each clip that is done."""
    reports: list[ClipReport] = []
    examples: list[Example] = []
    done = 0

    def entries() -> Iterator[Entry]:
        for number, clip in enumerate(task.clips, task.first):
            made, report = prepare_clip(reader, clip, number, task.request, examples)
            reports.append(report)
            yield from made

    # The writer pulls the frames: those of one clip at a time are in memory.
    writing = write_shard(_shard(task.folder, task.number), entries())
    for _ in writing:
        if len(reports) > done:
            yield len(reports) - done
            done = len(reports)
    _write_examples(task, examples)
    text = json.dumps(
        {
            "bytes": _shard(task.folder, task.number).stat().st_size,
            "clips": [report.as_dict() for report in reports],
        },
        indent=1,
    )
    write_whole(_report(task.folder, task.number), text)
    yield len(reports) - done


def _write_examples(task: _Task, examples: Sequence[Example]) -> None:
    if task.number >= SHARDS_WITH_EXAMPLES:
        return
    for example in examples:
        place = task.folder / DROPPED / example.reason.replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{example.name}.jpg"), example.image)


def _finish(folder: Path, request: Request, count: int) -> None:
    """Writes index, report and, last, meta.json."""
    paths = [_shard(folder, number) for number in range(count)]
    reports = [
        [ClipReport(**clip) for clip in json.loads(_report(folder, n).read_text("utf-8"))["clips"]]
        for n in range(count)
    ]
    takes = [
        [
            Take(clip.person, clip.clip, number, frames)
            for clip in of_shard
            for number, frames in enumerate(clip.takes)
        ]
        for of_shard in reports
    ]
    found = summary([clip for of_shard in reports for clip in of_shard])
    write_whole(folder / REPORT, json.dumps(found, indent=1))
    write_whole(folder / REPORT_TEXT, report_text(found))
    if not found["kept"]:
        raise SettingsError(
            f"{folder}: none of {found['frames']} frames was kept; {REPORT_TEXT} there says why, "
            f"{DROPPED}/ shows some of them"
        )
    write_index(folder, paths, takes, request.dtype())
    for part in folder.glob(".part-*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    meta = {
        "format": FORMAT, "size": request.size, "drawing": request.drawing,
        "shards": [[path.name, path.stat().st_size] for path in paths],
        "people": found["people"], "frames": found["kept"], "tracker": request.tracker,
        "mask": request.mask, "crop": {"rotate": request.rotate, "scale": request.scale},
        "codes": "shape, expression, pose, camera: diffusionact's face model, fitted to the points"
        + ("; codes: as the published networks read them" if request.codes else ""),
    }  # fmt: skip
    write_whole(folder / META, json.dumps(meta, indent=1))
    Shards.open(folder)


def summary(clips: Sequence[ClipReport]) -> dict[str, Any]:
    """Returns the report of a data set, for JSON."""
    dropped: Counter[str] = Counter()
    for clip in clips:
        dropped.update(clip.dropped)
    unused = [
        {"clip": clip.clip, "error": clip.error, "dropped": dict(clip.dropped)}
        for clip in clips
        if not clip.takes
    ]
    partly = [
        {"clip": clip.clip, "error": clip.error} for clip in clips if clip.takes and clip.error
    ]
    return {
        "people": len({clip.person for clip in clips if clip.takes}),
        "clips": len(clips),
        "clips_used": sum(bool(clip.takes) for clip in clips),
        "takes": sum(len(clip.takes) for clip in clips),
        "frames": sum(clip.seen for clip in clips),
        "kept": sum(sum(clip.takes) for clip in clips),
        "dropped": {reason: dropped[reason] for reason in REASONS if dropped[reason]},
        "unused_clips": unused,
        "cut_short": partly,
    }


def report_text(found: dict[str, Any]) -> str:
    """Returns the report in words."""
    lines = [
        f"{found['kept']} of {found['frames']} frames kept, of {found['people']} people; "
        f"{found['clips_used']} of {found['clips']} clips, in {found['takes']} takes",
        "",
    ]
    for reason, count in found["dropped"].items():
        lines.append(f"{count:>9}  {reason}: {REASONS[reason]}")
    for title, clips in (
        ("clips without a frame", found["unused_clips"]),
        ("clips that end early, from damage", found["cut_short"]),
    ):
        if not clips:
            continue
        lines += ["", f"{len(clips)} {title}:"]
        for clip in clips[:UNUSED_SHOWN]:
            why = clip["error"] or ", ".join(
                f"{count} {reason}" for reason, count in clip["dropped"].items()
            )
            lines.append(f"  {clip['clip']}: {why or 'no frames'}")
        if len(clips) > UNUSED_SHOWN:
            lines.append(f"  and {len(clips) - UNUSED_SHOWN} more, all in {REPORT}")
    return "\n".join(lines) + "\n"
