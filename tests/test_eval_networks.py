"""Metric networks: rule-made ones of the published interface, and the judge that ships."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.assets import judge_path
from diffusionact.commands.eval.instruments import open_network, published_networks
from diffusionact.errors import BundleError, MediaError
from diffusionact.evaluation.judge import RenderedJudge, judge_tensors
from diffusionact.evaluation.networks import ARCFACE_POINTS, arcface_crop, find_networks
from diffusionact.evaluation.reading import Reading

# int8 weights move a landmark by hundredths of a pixel; the judge's own error is about one.
JUDGE_ROUNDING_PX = 0.1
JUDGE_ROUNDING_DEG = 0.2


def write_model(path: Path, inputs: dict[str, list[int]], output: tuple[str, list[int]]) -> None:
    """A network by rule. Two pictures: the mean square of their difference; one: the mean of its
    quarters, each colour."""
    onnx = pytest.importorskip("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    names = list(inputs)
    if len(names) == 2:
        nodes = [
            helper.make_node("Sub", names, ["d"]),
            helper.make_node("Mul", ["d", "d"], ["square"]),
            helper.make_node("GlobalAveragePool", ["square"], ["pooled"]),
            helper.make_node("ReduceMean", ["pooled"], [output[0]], keepdims=1, axes=[1]),
        ]
    else:
        half = inputs[names[0]][2] // 2
        nodes = [
            helper.make_node(
                "AveragePool", names, ["pooled"], kernel_shape=[half, half], strides=[half, half]
            ),
            helper.make_node("Flatten", ["pooled"], [output[0]]),
        ]
    graph = helper.make_graph(
        nodes,
        "rule",
        [helper.make_tensor_value_info(n, float32, shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info(output[0], float32, output[1])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, path)


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    picture = [1, 3, 256, 256]
    write_model(tmp_path / "lpips.onnx", {"a": picture, "b": picture}, ("distance", [1, 1, 1, 1]))
    write_model(tmp_path / "mine.onnx", {"in": [1, 3, 112, 112]}, ("out", [1, 12]))
    changes = {"file": "mine.onnx", "inputs": ["in"], "output": "out", "output_shape": [1, 12]}
    (tmp_path / "networks.json").write_text(json.dumps({"arcface": changes}))
    return tmp_path


def upright_face() -> Reading:
    """A face whose five points are where ArcFace wants them."""
    points = np.random.default_rng(0).uniform(20, 90, (68, 2))
    points[36:42], points[42:48] = ARCFACE_POINTS[0], ARCFACE_POINTS[1]
    points[[30, 48, 54]] = ARCFACE_POINTS[2:]
    return Reading(points, points[[36, 42]], np.zeros(3))


def test_lpips_is_fed_and_read_as_documented(networks: Path) -> None:
    distance = published_networks(networks).lpips
    assert distance is not None
    black = np.zeros((64, 48, 3), np.uint8)
    assert distance(black, black) == 0
    # 0..255 becomes -1..1, so that 51 levels are 0.4; float32 sums of 65536 values
    assert distance(black, black + 51) == pytest.approx(0.16, rel=1e-3)


def test_arcface_is_fed_the_aligned_face_in_rgb(networks: Path) -> None:
    embed = published_networks(networks).embed
    assert embed is not None
    blue = np.zeros((112, 112, 3), np.uint8)
    blue[..., 0] = 255
    embedding = embed(blue, upright_face())
    np.testing.assert_allclose(embedding.reshape(3, 4), [[-1] * 4, [-1] * 4, [1] * 4], atol=1e-6)


def test_arcface_crop_undoes_a_turn() -> None:
    rng = np.random.default_rng(1)
    image = cv2.GaussianBlur(rng.integers(0, 256, (112, 112, 3)).astype(np.uint8), (0, 0), 4)
    np.testing.assert_array_equal(arcface_crop(image, upright_face()), image)
    turn = cv2.getRotationMatrix2D((56, 56), 20, 1.5)
    turn[:, 2] += 70
    turned = cv2.warpAffine(image, turn, (300, 300))
    face = upright_face()
    moved = Reading(face.points @ turn[:, :2].T + turn[:, 2], face.gaze, face.pose)
    again = arcface_crop(np.asarray(turned, np.uint8), moved)
    inner = slice(30, 82)
    assert np.abs(again[inner, inner].astype(float) - image[inner, inner]).mean() < 1.0


def test_what_was_used_is_noted_with_its_hash(networks: Path) -> None:
    made = published_networks(networks)
    assert set(made.described) == {"lpips", "arcface"}
    assert "mine.onnx sha256 " in made.described["arcface"]


def test_what_is_absent_has_a_reason(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        made = published_networks(folder)
        assert made.lpips is None and made.embed is None
        assert {"lpips", "csim", "tl_id", "tg_id"} <= set(made.absent)
        assert "--networks" in made.absent["lpips"]


def test_another_file_than_the_described_one_is_refused(networks: Path) -> None:
    (networks / "networks.json").write_text(json.dumps({"lpips": {"sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="another file"):
        find_networks(networks)
    (networks / "networks.json").write_text(json.dumps({"vgg": {}}))
    with pytest.raises(MediaError, match="vgg"):
        find_networks(networks)
    (networks / "networks.json").write_text(json.dumps({"lpips": {"inputs": 3}}))
    with pytest.raises(MediaError, match="inputs is int, wanted list"):
        find_networks(networks)


def shipped_judge() -> RenderedJudge:
    inputs, outputs = judge_tensors()
    specs = [{spec.name: spec for spec in side} for side in (inputs, outputs)]
    return RenderedJudge(open_network(judge_path(), *specs))


def rendered(count: int, size: int = 128) -> list[npt.NDArray[np.uint8]]:
    faces = pytest.importorskip("diffusionact.training.faces", exc_type=ImportError)
    rng = np.random.default_rng(5)
    people = [
        (faces.sample_identity(rng), faces.sample_motion(rng), faces.sample_camera(rng))
        for _ in range(count)
    ]
    return [np.ascontiguousarray(faces.render(*who, size).image[..., ::-1]) for who in people]


@pytest.mark.torch
def test_the_shipped_judge_reads_as_the_trained_one() -> None:
    from diffusionact.training.models.judge import load_judge

    weights = Path(__file__).parents[1] / "training" / "checkpoints" / "judge.safetensors"
    pictures = rendered(8)
    wanted = load_judge(weights)[0].read(np.stack([p[..., ::-1] for p in pictures]))
    for i, picture in enumerate(pictures):
        seen = shipped_judge().read(picture)
        moved = np.linalg.norm(seen.points - wanted.points[i], axis=-1)
        assert moved.mean() < JUDGE_ROUNDING_PX
        assert np.abs(seen.gaze - wanted.gaze[i]).max() < 5 * JUDGE_ROUNDING_PX
        assert np.abs(seen.pose - wanted.pose[i]).max() < JUDGE_ROUNDING_DEG


def test_the_judge_reads_larger_pictures_in_their_own_pixels() -> None:
    small, large = rendered(1)[0], rendered(1, 256)[0]
    a, b = shipped_judge().read(small), shipped_judge().read(large)
    assert np.abs((a.points + 0.5) * 2 - 0.5 - b.points).mean() < 1.0


def test_the_perceptual_distance_grows_with_damage_and_with_another_person() -> None:
    judge, (first, other) = shipped_judge(), rendered(2)
    soft, softer = (cv2.GaussianBlur(first, (0, 0), sigma) for sigma in (1.0, 2.5))
    values = [judge.distance(first, p) for p in (first, soft, softer, other)]
    assert values[0] == 0 and values == sorted(values)
    assert values[3] > 2 * values[2]
    assert judge.distance(other, first) == pytest.approx(values[3])


@pytest.mark.slow
@pytest.mark.torch
def test_the_shipped_judge_is_what_the_export_makes(tmp_path: Path) -> None:
    from diffusionact.export.judge import export_judge
    from diffusionact.training.models.judge import load_judge

    weights = Path(__file__).parents[1] / "training" / "checkpoints" / "judge.safetensors"
    export_judge(load_judge(weights)[0], tmp_path / "judge.onnx")
    inputs, outputs = ({spec.name: spec for spec in side} for side in judge_tensors())
    again = RenderedJudge(open_network(tmp_path / "judge.onnx", inputs, outputs))
    for picture in rendered(2):
        a, b = again.read(picture), shipped_judge().read(picture)
        np.testing.assert_array_equal(a.points, b.points)
        assert again.distance(picture, picture[:, ::-1].copy()) > 0.1
