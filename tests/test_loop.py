from __future__ import annotations

import gzip
import importlib.util
import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact import manifest as manifest_file
from diffusionact import schedule
from diffusionact.errors import SettingsError
from diffusionact.manifest import Manifest, TensorSpec
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.loop import Loop, Pass, ddim_step, open_loop, runs

KINDS: tuple[schedule.Prediction, ...] = ("eps", "v", "x0")
Float32Array = npt.NDArray[np.float32]
# ONNX Runtime and NumPy add the toy networks' sums in another order; nine steps carry it on.
LOOP_ATOL = 2e-4
GOLDEN = Path(__file__).parent / "golden"
# What the published code itself moves by between two convolution back ends, times five.
GOLDEN_ATOL, GOLDEN_FLOW_ATOL, GOLDEN_MEAN = 2e-3, 2e-2, 1e-4


class Function:
    """A component made of a Python function: arrays by name -> outputs by name."""

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, tuple[int, ...]],
        compute: Callable[..., Mapping[str, Float32Array]],
    ) -> None:
        self.inputs = {name: TensorSpec(name, "float32", s) for name, s in inputs.items()}
        self.outputs = {name: TensorSpec(name, "float32", s) for name, s in outputs.items()}
        self._compute = compute
        self._bound: dict[str, Any] = {}

    def bind(self, **arrays: Any) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays)
        self._bound = arrays

    def run(self) -> None:
        made = self._compute(**{name: self._bound[name] for name in self.inputs})
        for name, array in made.items():
            self._bound[name][...] = array


def pictures(seed: int, side: int = 32) -> Float32Array:
    return np.random.default_rng(seed).standard_normal((1, 3, side, side)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [4, 50])
def test_the_step_in_place_is_the_equation_to_the_last_bit(
    kind: schedule.Prediction, steps: int
) -> None:
    table = schedule.alpha_bars()
    at = schedule.timesteps(steps)
    for make in (schedule.render_run, schedule.inversion_run):
        run = make(kind, at, table)
        for step in run.steps:
            x, prediction = pictures(1, 8), pictures(2, 8)
            levels = run.alpha_bar[step.row], run.alpha_bar_to[step.row]
            wanted = schedule.ddim_step(kind, x, prediction, *levels)
            ddim_step(x, prediction, np.empty_like(x), step)
            np.testing.assert_array_equal(x, wanted)


