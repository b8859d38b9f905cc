"""What the published loop, the usual ways to speed it up, and ours take for the same work.

    python -m benchmarks.peers --out benchmarks/results/peers.json --json

Everything runs in one go on one machine: the published network at its full size, with weights made
by a rule, 20 steps at 256 px. Each peer is a process of its own (memory and load time are its own)
and they take turns, round by round, with one pass of the encoder and two steps of the loop each (all
steps, where these differ); then each renders a whole frame. A frame's time is one encoder pass and
ten such pieces, by the medians; the whole frame stands beside it to check that. Ratios are of the
same round.

"ours" is what `diffusionact` takes by itself: the backend and precision that the choice measured for
the shipped, trained model, because precision is judged by pictures that mean something.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import peer_kinds
from benchmarks.peer_kinds import STEPS
from diffusionact import bundle_path, machine
from diffusionact import manifest as manifest_file
from diffusionact.bench import records
from diffusionact.files import write_whole
from diffusionact.runtime.choice import choose
from diffusionact.runtime.contest import Contestant, contest

ROUNDS, FEWEST_ROUNDS = 7, 3
MINUTES = 11.0  # it has to end within twelve
DRAWS = 2000
RESERVE = 1.3  # of what whole frames are expected to take
BASELINE, DEFAULT = "published loop", "ours"
NETWORKS_SHARE = 0.9  # of the baseline's time must be inside the networks

NETWORKS = {"full": "ffhq256, 256 px", "small": "a small network of the same make, 64 px"}

Picture = NDArray[np.float32]


@dataclass
class Row:
    """What one peer took; seconds."""

    peer: peer_kinds.Peer
    load_s: float
    encode_s: list[float]
    piece_s: list[float]
    frames_s: list[float]
    facts: Mapping[str, Any]
    picture: Picture | None = None

    @property
    def rounds_s(self) -> list[float]:
        """A frame's seconds by each round."""
        pieces = STEPS // self.peer.piece
        return [e + pieces * p for e, p in zip(self.encode_s, self.piece_s, strict=True)]

    @property
    def frame_s(self) -> float:
        """A frame's seconds by the medians."""
        pieces = STEPS // self.peer.piece
        return float(np.median(self.encode_s) + pieces * np.median(self.piece_s))


def measure(peers: Sequence[peer_kinds.Peer], folder: Path, deadline_s: float) -> list[Row]:
    """The rows of the peers, over the networks in the folder; ends before the monotonic deadline
    unless single rounds take longer than is left."""
    colds: dict[str, float] = {}
    for peer in (peer for peer in peers if peer.kind == "ours"):  # those that keep a cache
        with Contestant(peer_kinds.open_peer, peer, folder) as rival:
            colds[peer.name] = rival.ask("load_s")
    with contest(peer_kinds.open_peer, [(peer, folder) for peer in peers]) as rivals:
        rows = [
            Row(peer, rival.ask("load_s"), [], [], [], {})
            for peer, rival in zip(peers, rivals, strict=True)
        ]
        for rival in rivals:
            rival.ask("piece", peer_kinds.PIECE)  # warm-up: first calls plan and allocate
        _take_turns(rows, rivals, deadline_s)
        for row, rival in zip(rows, rivals, strict=True):
            if time.monotonic() + RESERVE * row.frame_s < deadline_s:
                seconds, row.picture = rival.ask("frame", STEPS)
                row.frames_s.append(seconds)
                _tell(f"{row.peer.name}: {seconds:.1f} s a frame")
            else:
                _tell(f"{row.peer.name}: no time for a whole frame")
            row.facts = {**rival.ask("facts"), "first_load_s": colds.get(row.peer.name, row.load_s)}
    return rows


def _take_turns(rows: Sequence[Row], rivals: Sequence[Contestant], deadline_s: float) -> None:
    for turn in range(ROUNDS):
        begun_s = time.monotonic()
        for row, rival in zip(rows, rivals, strict=True):
            row.encode_s.append(rival.ask("encode"))
            row.piece_s.append(rival.ask("piece", row.peer.piece))
        spent_s = time.monotonic() - begun_s
        _tell(f"round {turn + 1} of {ROUNDS}: {spent_s:.0f} s")
        frames_s = RESERVE * sum(row.frame_s for row in rows)
        if turn + 1 >= FEWEST_ROUNDS and time.monotonic() + spent_s + frames_s > deadline_s:
            _tell("no time for more rounds")
            return


def summary(rows: Sequence[Row], choice: str, network: str) -> dict[str, Any]:
    """All figures, ready for JSON. choice: what our default is; network: in words."""
    base = next(row for row in rows if row.peer.name == BASELINE)
    told = [_told(row, base) for row in rows]
    ours = next(one for one in told if one["name"] == DEFAULT)
    return {
        "kind": "diffusionact peers",
        "network": f"{network}, weights made by a rule, {STEPS} steps, one frame at a time",
        "default": choice,
        "ratio_default_to_published": ours["ratio"],
        "ratio_default_to_published_95": ours["ratio_95"],
        "baseline_share_in_networks": base.facts["share_in_networks"],
        "rows": told,
    }


