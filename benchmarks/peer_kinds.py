"""The peers of benchmarks.peers, each as a process opens it, and the networks that they share."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusionact import manifest as manifest_file
from diffusionact import schedule
from diffusionact.files import write_whole
from diffusionact.manifest import Sampling, Schedule, TensorSpec
from diffusionact.runtime.choice import Choice
from diffusionact.runtime.contest import peak_memory_mib
from diffusionact.runtime.loop import Approximation, open_loop
from tests.golden import rule

Picture = NDArray[np.float32]

STEPS, PIECE = 20, 2  # of a frame, and of one turn
TABLE = Path(__file__).parents[1] / "tests" / "golden" / "networks.json.gz"
BUNDLE, WHOLE = "full.bundle", "published.onnx"
WEIGHTS = {"encoder.pt": "state_dict_net/", "unet.pt": "state_dict_diff/model."}
MADE = "made.json"  # says which networks these are, and, when all is there, by which recipe
RECIPE = 1


@dataclass(frozen=True)
class Peer:
    """name: of the row; how: in words; kind: which class; options: of that class; piece: the steps
    of one turn, all of a frame's where they are not alike."""

    name: str
    how: str
    kind: str
    threads: int
    options: Mapping[str, Any]
    piece: int = PIECE


def peers(default: Choice, threads: int, compiled: bool) -> list[Peer]:
    """All peers, the baseline first."""
    found = [
        Peer("published loop", "PyTorch, eager, NCHW, float32", "torch", threads, {}),
        Peer(
            "torch bf16", "the same, channels_last, bfloat16 autocast", "torch", threads,
            {"lower": True},
        ),
        Peer("ONNX Runtime", "the published graph, its defaults", "onnxruntime", threads, {}),
        Peer("ours, ort fp32", "our bundle and loop", "ours", threads, {"backend": "ort"}),
        Peer(
            "ours", f"our default here: {default.backend} {default.precision}", "ours", threads,
            {"backend": default.backend, "precision": default.precision},
        ),
    ]  # fmt: skip
    if find_spec("openvino"):
        how = "the published graph, its defaults"
        found.insert(3, Peer("OpenVINO", how, "openvino", threads, {}))
    if default.backend == "openvino":  # the backend that can
        how = "the same, deep features reused in two steps of three: approximate, --approximate"
        options = {"backend": "openvino", "precision": default.precision, "approximate": "reuse"}
        found.append(Peer("ours, reuse", how, "ours", threads, options, piece=STEPS))
    if compiled:
        how = "torch bf16 through torch.compile"
        options = {"lower": True, "compiled": True}
        found.append(Peer("torch.compile", how, "torch", threads, options))
    return found


def open_peer(peer: Peer, folder: Path) -> Any:
    """The peer over the networks in the folder, loaded; for runtime.contest."""
    kinds: dict[str, Callable[..., Any]] = {
        "torch": TorchPeer,
        "onnxruntime": OrtPeer,
        "openvino": OpenvinoPeer,
        "ours": OurPeer,
    }
    return Timed(Maker(folder), lambda: kinds[peer.kind](folder, peer.threads, **peer.options))