def toy_prediction(
    weights: Mapping[str, Any], x: npt.NDArray[np.float64], t: float, z: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The toy bundle's networks in float64 NumPy, written from their definition."""
    rows = weights["time"][0] * (t / 1000.0) + weights["time_bias"]
    factor = (z @ weights["code"])[0]
    padded = np.pad(x[0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    h = np.einsum("ocij,chwij->ohw", weights["first"], windows)
    scale, shift = rows[:4] * factor, rows[4:] * factor
    h = np.tanh(h * scale[:, None, None] + shift[:, None, None])
    return np.asarray(np.einsum("oc,chw->ohw", weights["last"][:, :, 0, 0], h)[None])


def toy_run(
    weights: Mapping[str, Any], x: Float32Array, z: Float32Array, run: schedule.Run
) -> npt.NDArray[np.float64]:
    moving: npt.NDArray[np.float64] = x.astype(np.float64)
    for step in run.steps:
        prediction = toy_prediction(
            weights, moving, float(run.timesteps[step.row]), z.astype(np.float64)
        )
        levels = run.alpha_bar[step.row], run.alpha_bar_to[step.row]
        moving = schedule.ddim_step(run.prediction, moving, prediction, *levels)
    return moving


@pytest.fixture
def manifest(toy_bundle: Path) -> Manifest:
    return manifest_file.read(toy_bundle)


@pytest.mark.parametrize("bundle", ["toy_bundle", "own_inversion_bundle"])
@pytest.mark.parametrize("steps", [None, 2, 3, (100, 350, 999)])
def test_a_bundle_renders_and_inverts_as_its_networks_say(
    bundle: str, steps: Any, request: pytest.FixtureRequest, toy_weights: dict[str, Any]
) -> None:
    folder: Path = request.getfixturevalue(bundle)
    manifest = manifest_file.read(folder)
    loop = open_loop(folder, manifest, steps=steps, threads=1)
    render, invert = runs(manifest, steps)
    x_0, x_T = np.clip(pictures(1), -1, 1), pictures(2)
    z = loop.encode(x_0, pictures(3)).copy()
    wanted_z = (x_0 + pictures(3)).reshape(1, -1) @ toy_weights["encode"]
    np.testing.assert_allclose(z, wanted_z, atol=1e-4)
    for _ in range(2):  # what a call leaves in the buffers must not reach the next
        seen = loop.invert(x_0, z)
        np.testing.assert_allclose(seen, toy_run(toy_weights, x_0, z, invert), atol=LOOP_ATOL)
        rendered = loop.render(x_T, z)
        wanted = toy_run(toy_weights, x_T, z, render)
        np.testing.assert_allclose(rendered, wanted, atol=LOOP_ATOL)
        assert np.abs(rendered).max() <= 1.0


def test_a_listed_count_takes_its_own_timesteps(manifest: Manifest) -> None:
    assert runs(manifest, 2)[0].timesteps.tolist() == [200, 700]
    assert runs(manifest)[0].timesteps.tolist() == [0, 250, 500, 750]
    assert runs(manifest)[1].timesteps.tolist() == [0, 200, 400, 600, 800]
    with pytest.raises(SettingsError, match="steps=37"):
        runs(manifest, 37)


def test_the_inverted_code_is_the_callers_own(toy_bundle: Path, manifest: Manifest) -> None:
    loop = open_loop(toy_bundle, manifest, threads=1)
    z = loop.encode(pictures(1), pictures(2))
    x_T = loop.invert(pictures(1), z)
    kept = x_T.copy()
    loop.render(pictures(3), z)
    np.testing.assert_array_equal(x_T, kept)


def test_rendering_the_same_twice_gives_the_same_bits(toy_bundle: Path, manifest: Manifest) -> None:
    loop = open_loop(toy_bundle, manifest, threads=1)
    z = loop.encode(pictures(1), pictures(2)).copy()
    first = loop.render(pictures(3), z).copy()
    loop.render(pictures(4), loop.encode(pictures(5), pictures(6)))
    np.testing.assert_array_equal(loop.render(pictures(3), z), first)


def test_a_frame_allocates_no_picture(toy_bundle: Path, manifest: Manifest) -> None:
    loop = open_loop(toy_bundle, manifest, threads=1)
    image, condition, x_T = pictures(1), pictures(2), pictures(3)
    loop.render(x_T, loop.encode(image, condition))
    tracemalloc.start()
    try:
        for _ in range(3):
            loop.render(x_T, loop.encode(image, condition))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < x_T.nbytes / 2  # a few small Python objects, no picture of 3 x 32 x 32


def test_directions_with_one_network_share_it_and_its_memory() -> None:
    calls: list[str] = []
    side, k = (1, 3, 4, 4), 2

    def step(name: str) -> Function:
        def compute(**arrays: Float32Array) -> Mapping[str, Float32Array]:
            calls.append(name)
            return {"prediction": arrays["x_t"] * arrays["scale"][0, 0] + arrays["shift"][0, 1]}

        shapes = {"x_t": side, "scale": (1, k), "shift": (1, k)}
        return Function(shapes, {"prediction": side}, compute)

    def direction(run: schedule.Run, network: Function) -> Pass:
        n = len(run.timesteps)
        rows = np.linspace(-1, 1, n * 2 * k, dtype=np.float32).reshape(n, 2 * k)
        modulation = Function(
            {"z": (1, 3), "time_rows": (n, 2 * k)},
            {"scale": (n, k), "shift": (n, k)},
            lambda z, time_rows: {
                "scale": time_rows[:, :k] * z.sum(),
                "shift": time_rows[:, k:] * z.sum(),
            },
        )
        return Pass(run, rows, modulation, network)

    table = schedule.alpha_bars()
    down = schedule.render_run("eps", schedule.timesteps(2), table)
    up = schedule.inversion_run("eps", schedule.timesteps(3), table)

    def encoder() -> Function:
        return Function(
            {"image": side, "condition": side},
            {"z": (1, 3)},
            lambda image, condition: {"z": (image - condition).mean(axis=(2, 3))},
        )

    one, two = step("one"), step("two")
    shared = Loop(encoder(), direction(down, one), direction(up, one))
    apart = Loop(encoder(), direction(down, step("down")), direction(up, two))
    results = []
    for loop in (shared, apart):
        z = loop.encode(pictures(1, 4), pictures(2, 4))
        x_T = loop.invert(np.clip(pictures(1, 4), -1, 1), z)
        results.append((x_T, loop.render(x_T, z).copy()))
    assert calls == ["one"] * 5 + ["two"] * 3 + ["down"] * 2
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def golden_rule() -> Any:
    spec = importlib.util.spec_from_file_location("golden_rule", GOLDEN / "rule.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden() -> tuple[Mapping[str, Any], Mapping[str, Float32Array]]:
    """The published results, every second pixel, and the inputs they were made from."""
    tables = json.loads(gzip.decompress((GOLDEN / "networks.json.gz").read_bytes()))["small"]
    inputs = {
        key: golden_rule().tensor(entry["name"], entry["shape"], entry["kind"])
        for key, entry in tables["inputs"].items()
    }
    return np.load(GOLDEN / "network_small.npz"), inputs


@pytest.fixture(scope="module")
def golden_loop() -> Loop:
    """The published networks in torch behind the loop: 10 steps each way, `model` renders and
    `ema_model` inverts."""
    import torch

    from diffusionact.training.models.config import NetworkConfig
    from diffusionact.training.models.encoder import ReenactmentEncoder
    from diffusionact.training.models.unet import UNet

    config = NetworkConfig(64, 32, (1, 2, 2), (1, 2, 2, 2), embed=64)
    keys = json.loads(gzip.decompress((GOLDEN / "networks.json.gz").read_bytes()))["small"]["keys"]

    def load(network: torch.nn.Module, prefix: str) -> Any:
        weights = golden_rule().part(keys, prefix)
        chosen = {n: torch.from_numpy(w) for n, w in weights.items() if "encoder." not in n}
        network.load_state_dict(chosen, strict=True)
        return network.eval()

    def function(
        call: Callable[..., Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Function:
        def compute(**arrays: Float32Array) -> Mapping[str, Float32Array]:
            with torch.no_grad():
                made = call(*(torch.from_numpy(array) for array in arrays.values()))
            parts = made if isinstance(made, tuple) else (made,)
            return {name: part.numpy() for name, part in zip(outputs, parts, strict=True)}

        return Function(inputs, outputs, compute)

    def direction(run: schedule.Run, prefix: str) -> Pass:
        network = load(UNet(config), prefix)
        with torch.no_grad():
            rows = network.time_rows(torch.from_numpy(run.timesteps)).numpy()
        n, k = len(rows), network.modulation_size
        modulation = function(
            network.modulation,
            {"z": (1, 64), "time_rows": rows.shape},
            {"scale": (n, k), "shift": (n, k)},
        )
        shapes = {"x_t": (1, 3, 64, 64), "scale": (1, k), "shift": (1, k)}
        step = function(network.step, shapes, {"prediction": (1, 3, 64, 64)})
        return Pass(run, rows, modulation, step)

    table, at = schedule.alpha_bars(), schedule.timesteps(10)
    encoder = load(ReenactmentEncoder(config), "state_dict_net/")
    picture = (1, 3, 64, 64)
    return Loop(
        function(encoder, {"image": picture, "condition": picture}, {"z": (1, 64)}),
        direction(schedule.render_run("eps", at, table), "state_dict_diff/model."),
        direction(schedule.inversion_run("eps", at, table), "state_dict_diff/ema_model."),
    )


def assert_golden(seen: Float32Array, wanted: Float32Array, atol: float = GOLDEN_ATOL) -> None:
    difference = np.abs(seen[0, :, ::2, ::2] - wanted)
    assert difference.max() <= atol and difference.mean() <= GOLDEN_MEAN


@pytest.mark.torch
@pytest.mark.parametrize("sample", [0, 1])
def test_the_loop_gives_the_published_results(sample: int, golden_loop: Loop, golden: Any) -> None:
    wanted, inputs = golden
    one = {name: array[sample : sample + 1] for name, array in inputs.items()}
    assert_golden(golden_loop.render(one["x_T"], one["z"]), wanted["render"][sample])
    inverted = golden_loop.invert(one["src_img"], one["z"])
    assert_golden(inverted, wanted["encode_stochastic_ema"][sample])


@pytest.mark.torch
def test_a_whole_reenactment_gives_the_published_result(golden_loop: Loop, golden: Any) -> None:
    wanted, inputs = golden
    one = {name: array[:1] for name, array in inputs.items()}
    x_T = golden_loop.invert(one["src_img"], golden_loop.encode(one["src_img"], one["stick_src"]))
    assert_golden(x_T, wanted["flow_xT"][0])
    frame = golden_loop.render(x_T, golden_loop.encode(one["src_img"], one["stick_tgt"]))
    assert_golden(frame, wanted["flow_out"][0], GOLDEN_FLOW_ATOL)


def test_steps_change_between_frames_and_nothing_else_does(
    toy_bundle: Path, manifest: Manifest
) -> None:
    loop = open_loop(toy_bundle, manifest, also=(2, 3, 4), threads=1)
    assert (loop.steps, loop.prepared) == (4, (2, 3, 4))
    x_T, z = pictures(2), loop.encode(pictures(1), pictures(3)).copy()
    for steps in (2, 4, 3, 2):
        loop.set_steps(steps)
        alone = open_loop(toy_bundle, manifest, steps=steps, threads=1)
        np.testing.assert_array_equal(loop.render(x_T, z), alone.render(x_T, z))
        np.testing.assert_array_equal(loop.invert(x_T, z), alone.invert(x_T, z))
        assert loop.steps == steps
    with pytest.raises(SettingsError, match="prepared are 2, 3, 4"):
        loop.set_steps(5)


def test_frames_at_once_are_those_one_at_a_time(toy_bundle: Path, manifest: Manifest) -> None:
    pytest.importorskip("openvino", reason="no openvino; make dev has it")
    frames = 3
    loop = open_loop(
        toy_bundle, manifest, also=(2,),
        backend="openvino", device="cpu", precision="fp32", threads=1, at_once=frames,
    )  # fmt: skip
    assert isinstance(loop, Loop)
    x_T = pictures(2)
    codes = np.concatenate([loop.encode(pictures(1), pictures(i)).copy() for i in range(frames)])
    with pytest.raises(SettingsError, match="open_together before"):
        loop.render_together(x_T, codes)
    loop.open_together()
    for steps in (4, 2, 4):
        loop.set_steps(steps)
        seen = loop.render_together(x_T, codes).copy()
        for i in range(frames):
            alone = loop.render(x_T, codes[i : i + 1])
            np.testing.assert_allclose(seen[i], alone[0], atol=LOOP_ATOL)
        assert np.abs(seen[0] - seen[1]).max() > 10 * LOOP_ATOL


def test_a_loop_of_single_frames_refuses_several(toy_bundle: Path, manifest: Manifest) -> None:
    loop = open_loop(toy_bundle, manifest, threads=1)
    assert isinstance(loop, Loop)
    with pytest.raises(SettingsError, match="one frame at a time"):
        loop.open_together()


def test_changing_steps_allocates_nothing(toy_bundle: Path, manifest: Manifest) -> None:
    loop = open_loop(toy_bundle, manifest, also=(2,), threads=1)
    x_T, z = pictures(2), loop.encode(pictures(1), pictures(3)).copy()
    buffers = []
    for steps in (2, 4):
        loop.set_steps(steps)
        buffers.append(loop.render(x_T, z).ctypes.data)
    assert buffers[0] == buffers[1]  # the one step network's own
