"""A page about measurements that needs nothing but a browser: plots as SVG, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from diffusionact import machine
from diffusionact.bench import plots
from diffusionact.bench.records import TOTAL, Record, label, warnings_of
from diffusionact.errors import MediaError
from diffusionact.files import write_whole

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6470;--line:#d5dae0;--back:#fff;--box:#f4f6f8;
--warn:#8a5200;--warnback:#fff5e0;--c0:#2f6fbd;--c1:#d9782d;--c2:#3c9a5f;--c3:#8a56b5;--c4:#b8912b;
--c5:#c0476b;--c6:#4a9fb0;--c7:#7d8794}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4b0;--line:#3a414a;--back:#15181c;
--box:#1f242a;--warn:#ffcf7d;--warnback:#3a2c10;--c0:#6ca6ea;--c1:#f0a062;--c2:#6cc48d;--c3:#b88ae0;
--c4:#dcbc5c;--c5:#e87f9f;--c6:#79c6d5;--c7:#a5aebb}}
body{margin:0 auto;max-width:66rem;padding:1.5rem;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .3rem}
p,figcaption{color:var(--soft);margin:.3rem 0}figure{margin:0;overflow-x:auto}
svg{width:100%;min-width:34rem;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)}svg .soft{fill:var(--soft)}svg .line{stroke:var(--line)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.85rem}
.wide{overflow-x:auto}th,td{padding:.25rem .45rem;text-align:right;border-bottom:1px solid
var(--line);white-space:nowrap}th:first-child,td:first-child{text-align:left}thead th{color:
var(--soft);font-weight:600}.warn{background:var(--warnback);color:var(--warn);padding:.6rem 1rem;
border-radius:.4rem}.facts{background:var(--box);padding:.6rem 1rem;border-radius:.4rem}
.facts p{color:var(--ink)}.key{display:inline-block;width:.8em;height:.8em;border-radius:.15em;
margin:0 .35em 0 0}.item{white-space:nowrap;margin-left:1em}
"""


def write(path: Path, records: Sequence[Record]) -> None:
    """Return nothing; the page is in the file. Raises: MediaError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, document(records))
    except OSError as error:
        raise MediaError(f"{path}: cannot write the page ({error})") from error


def document(records: Sequence[Record]) -> str:
    """Return the page of these records, of one run or of several, as HTML."""
    first = records[0]
    names = [label(record, records) for record in records]
    body = [
        f"<h1>{escape(first['bundle']['name'])}: {_headline(records, names)}</h1>",
        _facts(records),
        *_warnings(records),
        _figure(
            "A whole frame",
            plots.boxes(names, [record["samples_ms"][TOTAL] for record in records]),
            "Milliseconds a frame. Box: half of all frames, line in it: the median; whiskers: 5 % "
            "to 95 %; dots: the medians of the rounds, in which the variants took turns.",
        ),
        _figure(
            "Its stages",
            plots.stacks(names, [_stage_medians(record) for record in records]),
            "The median of every stage, milliseconds." + _legend(records),
        ),
        _figure(
            "Frame after frame",
            plots.courses(names, [record["samples_ms"][TOTAL] for record in records]),
            "Milliseconds of each frame in order; a rise that all variants share in one round is "
            "the machine's, not theirs." + _keys(names),
        ),
        "<h2>Figures</h2>",
        _summary(records, names),
        *(_stages(record, name) for record, name in zip(records, names, strict=True)),
        "<h2>How it was measured</h2>",
        _method(first),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>diffusionact bench: {escape(first['bundle']['name'])}</title>"
        f"<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _headline(records: Sequence[Record], names: Sequence[str]) -> str:
    best = min(range(len(records)), key=lambda i: _p50(records[i]))
    text = f"{_p50(records[best]):.1f} ms a frame, {records[best]['fps']:.1f} fps"
    return escape(text if len(records) == 1 else f"{text} ({names[best]})")


def _p50(record: Record) -> float:
    return float(record["stages"][TOTAL]["p50_ms"])


def _facts(records: Sequence[Record]) -> str:
    lines = []
    for record in {(r["date"], str(r["machine"])): r for r in records}.values():
        side = record["bundle"]["image_size"]
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        lines += [
            f"<b>{escape(machine.describe_briefly(record['machine']))}</b>",
            f"{record['date']}, load average {record['load_average']} before the run, "
            f"commit {record['commit'] or 'not known'}",
            f"{side} x {side} px, weights {record['bundle']['weights_sha256'][:12]}",
            escape(versions),
        ]
    return '<div class="facts">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def _warnings(records: Sequence[Record]) -> Iterable[str]:
    for text in warnings_of(records):
        yield f'<p class="warn">{escape(text)}</p>'


def _figure(title: str, drawing: str, caption: str) -> str:
    return f"<h2>{title}</h2><figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _stage_medians(record: Record) -> dict[str, float]:
    return {name: t["p50_ms"] for name, t in record["stages"].items() if name != TOTAL}


def _legend(records: Sequence[Record]) -> str:
    return _keys(list(dict.fromkeys(name for r in records for name in _stage_medians(r))))


def _keys(names: Sequence[str]) -> str:
    return "".join(
        f' <span class="item"><span class="key" style="background:{plots.colour(i)}"></span>'
        f"{escape(name)}</span>"
        for i, name in enumerate(names)
    )


def _summary(records: Sequence[Record], names: Sequence[str]) -> str:
    head = (
        "variant", "fps", "p50 ms", "quartiles", "p95", "p99", "frames", "load s", "portrait s",
        "first frame ms", "peak MiB",
    )  # fmt: skip
    rows = []
    for record, name in zip(records, names, strict=True):
        total, start = record["stages"][TOTAL], record["start"]
        peak = record["memory"]["peak_mib"]
        rows.append(
            (
                name, f"{record['fps']:.2f}", f"{total['p50_ms']:.2f}",
                f"{total['q25_ms']:.2f}–{total['q75_ms']:.2f}", f"{total['p95_ms']:.2f}",
                f"{total['p99_ms']:.2f}", str(total["count"]), f"{start['load_ms'] / 1e3:.2f}",
                ("" if start["prepare_measured"] else "≈ ") + f"{start['prepare_ms'] / 1e3:.1f}",
                f"{start['first_frame_ms']:.0f}", f"{peak:.0f}" if peak else "?",
            )
        )  # fmt: skip
    return _table(head, rows)


def _stages(record: Record, name: str) -> str:
    head = (name, "p50 ms", "quartiles", "p95", "p99", "share")
    whole = _p50(record)
    rows = [
        (
            stage, f"{t['p50_ms']:.3f}", f"{t['q25_ms']:.3f}–{t['q75_ms']:.3f}",
            f"{t['p95_ms']:.3f}", f"{t['p99_ms']:.3f}", f"{t['p50_ms'] / whole:.1%}",
        )
        for stage, t in record["stages"].items()
    ]  # fmt: skip
    return "<p></p>" + _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _method(record: Record) -> str:
    what = (
        "A frame begins with the driver's landmarks and ends with the picture pasted into the "
        "portrait"
        if record["frame"] == "render"
        else "A frame begins with reading the driver's picture and ends with the result pasted "
        "into the portrait"
    )
    return (
        f"<p>{what}. Every variant ran in a process of its own, was warmed up, and took turns with "
        "the others. Stages are laps of one clock, so that they add up to the frame. Load: from "
        "the call to bound networks, with compiled models in the cache; portrait: crop and "
        "inversion (≈: expected from the time of a step); peak memory: of the whole process. "
        "<code>diffusionact bench-compare</code> says whether two such runs differ by more than "
        "noise.</p>"
    )
