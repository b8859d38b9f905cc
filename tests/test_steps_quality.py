"""Steps against quality: what is generated, what a student gives up, and how it is told."""

from __future__ import annotations

import math
import xml.etree.ElementTree
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from benchmarks import model_card, steps_quality, steps_text
from diffusionact.condition import draw_condition
from diffusionact.errors import MediaError
from diffusionact.export.bundle import FACE128_CARD
from diffusionact.landmarks import Landmarks
from diffusionact.training.judges import Truth

pytestmark = pytest.mark.torch
SIDE = 32


class DrawingIsTheCode(nn.Module):
    """As z the drawing, so that a picture shows which drawing it was made under."""

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        return condition.flatten(1)


class PaintsTheCode(nn.Module):
    """As x_0 the code, dimmed by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        self.asked.append(int(t[0]))
        return z.reshape(x.shape) * (1 - t.float() / 1000)[:, None, None, None]


def pairs(face: Landmarks) -> model_card.Pairs:
    """Two people, whose targets are moved by two pixels."""
    moved = face.transformed(np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    truth = Truth(images, np.zeros((2, 68, 2)), np.zeros((2, 2, 2)), np.zeros((2, 3)))
    return model_card.Pairs(truth, truth, [face, face], [moved, moved])


def test_every_solver_and_count_renders_under_the_targets_drawing(face: Landmarks) -> None:
    unet, inverter, given = PaintsTheCode(), PaintsTheCode(), pairs(face)
    model = steps_quality.Model(
        unet, inverter, DrawingIsTheCode(), "x0", (200, 600), {1: (0,), 2: (0, 500)},
        ("ddim", "unipc"),
    )  # fmt: skip
    made = steps_quality.generate("teacher", model, given, batch=1)
    assert set(made) == {f"teacher {s} {n}" for s in ("ddim", "unipc") for n in (1, 2)}
    due = draw_condition(given.target_landmarks[0], SIDE, FACE128_CARD.drawing)
    for images in made.values():  # the last step, at t = 0, ends at its prediction
        assert np.abs(images.astype(int) - due).max() <= 1
    assert inverter.asked == [200, 600] * 2
    assert unet.asked == [0, 500, 0, 0, 500, 0] * 2


def test_detail_is_the_energy_of_fine_structure() -> None:
    grid = np.indices((SIDE, SIDE)).sum(axis=0) % 2
    fine = np.repeat((64 + 64 * grid)[..., None], 3, axis=2).astype(np.uint8)
    assert steps_quality.detail(fine) == pytest.approx((8 * 32) ** 2), "a checkerboard of +-32"
    assert steps_quality.detail(np.full_like(fine, 90)) == 0.0
    half = (fine // 2).astype(np.uint8)
    assert steps_quality.detail(half) == pytest.approx(steps_quality.detail(fine) / 4)


def test_a_share_is_of_the_gap_from_copying_to_the_teacher() -> None:
    table = {
        "copy": {"psnr_db": np.array([10.0, 12.0]), "pose_deg": np.array([9.0, 11.0])},
        "teacher": {"psnr_db": np.array([20.0, 22.0]), "pose_deg": np.array([1.0, 3.0])},
        "student": {"psnr_db": np.array([19.0, 22.0]), "pose_deg": np.array([2.6, 3.0])},
    }
    lost = steps_quality.given_up(table, "teacher", "student")
    assert lost["psnr_db"]["share"] == pytest.approx(0.05), "half a dB of ten"
    assert lost["psnr_db"]["share_error"] == pytest.approx(0.05), "1 and 0: half of their spread"
    assert lost["pose_deg"]["share"] == pytest.approx(0.1)
    assert lost["pose_deg"]["worse_by"] == pytest.approx(0.8)


def test_where_copying_is_no_worse_there_is_no_gap() -> None:
    table = {
        "copy": {"identity": np.array([0.9, 0.9]), "detail": np.array([1.0, 1.0])},
        "teacher": {"identity": np.array([0.8, 0.8]), "detail": np.array([0.5, 0.5])},
        "student": {"identity": np.array([0.7, np.nan]), "detail": np.array([2.0, 2.0])},
    }
    lost = steps_quality.given_up(table, "teacher", "student")
    assert lost["identity"]["share"] is None
    assert lost["identity"]["worse_by"] == pytest.approx(0.1), "of the one who is known"
    assert lost["detail"]["worse_by"] == pytest.approx(0.0), "twice as much is as far as half"


def results(share: float) -> dict[str, Any]:
    """Of a measurement with a teacher at two counts and a student at one."""
    measures = dict.fromkeys(steps_text.COLUMNS, 1.5)
    entry = {"share": share, "share_error": 0.004, "worse_by": 0.1, "worse_by_error": 0.01}
    no_gap = {"share": None, "share_error": None, "worse_by": 0.1, "worse_by_error": None}
    lost = dict.fromkeys(steps_text.COLUMNS, entry) | {"identity": no_gap}
    rows = ("copy", "teacher ddim 4", "teacher ddim 20", "teacher unipc 4", "student ddim 4")
    return {
        "date": "2026-11-23T01:00:00+00:00", "commit": "abc", "machine": {"cpu": "x", "cores": 2},
        "load_average": 0.1, "people": 2, "seed": 1, "precision": "float32",
        "teacher_sha256": "ab" * 32, "mean": {row: {**measures, "psnr_db": 20.0 + i}
                                              for i, row in enumerate(rows)},
        "given_up": {"4": lost}, "goals": {"4": 0.03, "2": 0.06},
        "timesteps": {who: {"invert": [1, 2], "render": {}} for who in ("teacher", "student")},
        "speed": {
            "teacher": {"backend": "ort", "precision": "fp32", "invert_ms": 200.0,
                        "frame_ms": {"4": 10.0, "20": 50.0}},
            "student": {"backend": "ort", "precision": "fp32", "invert_ms": 20.0,
                        "frame_ms": {"4": 10.0}},
        },
    }  # fmt: skip


def test_the_table_has_a_row_for_each_and_judges_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_text.machine, "describe_briefly", lambda _: "a machine")
    told = steps_text.text(results(0.02))
    assert "| teacher, DDIM | 20 | 22.00 |" in told and "| 50.0 |" in told
    assert "| student | 4 | 24.00 |" in told and "2.0% ± 0.4%" in told
    assert "no gap; worse by 0.100" in told and "All hold." in told
    missed = steps_text.failures(results(0.031))
    assert len(missed) == len(steps_text.COLUMNS) - 1 and missed[0] == "4 steps: PSNR"
    assert "Missed: 4 steps: PSNR" in steps_text.text(results(0.031))


def test_the_plot_has_a_dot_for_each_count() -> None:
    root = xml.etree.ElementTree.fromstring(steps_text.drawing(results(0.02)))
    dots = [e for e in root.iter() if e.get("class") == "ring"]
    assert len(dots) == 2 * 4
    places = [(float(e.get("cx", "nan")), float(e.get("cy", "nan"))) for e in dots]
    assert all(0 < x < 960 and 0 < y < 400 for x, y in places)
    one, two = places[0], places[1]
    assert one[0] < two[0] and one[1] > two[1], "later and, with more dB, higher"
    assert math.isclose(places[0][0], places[2][0]), "the same time"


def test_the_section_takes_its_place_in_the_page() -> None:
    page = steps_text.with_section("# Page\n", "first")
    assert steps_text.with_section(page, "second").count("second") == 1
    assert "first" not in steps_text.with_section(page, "second")
    with pytest.raises(MediaError, match="one of the marks"):
        steps_text.with_section(steps_text.BEGIN, "x")