class Timed:
    """What runtime.contest asks a peer for: seconds."""

    def __init__(self, networks: Maker, make: Callable[[], Any]) -> None:
        draw = np.random.default_rng(0)
        shape = (1, 3, networks.side, networks.side)
        self._image, self._drawing = (
            draw.uniform(-1, 1, shape).astype(np.float32) for _ in range(2)
        )
        self._x_T = draw.standard_normal(shape, np.float32)
        self._z = draw.standard_normal((1, networks.z_size), np.float32)
        begun_s = time.perf_counter()
        self._peer = make()
        self._load_s = time.perf_counter() - begun_s

    def load_s(self) -> float:
        """Of loading, libraries included."""
        return self._load_s

    def encode(self) -> float:
        """Of one pass of the encoder."""
        return self._seconds(lambda: self._peer.encode(self._image, self._drawing))[0]

    def piece(self, steps: int) -> float:
        """Of a run of so many steps, without the encoder."""
        return self._seconds(lambda: self._peer.render(self._x_T, self._z, steps))[0]

    def frame(self, steps: int) -> tuple[float, Picture]:
        """Of a whole frame, and the frame."""

        def work() -> Picture:
            z = self._peer.encode(self._image, self._drawing)
            made: Picture = self._peer.render(self._x_T, z, steps)
            return made

        return self._seconds(work)

    def facts(self) -> dict[str, Any]:
        """The most memory so far, and what else the peer knows of itself."""
        return {"peak_mib": peak_memory_mib(), **getattr(self._peer, "facts", dict)()}

    def _seconds(self, work: Callable[[], Picture]) -> tuple[float, Picture]:
        begun_s = time.perf_counter()
        made = work()
        return time.perf_counter() - begun_s, np.array(made)


class TorchPeer:
    """The published loop in PyTorch."""

    def __init__(
        self, folder: Path, threads: int, lower: bool = False, compiled: bool = False
    ) -> None:
        import torch

        from benchmarks.published_loop import PublishedLoop

        torch.set_num_threads(threads)
        self._torch = torch
        encoder, unet = torch_networks(folder)
        self._loop = PublishedLoop(
            encoder, unet, autocast=torch.bfloat16 if lower else None, channels_last=lower,
            compiled=compiled,
        )  # fmt: skip

    def encode(self, image: Picture, drawing: Picture) -> Picture:
        """z [1,Z]."""
        return np.asarray(self._loop.encode(*map(self._torch.from_numpy, (image, drawing))))

    def render(self, x_T: Picture, z: Picture, steps: int) -> Picture:
        """x_0 [1,3,S,S]."""
        return np.asarray(self._loop.render(*map(self._torch.from_numpy, (x_T, z)), steps))

    def facts(self) -> dict[str, Any]:
        """How much of its time it spent inside its networks."""
        return {"share_in_networks": self._loop.in_networks}


class GraphPeer:
    """The published graph, exported whole, in a runtime with its defaults; DDIM in NumPy."""

    def __init__(self, encode: Callable[..., Picture], eps: Callable[..., Picture]) -> None:
        self._encode, self._eps = encode, eps

    def encode(self, image: Picture, drawing: Picture) -> Picture:
        """z [1,Z]."""
        return self._encode(image=image, condition=drawing)

    def render(self, x_T: Picture, z: Picture, steps: int) -> Picture:
        """x_0 [1,3,S,S]."""
        run = schedule.render_run("eps", schedule.timesteps(steps), schedule.alpha_bars())
        x = x_T
        for step in run.steps:
            t = np.full(1, run.timesteps[step.row], np.float32)
            levels = float(run.alpha_bar[step.row]), float(run.alpha_bar_to[step.row])
            x = schedule.ddim_step("eps", x, self._eps(x_t=x, t=t, z=z), *levels)
        return x


class OrtPeer(GraphPeer):
    """ONNX Runtime as its manual opens a model."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads

        def opened(path: Path) -> Callable[..., Picture]:
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            return lambda **feed: np.asarray(session.run(None, feed)[0])

        super().__init__(opened(folder / BUNDLE / "encoder.onnx"), opened(folder / WHOLE))


class OpenvinoPeer(GraphPeer):
    """OpenVINO as its manual opens a model: bfloat16 where the processor has it."""

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        import diffusionact.runtime.openvino  # noqa: F401  (keeps its telemetry off)

        core = openvino.Core()

        def opened(path: Path) -> Callable[..., Picture]:
            model = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
            return lambda **feed: np.array(model(feed)[0])

        super().__init__(opened(folder / BUNDLE / "encoder.onnx"), opened(folder / WHOLE))


class OurPeer:
    """The runtime's loop."""

    def __init__(
        self,
        folder: Path,
        threads: int,
        backend: str,
        precision: str = "auto",
        approximate: Approximation | None = None,
    ) -> None:
        plan = manifest_file.read(folder / BUNDLE)
        self._loop = open_loop(
            folder / BUNDLE, plan, steps=STEPS, also=(PIECE,), backend=backend, device="cpu",
            precision=precision, threads=threads, approximate=approximate,
        )  # fmt: skip

    def encode(self, image: Picture, drawing: Picture) -> Picture:
        """z [1,Z]."""
        return self._loop.encode(image, drawing)

    def render(self, x_T: Picture, z: Picture, steps: int) -> Picture:
        """x_0 [1,3,S,S]."""
        self._loop.set_steps(steps)
        return self._loop.render(x_T, z)


