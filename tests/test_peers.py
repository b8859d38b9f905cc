"""The peers' figures: ratios of rounds, what is told of each, and the whole way with a small network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import peer_kinds, peers  # noqa: E402
from diffusionact.runtime.choice import Choice  # noqa: E402
from diffusionact.runtime.contest import Contestant  # noqa: E402

pytestmark = pytest.mark.torch

FLOAT32_DB, BFLOAT16_DB = 60.0, 20.0  # whole frames of the small network; measured: 126 and 30


def row(name: str, encode_s: list[float], piece_s: list[float], level: float = 0.0) -> peers.Row:
    peer = peer_kinds.Peer(name, "in words", "torch", 1, {})
    picture = np.full((1, 3, 4, 4), level, np.float32)
    facts = {"peak_mib": 100.0, "share_in_networks": 0.97}
    return peers.Row(peer, 1.0, encode_s, piece_s, [9.0], facts, picture)


def test_a_frame_is_one_encoder_pass_and_twenty_steps() -> None:
    made = row("a", [1.0, 3.0], [0.2, 0.4])
    assert made.rounds_s == pytest.approx([3.0, 7.0])
    assert made.frame_s == pytest.approx(2.0 + 10 * 0.3)


def test_pieces_of_another_size_make_the_same_frame() -> None:
    peer = peer_kinds.Peer("whole", "", "ours", 1, {}, piece=peer_kinds.STEPS)
    assert peers.Row(peer, 1.0, [1.0], [5.0], [], {}).frame_s == pytest.approx(6.0)


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is ten times slower in a round slows both, and changes no ratio."""
    ratio, low, high = peers.paired_ratio([4.0, 40.0, 4.4], [1.0, 10.0, 1.1])
    assert (ratio, low, high) == pytest.approx((4.0, 4.0, 4.0))
    ratio, low, high = peers.paired_ratio([4.0, 5.0, 6.0, 5.0, 5.0], [1.0] * 5)
    assert ratio == 5.0 and 4.0 <= low < 5.0 < high <= 6.0


def test_the_summary_holds_what_is_asked_of_it() -> None:
    rows = [row(peers.BASELINE, [1.0], [1.0]), row(peers.DEFAULT, [0.2], [0.2], level=0.2)]
    told = json.loads(json.dumps(peers.summary(rows, "openvino bf16", "ffhq256")))
    assert told["ratio_default_to_published"] == 5.0
    assert told["baseline_share_in_networks"] == 0.97 and told["default"] == "openvino bf16"
    base, ours = told["rows"]
    assert base["psnr_to_published_db"] is None and base["ratio_95"] == [1.0, 1.0]
    assert ours["psnr_to_published_db"] == pytest.approx(20.0, abs=0.1)
    assert ours["step_ms"]["p50_ms"] == pytest.approx(100.0) and ours["frame_s"] == 2.2
    text = peers.table(told)
    assert "ours" in text and "5.00" in text and "97.0%" in text


def test_the_default_is_a_row_and_only_openvino_reuses() -> None:
    ov, ort = (peer_kinds.peers(Choice(name, "fp32"), 1, False) for name in ("openvino", "ort"))
    assert ov[0].name == ort[0].name == peers.BASELINE
    assert [p.name for p in ov if p.name == peers.DEFAULT] == [peers.DEFAULT]
    assert "ours, reuse" in [p.name for p in ov] and "ours, reuse" not in [p.name for p in ort]
    assert ov[-1].piece == peer_kinds.STEPS
    assert [p.name for p in peer_kinds.peers(Choice("ort", "fp32"), 1, True)][-1] == "torch.compile"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_peers_do_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--network", "small", "--folder", str(tmp_path), "--threads", "1", "--minutes", "9"]
    status = peers.main([*words, "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == (0 if told["baseline_share_in_networks"] >= peers.NETWORKS_SHARE else 1)
    assert told["ratio_default_to_published"] > 1.0
    for one in told["rows"][1:]:
        exact = one["name"] == "ONNX Runtime" or one["name"].endswith("fp32")
        assert one["psnr_to_published_db"] > (FLOAT32_DB if exact else BFLOAT16_DB), one["name"]
        assert one["peak_mib"] > 50 and one["load_s"] > 0 and len(one["frame_measured_s"]) == 1
    with Contestant(peer_kinds.Maker, tmp_path) as maker:
        assert maker.ask("make") is False, "they are there"
