"""PyTorch, the reference: the networks as they were trained, on the CPU and on CUDA.

The one file of the runtime that imports torch, loaded by `open_component(backend="torch")` only.
The weights are those that the bundle's graphs hold by name; what runs is not the graphs but the
networks of training with these weights in them.

In half precision, the convolutions and what only moves or adds up their results are fp16 or bf16,
stored channels last; group norms, softmax and the modulation rows stay fp32, as the networks say.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from diffusionact import manifest as manifest_file
from diffusionact.errors import BackendMissing, BundleError, DeviceError
from diffusionact.manifest import Manifest, TensorSpec
from diffusionact.runtime.component import Array, check_bound

try:
    import torch
    from torch import Tensor, nn

    from diffusionact.training.models import ReenactmentEncoder, UNet
except ImportError as error:
    raise BackendMissing(
        f"backend 'torch' needs PyTorch ({error}); run: pip install 'diffusionact[torch]'"
    ) from error

Function: TypeAlias = Callable[..., "Tensor | tuple[Tensor, ...]"]

PARTS = {"encoder": "reenactment", "": "render", "_invert": "invert"}
# Of torch.compile. On CUDA whoever wants a graph captures it around more than one network; on a CPU
# the search takes many minutes.
COMPILE_MODES = {"cuda": "max-autotune-no-cudagraphs", "cpu": "default"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def problem(device: str) -> str | None:
    """Return why PyTorch does not run on a device here and what to do, or None if it does."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    built = torch.version.cuda
    if built is None:
        what = f"PyTorch {torch.__version__} was built without CUDA"
        return f"{what}; install one with it: https://pytorch.org/get-started/locally"
    what = f"PyTorch {torch.__version__} (CUDA {built}) finds no GPU"
    return f"{what}; see what `nvidia-smi` says, and `diffusionact check`"


def cannot_run(bundle_dir: Path, manifest: Manifest, precision: str) -> str | None:
    """Return why PyTorch cannot take the weights of a bundle, or None if it can."""
    if importlib.util.find_spec("safetensors") is None:
        return "no safetensors to read the weights with; run: pip install 'diffusionact[torch]'"
    if not manifest.network:
        return (
            f"{bundle_dir} was exported before manifests stated the network's sizes; "
            "export it again: diffusionact export WEIGHTS -o BUNDLE"
        )
    return None


# "auto" is the first. On CUDA half precision is the fast one; on a CPU fp32 is the reference.
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu", "cuda")
PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32", "bf16"),
    "cuda": ("fp16", "bf16", "fp32"),
}


class TorchComponent:
    """One network over bound memory: NumPy's on the CPU, a DeviceArray's on CUDA."""

    def __init__(
        self,
        function: Function,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        lane: _Lane,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._function = function
        self._lane = lane
        self._arrays: Mapping[str, Array] = {}
        self._given: tuple[Tensor, ...] = ()
        self._wanted: tuple[Tensor, ...] = ()

    def bind(self, **arrays: Array) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays, self._lane.device)
        self._arrays = arrays  # kept alive: the tensors hold bare addresses
        tensors = {name: self._lane.tensor(array) for name, array in arrays.items()}
        self._given = tuple(tensors[name] for name in self.inputs)
        self._wanted = tuple(tensors[name] for name in self.outputs)

    def run(self) -> None:
        with torch.no_grad(), self._lane():
            made = self._function(*self._given)
            answers = made if isinstance(made, tuple) else (made,)
            for wanted, answer in zip(self._wanted, answers, strict=True):
                wanted.copy_(answer)  # to fp32 and NCHW in one pass


class _Lane:
    """Where a component runs: the CPU, or one stream of the GPU with memory of its own.

    Memory of its own, because a captured graph goes on using what PyTorch's allocator has taken
    back: nothing else may be given it.
    """

    def __init__(self, device: str, stream: int | None) -> None:
        self.device = device
        if device == "cuda":
            cuda: Any = torch.cuda  # its classes are without types
            self._stream = cuda.ExternalStream(stream) if stream else cuda.Stream()
            # The weights came there on the default stream, for which ours does not wait by itself.
            self._stream.wait_stream(cuda.current_stream())
            self._pool = cuda.MemPool()

    def tensor(self, array: Array) -> Tensor:
        """Return the same memory as a tensor."""
        if self.device == "cpu":
            return torch.from_numpy(array)
        return torch.as_tensor(array, device="cuda")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.device == "cpu":
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.stream(self._stream))
            stack.enter_context(torch.cuda.use_mem_pool(self._pool))
            # fp32 is to be fp32, and convolutions of fixed shapes are worth a search.
            flags: Any = torch.backends.cudnn.flags
            stack.enter_context(flags(enabled=True, benchmark=True, allow_tf32=False))
            yield


