"""PyTorch's networks on a GPU's stream: what is called there, in which order. No GPU is needed: the
classes of torch.cuda are exchanged for ones that write down what is asked of them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusionact import bundle_path
from diffusionact import manifest as manifest_file
from diffusionact.errors import DeviceError
from diffusionact.runtime import cuda, gpu_choice

torch = pytest.importorskip("torch", reason="no PyTorch; make dev installs it")
backend = pytest.importorskip("diffusionact.runtime.torch", reason="no safetensors")

pytestmark = pytest.mark.torch
HANDLE = 0x57


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, in order."""
    seen: list[str] = []

    class Stream:
        def __init__(self, handle: int = 0) -> None:
            seen.append(f"stream {handle}")

        def wait_stream(self, other: str) -> None:
            seen.append(f"wait for {other}")

    @contextlib.contextmanager
    def entered(what: object) -> Iterator[None]:
        seen.append(f"enter {type(what).__name__ if not isinstance(what, str) else what}")
        yield
        seen.append("leave")

    class MemPool: ...

    for name, value in {
        "ExternalStream": Stream, "MemPool": MemPool, "stream": entered, "use_mem_pool": entered,
        "current_stream": lambda: "the default stream",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_the_stream_waits_for_the_weights(calls: list[str]) -> None:
    """They were sent on PyTorch's own stream, which a non-blocking one does not wait for."""
    backend._Lane("cuda", HANDLE)
    assert calls == [f"stream {HANDLE}", "wait for the default stream"]


def test_a_run_is_on_the_stream_in_memory_of_its_own(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def double(x: Any) -> Any:
        cudnn = torch.backends.cudnn
        calls.append(f"run, benchmark {cudnn.benchmark}, tf32 {cudnn.allow_tf32}")
        assert not torch.is_grad_enabled()
        return 2 * x

    specs: Any = ({"x": None}, {"y": None})
    part = backend.TorchComponent(double, *specs, backend._Lane("cuda", HANDLE))
    monkeypatch.setattr(backend, "check_bound", lambda *_: None)
    monkeypatch.setattr(backend._Lane, "tensor", lambda self, array: torch.from_numpy(array))
    x, y = np.arange(3.0), np.zeros(3)
    part.bind(x=x, y=y)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    calls.clear()
    part.run()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == before
    assert calls == [
        "enter Stream", "enter MemPool", "run, benchmark True, tf32 False", "leave", "leave",
    ]  # fmt: skip
    np.testing.assert_array_equal(y, 2 * x)


def test_a_bundle_brings_its_weights_to_the_gpu_and_an_old_one_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual machine with a GPU: PyTorch for CUDA is there, the bundle is that of the wheel."""
    bundle = Path(shutil.copytree(bundle_path(), tmp_path / "face.bundle"))
    told = manifest_file.read(bundle, verify=False)
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    monkeypatch.setattr(backend, "problem", lambda device: None)
    monkeypatch.setattr(gpu_choice, "ORDER", ("torch", "torch"))
    here = gpu_choice.gpu_backend(bundle, told, "auto", asked=False)
    assert here == "torch", "a bundle holds its weights"
    foreign = dataclasses.replace(told, network={})
    assert gpu_choice.gpu_backend(bundle, foreign, "auto", asked=False) is None
    with pytest.raises(DeviceError, match=r"torch: .* before manifests .* diffusionact export"):
        gpu_choice.gpu_backend(bundle, foreign, "auto", asked=True)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "safetensors" in str(backend.cannot_run(bundle, told, "fp16"))


def test_pytorch_has_these_names() -> None:
    """As the installed version declares them; its CPU build has them all."""
    cuda: Any = torch.cuda
    assert {"stream_ptr"} <= set(inspect.signature(cuda.ExternalStream.__new__).parameters)
    assert list(inspect.signature(cuda.use_mem_pool).parameters)[0] == "pool"
    assert callable(cuda.Stream.wait_stream) and inspect.isclass(cuda.MemPool)
    flags = inspect.signature(torch.backends.cudnn.flags).parameters
    assert {"enabled", "benchmark", "allow_tf32"} <= set(flags)
