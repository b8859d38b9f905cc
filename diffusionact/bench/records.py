"""Records of measurements: one JSON object a line, appended whole, read with checks.

A record: "variant" (what was asked for: backend, precision, steps, threads, device), "ran" (what
that came to), "bundle", "machine", "versions", "commit", "date", "load_average", "warnings",
"samples_ms" (stage -> rounds -> milliseconds of each frame; "total" among the stages), "stages"
(stage -> what `spread` gives), "fps", "start" and "memory".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diffusionact.errors import MediaError

Record: TypeAlias = Mapping[str, Any]

FORMAT = 1
KIND = "diffusionact bench"
TOTAL = "total"
# Of "ran": what tells variants of one run apart, and how it is said.
VARIANT_WORDS = {
    "backend": "{}",
    "precision": "{}",
    "steps": "{} steps",
    "threads": "{} threads",
    "batch": "{} at once",
    "device": "{}",
}
BUSY_LOAD = 0.5  # processes a core that already want to run
NOISY_SPREAD = 0.15  # half the quartiles' distance, of the median


def spread(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return count, percentiles, quartiles, median absolute deviation and the least of all.

    rounds: milliseconds of each frame, by round.
    """
    values = np.array([ms for one in rounds for ms in one], np.float64)
    low, p50, high, p95, p99 = np.percentile(values, (25, 50, 75, 95, 99))
    return {
        "count": int(values.size),
        "p50_ms": round(float(p50), 4),
        "p95_ms": round(float(p95), 4),
        "p99_ms": round(float(p99), 4),
        "q25_ms": round(float(low), 4),
        "q75_ms": round(float(high), 4),
        "mad_ms": round(float(np.median(np.abs(values - p50))), 4),
        "min_ms": round(float(values.min()), 4),
    }


def noise_warnings(total: Mapping[str, float], load: float | None, cores: int) -> list[str]:
    """Return what speaks against trusting a measurement, in words.

    total: the spread of whole frames; load: the load average from before it.
    """
    found = []
    if load is not None and load > BUSY_LOAD * cores:
        found.append(
            f"the machine was busy: load average {load:.1f} on {cores} cores before the run; "
            "end what else runs, or compare ratios of interleaved variants only"
        )
    half = (total["q75_ms"] - total["q25_ms"]) / 2
    if half > NOISY_SPREAD * total["p50_ms"]:
        found.append(
            f"frames differ much: half of them lie {half / total['p50_ms']:.0%} about the median; "
            "measure again on a quiet machine, or with more --frames"
        )
    return found


def warnings_of(records: Sequence[Record]) -> list[str]:
    """Return the warnings of these records, each once, with the variants that not all share."""
    found: dict[str, list[str]] = {}
    for record in records:
        for text in record["warnings"]:
            found.setdefault(text, []).append(label(record, records))
    return [
        text if len(names) == len(records) else f"{'; '.join(names)}: {text}"
        for text, names in found.items()
    ]


def label(record: Record, among: Sequence[Record] = ()) -> str:
    """Return the name of a record's variant: backend, precision, and what differs among these."""
    ran = record["ran"]
    words = [
        form.format(ran[key])
        for key, form in VARIANT_WORDS.items()
        if key in ("backend", "precision", "steps")
        or any(other["ran"].get(key) != ran[key] for other in among)
    ]
    words += [f"approximate: {ran['approximate']}"] if ran["approximate"] else []
    words += ["default"] if record["variant"]["backend"] == "auto" else []
    return ", ".join(words)


def table(record: Record, name: str) -> str:
    """Return a record as text: stages, start and memory."""
    total, start, memory = record["stages"][TOTAL], record["start"], record["memory"]
    peak = memory["peak_mib"]
    prepared = "" if start["prepare_measured"] else " expected"
    quartiles = f"half of all within {total['q25_ms']:.1f} to {total['q75_ms']:.1f} ms"
    lines = [
        f"{name}: {total['p50_ms']:.1f} ms a frame, {record['fps']:.1f} fps; {quartiles}",
        f"  load {start['load_ms'] / 1e3:.1f} s (the first time {start['first_load_ms'] / 1e3:.1f} "
        f"s), portrait {start['prepare_ms'] / 1e3:.1f} s{prepared}, first frame "
        f"{start['first_frame_ms']:.0f} ms, memory {f'{peak:.0f} MiB' if peak else 'not known'}",
        f"  {'ms a frame':<12}{'p50':>9}{'p95':>9}{'p99':>9}",
    ]
    lines += [
        f"  {stage:<12}{t['p50_ms']:>9.2f}{t['p95_ms']:>9.2f}{t['p99_ms']:>9.2f}"
        for stage, t in record["stages"].items()
    ]
    return "\n".join(lines)


def append(path: Path, records: Sequence[Record]) -> None:
    """Return nothing; the records stand at the end of the file, each a line, all or none of them.

    Raises: MediaError when the file cannot be written.
    """
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    data = text.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write at the end of the file: others who append meanwhile stand before or behind.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            if os.write(file, data) != len(data):
                os.ftruncate(file, size)
                raise OSError("the disk is full")
        finally:
            os.close(file)
    except OSError as error:
        raise MediaError(f"{path}: cannot append the measurement ({error})") from error


def read(path: Path) -> list[Record]:
    """Return the records of a file, oldest first.

    Raises: MediaError when it is missing, or a line is none of `diffusionact bench`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(
            f"{path}: cannot be read ({error}); write one with `diffusionact bench --out FILE`"
        ) from error
    records = [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise MediaError(f"{path}: holds no measurement; wanted lines of `diffusionact bench`")
    return records


def _record(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
        if record["kind"] != KIND or record["format"] != FORMAT:
            raise ValueError(f"kind {record['kind']!r}, format {record['format']}")
        for key in ("ran", "machine", "bundle", "stages"):
            record[key].items()
        if not record["samples_ms"][TOTAL][0]:
            raise ValueError("no samples")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        # With good lines before it, it is an append that was cut short; else another kind of file.
        mend = f"remove the line: sed -i {number}d {path}"
        raise MediaError(
            f"{path}, line {number}: no record of `diffusionact bench` in format {FORMAT} "
            f"({error!r}); {mend if number > 1 else 'wanted a file of `diffusionact bench --out`'}"
        ) from error
    return dict(record)


def repeats(records: Sequence[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Return the records of every variant that repeat its last one: same versions and commit."""
    last = {variant_key(record): record for record in records}
    return {
        key: [
            record
            for record in records
            if variant_key(record) == key
            and all(record.get(what) == of[what] for what in ("versions", "commit", "machine"))
        ]
        for key, of in last.items()
    }


def variant_key(record: Record) -> tuple[Any, ...]:
    """Return what was asked for, by which records of two files belong together."""
    asked = {"device": "auto", **record["variant"]}
    bundle = record["bundle"]
    return (
        bundle["weights_sha256"],
        record["frame"],
        *(_hashable(asked.get(key)) for key in (*VARIANT_WORDS, "approximate")),
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