def _told(row: Row, base: Row) -> dict[str, Any]:
    ratio, low, high = paired_ratio(base.rounds_s, row.rounds_s)
    step_ms = [s / row.peer.piece * 1e3 for s in row.piece_s]
    return {
        "name": row.peer.name,
        "how": row.peer.how,
        "frame_s": round(row.frame_s, 3),
        "frame_measured_s": [round(s, 3) for s in row.frames_s],
        "ratio": round(ratio, 3),
        "ratio_95": [round(low, 3), round(high, 3)],
        "step_ms": records.spread([step_ms]),
        "encode_ms": records.spread([[s * 1e3 for s in row.encode_s]]),
        "load_s": round(row.load_s, 2),
        "psnr_to_published_db": _psnr_db(row.picture, base.picture),
        **row.facts,
    }


def paired_ratio(base_s: Sequence[float], own_s: Sequence[float]) -> tuple[float, float, float]:
    """The median of base / own over the rounds, and its 95 % interval, by bootstrap: what slows
    the machine in a round slows both."""
    ratios = np.array(base_s) / np.array(own_s)
    drawn = np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def _psnr_db(made: Picture | None, due: Picture | None) -> float | None:
    """Of pictures in [-1, 1]; None for the baseline itself. The weights have seen nothing, so that
    this tells that the work is the same, not how good a picture is."""
    if made is None or due is None or made is due:
        return None
    error = float(np.mean((made.astype(np.float64) - due) ** 2))
    return round(float(10 * np.log10(4.0 / max(error, 1e-20))), 1)


def table(figures: Mapping[str, Any]) -> str:
    """The rows as text."""
    lines = [
        f"{'':<26}{'s a frame':>10}{'whole':>8}{'ratio':>7}  {'95 %':<14}{'MiB':>6}{'load s':>8}"
    ]
    for row in figures["rows"]:
        low, high = row["ratio_95"]
        peak = row["peak_mib"]
        whole = f"{row['frame_measured_s'][0]:.1f}" if row["frame_measured_s"] else "-"
        lines.append(
            f"{row['name']:<26}{row['frame_s']:>10.2f}{whole:>8}"
            f"{row['ratio']:>7.2f}  {f'{low:.2f} to {high:.2f}':<14}"
            f"{peak:>6.0f}{row['load_s']:>8.1f}"
        )
    share = figures["baseline_share_in_networks"]
    lines.append(f"the published loop spends {share:.1%} of its time inside its networks")
    return "\n".join(lines)


@contextmanager
def _networks(folder: Path | None, size: str) -> Iterator[Path]:
    """A folder with the networks, made where they are not there; without a name, for this run."""
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        chosen = folder or Path(temporary)
        chosen.mkdir(parents=True, exist_ok=True)
        begun_s = time.monotonic()
        with Contestant(peer_kinds.Maker, chosen, size) as maker:  # its memory is given back
            if maker.ask("make"):
                _tell(f"networks made in {time.monotonic() - begun_s:.0f} s")
        yield chosen


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """0, or 1 when the baseline is no baseline."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add: Callable[..., Any] = parser.add_argument
    add("--folder", type=Path, help="of the networks, kept; otherwise a temporary one, 2 GB")
    add("--network", choices=("full", "small"), default="full", help="small: a trial in a minute")
    add("--compile", action="store_true", help="torch.compile too: minutes, and 2 GB more")
    add("--threads", type=int, default=machine.cores())
    add("--minutes", type=float, default=MINUTES, help="fewer rounds where they do not fit")
    add("--json", action="store_true", help="one line of JSON at the end instead of the table")
    add("--out", type=Path, help="write the figures to this file")
    given = parser.parse_args(words)
    begun_s = time.monotonic()
    circumstances = {
        "date": machine.now(),
        "commit": machine.commit(),
        "command": "python -m benchmarks.peers",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "load_average": machine.load_average(),
        "threads": given.threads,
    }
    shipped = manifest_file.read(bundle_path())
    chosen = choose(bundle_path(), shipped, threads=given.threads)
    peers = peer_kinds.peers(chosen, given.threads, given.compile)
    with _networks(given.folder, given.network) as folder:
        rows = measure(peers, folder, begun_s + given.minutes * 60)
    choice = f"{chosen.backend} {chosen.precision}"
    figures = {
        **summary(rows, choice, NETWORKS[given.network]),
        **circumstances,
        "seconds": round(time.monotonic() - begun_s),
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(given.out, json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures) if given.json else table(figures))
    honest: bool = figures["baseline_share_in_networks"] >= NETWORKS_SHARE
    if not honest:
        _tell(f"FAILED: wanted {NETWORKS_SHARE:.0%} of the baseline's time inside its networks")
    return 0 if honest else 1


if __name__ == "__main__":
    sys.exit(main())