def torch_networks(folder: Path) -> tuple[Any, Any]:
    """Encoder and U-Net of the folder, in PyTorch, read from files as a checkpoint would be."""
    import torch

    config = Maker(folder).config
    made: list[Any] = []
    for kind, file in zip(_kinds(), WEIGHTS, strict=True):
        with torch.device("meta"):
            network: Any = kind(config)
        network.load_state_dict(torch.load(folder / file), assign=True)
        made.append(network.eval().requires_grad_(False))
    return made[0], made[1]


def _kinds() -> tuple[Any, Any]:
    from diffusionact.training.models import ReenactmentEncoder
    from diffusionact.training.models.unet import UNet

    return ReenactmentEncoder, UNet


class Maker:
    """The networks of a folder: "full" is ffhq256, "small" one of the same make for tests."""

    def __init__(self, folder: Path, size: str = "full") -> None:
        self._folder = folder
        self._size = self._made().get("size", size)
        self._spec = json.loads(gzip.decompress(TABLE.read_bytes()))[self._size]
        given = self._spec["config"]
        self.side, self.z_size = given["image_size"], given["embed"]

    @property
    def config(self) -> Any:
        """The configuration of the networks, as training.models has it."""
        from tests.golden_networks import _network_config

        return _network_config(self._spec["config"])

    def make(self) -> bool:
        """Whether they were not there: then they are made, and exported."""
        if self._made().get("recipe") == RECIPE:
            return False
        import torch

        from tests.golden_networks import write_bundle

        for file, prefixes in WEIGHTS.items():
            weights = rule.part(self._spec["keys"], prefixes)
            kept = {
                k: torch.from_numpy(v) for k, v in weights.items() if not k.startswith("encoder.")
            }
            torch.save(kept, self._folder / file)
        told = {"recipe": RECIPE, "size": self._size}
        (self._folder / MADE).write_text(json.dumps({"size": self._size}))
        encoder, unet = torch_networks(self._folder)
        networks: Any = _Networks(self.config, encoder, unet)
        samplings = Sampling(STEPS), Sampling(STEPS)
        write_bundle(self._folder / BUNDLE, networks, Schedule(), samplings, False)
        self._export_whole(unet)
        write_whole(self._folder / MADE, json.dumps(told))
        return True

    def _export_whole(self, unet: Any) -> None:
        """The published forward pass as one graph: x_t, t, z -> prediction."""
        from torch import nn

        from benchmarks.published_loop import published_eps
        from diffusionact.export import to_onnx

        class Whole(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, x_t: Any, t: Any, z: Any) -> Any:
                return published_eps(self.unet, x_t, t, z)

        picture = (1, 3, self.side, self.side)
        inputs = [
            TensorSpec("x_t", "float32", picture),
            TensorSpec("t", "float32", (1,)),
            TensorSpec("z", "float32", (1, self.z_size)),
        ]
        outputs = [TensorSpec("prediction", "float32", picture)]
        to_onnx.export(Whole().eval(), inputs, outputs, self._folder / WHOLE)

    def _made(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self._folder / MADE).read_text())
            return found
        except (OSError, ValueError):
            return {}


@dataclass(frozen=True)
class _Networks:
    """What tests.golden_networks.write_bundle takes."""

    config: Any
    encoder: Any
    network: Any

    def unet(self, _which: str) -> Any:
        return self.network
