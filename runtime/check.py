"""What works here and what does not: the report of `diffusionact check`.

A library, backend or GPU that is not here is told, with the command that brings it; what is here
and does not work, or is damaged, fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from diffusionact import manifest
from diffusionact.errors import BackendMissing, DiffusionActError
from diffusionact.manifest import Manifest
from diffusionact.runtime.doctor import backends, engines, machine
from diffusionact.runtime.doctor.finding import Finding, found
from diffusionact.runtime.tracker import open_tracker

PARITY_FILE = "parity.json"  # in a bundle: how far its graphs were from the weights, at export
EXPORT = "diffusionact export WEIGHTS -o BUNDLE"


def findings(bundle_dir: Path) -> Iterator[Finding]:
    """Yield the findings, one after the other as they are made; none raises."""
    yield from machine.findings()
    ways: list[backends.Way] = []
    for finding, usable in backends.loading():
        ways += usable
        yield finding
    yield _tracker()
    try:
        seen = manifest.read(bundle_dir)
    except DiffusionActError as error:
        yield Finding("bundle", False, str(error), EXPORT)
        return
    yield Finding("bundle", True, _describe(bundle_dir, seen))
    yield from _exported(bundle_dir / PARITY_FILE)
    yield from engines.findings(bundle_dir, seen)
    yield from backends.defaults(bundle_dir, seen)
    yield from backends.parity(bundle_dir, seen, tuple(ways))


def _tracker() -> Finding:
    try:
        open_tracker().close()
    except BackendMissing as error:
        return found("tracker", None, error)
    return Finding("tracker", True, "finds faces in pictures and videos")


def _describe(bundle_dir: Path, seen: Manifest) -> str:
    return (
        f"{bundle_dir}: {seen.name}, {seen.image_size} px, {seen.render.steps} steps, "
        f"weights {seen.weights_sha256[:12]}, all hashes right"
    )


def _exported(path: Path) -> Iterator[Finding]:
    """What the export measured against the weights; nothing is run here."""
    if not path.is_file():
        yield Finding("parity", None, f"not recorded: the bundle has no {path.name}")
        return
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            seen, allowed = (
                (float(row[f"max_{what}"]), float(row[f"mean_{what}"]))
                for what in ("error", "allowed")
            )
            yield Finding(
                f"parity {row['what']}",
                seen[0] <= allowed[0] and seen[1] <= allowed[1],
                f"at export: max {seen[0]:.1e} of {allowed[0]:.0e}, "
                f"mean {seen[1]:.1e} of {allowed[1]:.0e} allowed",
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path}: not readable ({error!r}); export the bundle again"
        yield Finding("parity", False, what, EXPORT)
