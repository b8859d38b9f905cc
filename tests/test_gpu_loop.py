"""The loop on a GPU over real networks: each backend that runs there, the shipped bundle."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from diffusionact import manifest as manifest_file
from diffusionact.assets import bundle_path
from diffusionact.errors import BackendMissing, DiffusionActError
from diffusionact.image import to_tensor, to_uint8
from diffusionact.manifest import Manifest
from diffusionact.runtime import cuda
from diffusionact.runtime.component import BACKENDS, precisions
from diffusionact.runtime.graph import NOT_RECORDABLE, GraphLoop, open_graph_loop
from diffusionact.runtime.loop import open_loop

pytestmark = pytest.mark.gpu
# Mean difference of a picture from fp32 on the CPU, in [-1, 1]. Half precision is off by 1e-3 of a
# prediction (ENGINES section 2), which the steps carry on; fp32 differs by the order of sums.
ALLOWED = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 2e-2}
REPLAYS = 1000
STEPS = 4


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return manifest_file.read(bundle_path(), verify=False)


@pytest.fixture(params=["torch", "trt", "ort"])
def opened(request: pytest.FixtureRequest, manifest: Manifest) -> Callable[..., GraphLoop]:
    """Opens the bundle on the GPU with one backend, or skips saying why it does not run there."""
    backend: str = request.param
    if reason := cuda.why_not():
        pytest.skip(reason)
    try:
        module = importlib.import_module(BACKENDS[backend])
    except BackendMissing as error:
        pytest.skip(str(error))
    if reason := module.problem("cuda"):
        pytest.skip(reason)

    def make(precision: str = "auto", mode: Any = None) -> GraphLoop:
        known = precisions(module, "cuda")
        if precision not in ("auto", *known):
            pytest.skip(f"{backend} computes in {', '.join(known)}")
        device = cuda.Device()
        try:
            return open_graph_loop(
                bundle_path(), manifest, device,
                steps=STEPS, also=(2,), backend=backend, precision=precision, mode=mode,
            )  # fmt: skip
        except BackendMissing as error:  # of what it reads weights or engines with
            pytest.skip(str(error))
        except DiffusionActError as error:
            if backend == "trt" and "diffusionact build" in str(error):
                pytest.skip(str(error))  # no engine for this GPU
            raise

    make.backend = backend  # type: ignore[attr-defined]
    return make


def drawn(manifest: Manifest) -> tuple[Any, Any, Any]:
    """A portrait, a drawing and noise of the bundle's size."""
    rng = np.random.default_rng(5)
    side = manifest.image_size
    pictures = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    return pictures[0], pictures[1], rng.standard_normal((1, 3, side, side)).astype(np.float32)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_pictures_are_those_of_the_cpu(opened: Any, precision: str, manifest: Manifest) -> None:
    portrait, drawing, x_T = drawn(manifest)
    loop = opened(precision)
    reference = "ort" if importlib.util.find_spec("onnxruntime") else "torch"
    try:
        wanted = open_loop(
            bundle_path(), manifest, steps=STEPS, backend=reference, device="cpu", precision="fp32"
        )
    except BackendMissing as error:
        pytest.skip(f"no reference: {error}")
    z = wanted.encode(to_tensor(portrait), to_tensor(drawing)).copy()
    due = wanted.render(x_T, z).copy()
    seen = loop.render(x_T, loop.encode(to_tensor(portrait), to_tensor(drawing)).copy())
    assert np.abs(seen - due).mean() <= ALLOWED[precision]
    inverted = loop.invert(to_tensor(portrait), z)
    assert np.isfinite(inverted).all()


def test_replay_is_eager_to_the_bit(opened: Any, manifest: Manifest) -> None:
    if opened.backend in NOT_RECORDABLE:
        pytest.skip(f"{opened.backend} cannot be recorded")
    portrait, drawing, x_T = drawn(manifest)
    frames = {}
    for mode in ("eager", "step", "turbo"):
        loop = opened(mode=mode)
        assert loop.mode == mode, loop.why_eager
        loop.set_source(portrait, x_T)
        frames[mode] = loop.frame(drawing).copy()
        again = loop.frame(drawing)
        np.testing.assert_array_equal(again, frames[mode])
        z = loop.encode(to_tensor(portrait), to_tensor(drawing)).copy()
        np.testing.assert_array_equal(to_uint8(loop.render(x_T, z)), frames[mode])
    np.testing.assert_array_equal(frames["step"], frames["eager"])
    np.testing.assert_array_equal(frames["turbo"], frames["eager"])


def test_a_thousand_frames_allocate_nothing(opened: Any, manifest: Manifest) -> None:
    portrait, drawing, x_T = drawn(manifest)
    loop = opened()
    loop.set_source(portrait, x_T)
    first = loop.frame(drawing).copy()
    gc.collect()  # of former loops
    before = cuda.free_bytes()
    for _ in range(REPLAYS // (1 if loop.mode != "eager" else 10)):
        ticket = loop.submit(drawing)
    np.testing.assert_array_equal(loop.result(ticket), first)
    assert cuda.free_bytes() == before


def test_steps_change_and_come_back(opened: Any, manifest: Manifest) -> None:
    portrait, drawing, x_T = drawn(manifest)
    loop = opened()
    loop.set_source(portrait, x_T)
    four = loop.frame(drawing).copy()
    loop.set_steps(2)
    two = loop.frame(drawing).copy()
    loop.set_steps(STEPS)
    np.testing.assert_array_equal(loop.frame(drawing), four)
    assert (two != four).any()