def open_model(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    device: str,
    threads: int,
    precision: str,
    stream: int | None = None,
) -> TorchComponent:
    """Return the network that an .onnx file of a bundle was exported from, held to its specs.

    threads: of this process's PyTorch, for all that it computes; 0 leaves them as they are;
    stream: the handle of the CUDA stream to run on, None makes one.

    Raises: BackendMissing without safetensors; DeviceError without a usable GPU; BundleError when
    the bundle does not hold its weights, or they are not the network that the specs describe.
    """
    if found := problem(device):
        raise DeviceError(found)
    if threads:
        torch.set_num_threads(threads)
    manifest = manifest_file.read(path.parent, verify=False)
    name = _component(path, manifest)
    part = PARTS["encoder"] if name == "encoder" else PARTS[_suffix(name)]
    network = _load(path.parent, part)
    _check(path, name, manifest, (inputs, outputs))
    return component_of(
        name, network, (inputs, outputs), device=device, precision=precision, stream=stream
    )


def component_of(
    name: str,
    network: nn.Module,
    specs: tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]],
    *,
    device: str,
    precision: str,
    stream: int | None = None,
    compiled: bool = False,
) -> TorchComponent:
    """Return a component of a network that is at hand, which is the component's from now on.

    compiled: by torch.compile at the first run, which takes minutes for a large network.
    """
    function = _function(name, network, _Form(device, _TYPES[precision]))
    if compiled:
        function = torch.compile(
            function, mode=COMPILE_MODES[device], fullgraph=True, dynamic=False
        )
    return TorchComponent(function, *specs, _Lane(device, stream))


def _load(bundle_dir: Path, part: str) -> nn.Module:
    try:
        from diffusionact.training import weights
    except ImportError as error:
        raise BackendMissing(
            f"backend 'torch' reads weights with safetensors ({error}); "
            "run: pip install 'diffusionact[torch]'"
        ) from error
    return weights.load(bundle_dir).network(part)


def _component(path: Path, manifest: Manifest) -> str:
    """The name of the component whose file this is."""
    for name, part in manifest.components.items():
        if part.file == path.name:
            return name
    raise BundleError(
        f"{path}: backend 'torch' runs the networks of diffusion, and this is none of them; "
        "open it with backend 'ort'"
    )


def _suffix(name: str) -> str:
    return "_invert" if name.endswith("_invert") else ""


def _check(
    path: Path,
    name: str,
    manifest: Manifest,
    given: tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]],
) -> None:
    """Nothing; the specs, sizes fixed, are those of the component."""
    due = manifest_file.component_tensors(manifest)[name.removesuffix("_invert")]
    for seen, wanted in zip(given, due, strict=True):
        told = [(s.name, s.dtype, s.shape) for s in seen.values()]
        known = [(s.name, s.dtype, s.shape) for s in wanted]
        fits = len(told) == len(known) and all(
            (a[:2], len(a[2])) == (b[:2], len(b[2]))
            and all(n in (m, "N") for m, n in zip(a[2], b[2], strict=True))
            for a, b in zip(told, known, strict=True)
        )
        if not fits:
            raise BundleError(
                f"{path}: the network has {known}; the manifest says {told}. "
                "Export the bundle again: diffusionact export WEIGHTS -o BUNDLE"
            )


@dataclass(frozen=True)
class _Form:
    """How the tensors of a network lie: where, in which type, and pictures channels last or not."""

    device: str
    dtype: torch.dtype  # of convolutions; all else is fp32

    @property
    def layout(self) -> torch.memory_format:
        plain = self.device == "cpu" and self.dtype == torch.float32
        return torch.contiguous_format if plain else torch.channels_last

    def picture(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=self.layout)


def _function(name: str, network: nn.Module, form: _Form) -> Function:
    """What a component computes from its inputs, in order."""
    kind = name.removesuffix("_invert")
    _place(network, form, unused=_CONVOLUTIONS if kind in ("time", "modulation") else (nn.Linear,))
    if kind == "encoder":
        encoder = cast(ReenactmentEncoder, network)
        return lambda image, condition: encoder(form.picture(image), form.picture(condition))
    unet = cast(UNet, network)
    if kind == "unet_step":
        return lambda x_t, scale, shift: unet.step(form.picture(x_t), scale, shift)
    return unet.time_rows if kind == "time" else unet.modulation


def _place(network: nn.Module, form: _Form, unused: tuple[type[nn.Module], ...]) -> None:
    """Nothing; the network is where it runs, without the layers that are not run."""
    for layer in network.modules():
        device = "meta" if isinstance(layer, unused) else form.device
        dtype = form.dtype if isinstance(layer, _CONVOLUTIONS) else torch.float32
        for key, value in layer.named_parameters(recurse=False):
            layout = form.layout if value.ndim == 4 else torch.contiguous_format
            placed = value.to(device, dtype, memory_format=layout)
            setattr(layer, key, nn.Parameter(placed, requires_grad=False))
