"""The baseline of the benchmarks is the published loop: it gives the published results."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from benchmarks.published_loop import PublishedLoop, Tables, published_eps  # noqa: E402
from diffusionact import schedule  # noqa: E402
from diffusionact.training.models import (  # noqa: E402
    Autoencoder,
    NetworkConfig,
    ReenactmentEncoder,
)
from tests.golden import rule  # noqa: E402

pytestmark = pytest.mark.torch

GOLDEN = Path(__file__).parent / "golden"
STEPS = 10  # of the stored flow
# As of tests/test_models.py: 5 to 30 times what two convolution backends differ by; typical
# mistakes differ by 0.2 and more.
FLOW_ATOL, FLOW_MEAN, CODE_ATOL, EPS_ATOL = 2e-2, 1e-4, 2e-5, 5e-5


class Stored:
    """The stored inputs and results, and the networks they are of."""

    def __init__(self) -> None:
        table = json.loads(gzip.decompress((GOLDEN / "networks.json.gz").read_bytes()))["small"]
        self.results = np.load(GOLDEN / "network_small.npz")
        self.inputs = {
            key: torch.from_numpy(rule.tensor(one["name"], one["shape"], one["kind"]))
            for key, one in table["inputs"].items()
        }
        self.encoder: Any = self._network(ReenactmentEncoder, table, "state_dict_net/")
        self.model: Any = self._network(Autoencoder, table, "state_dict_diff/model.")
        self.ema: Any = self._network(Autoencoder, table, "state_dict_diff/ema_model.")

    def _network(self, kind: Any, table: Any, prefix: str) -> Any:
        network = kind(NetworkConfig(64, 32, (1, 2, 2), (1, 2, 2, 2), embed=64))
        weights = rule.part(table["keys"], prefix)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stored() -> Stored:
    return Stored()


def halved(picture: torch.Tensor) -> npt.NDArray[np.float32]:
    """Every second pixel, as stored."""
    made: npt.NDArray[np.float32] = picture.numpy()[:, :, ::2, ::2]
    return made


def test_the_baseline_gives_the_published_flow(stored: Stored) -> None:
    given, wanted = stored.inputs, stored.results
    ema = PublishedLoop(stored.encoder, stored.ema)
    model = PublishedLoop(stored.encoder, stored.model)
    z_s = ema.encode(given["src_img"], given["stick_src"])
    np.testing.assert_allclose(z_s, wanted["net_src"], atol=CODE_ATOL)
    x_T = ema.invert(given["src_img"], z_s, STEPS)
    frame = model.render(x_T, model.encode(given["src_img"], given["stick_tgt"]), STEPS)
    for made, name in ((x_T, "flow_xT"), (frame, "flow_out")):
        apart = np.abs(halved(made) - wanted[name])
        assert apart.max() <= FLOW_ATOL and apart.mean() <= FLOW_MEAN, name


def test_its_forward_pass_does_all_of_the_published_work(stored: Stored) -> None:
    """Every projection of time and of code runs in every step, and the result is the same."""
    unet, given = stored.model, stored.inputs
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in unet.named_modules()
        if name.endswith(("emb_layers", "time_embed.time_embed"))
    ]
    t = torch.full((2,), 450)
    eps = published_eps(unet, given["x_t"], t, given["z"])
    for hook in hooks:
        hook.remove()
    blocks = sum(1 for block in unet.modulated)
    assert len(calls) == 2 * blocks + 1 and len(set(calls)) == len(calls)
    np.testing.assert_allclose(halved(eps), stored.results["eps_model_t450"], atol=EPS_ATOL)


def test_its_tables_are_those_of_the_schedule() -> None:
    tables, levels = Tables(20), schedule.alpha_bars()[schedule.timesteps(20)]
    like = torch.zeros(1, 3, 2, 2)
    for i in (0, 7, 19):
        spread = tables.at("alpha_bar", torch.tensor([i]), like)
        assert spread.shape == like.shape
        np.testing.assert_allclose(spread.numpy(), np.float32(levels[i]), rtol=1e-6)


def test_it_tells_how_much_of_the_time_is_the_networks(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import published_loop

    clock = iter(np.arange(0.0, 1000.0, 1.0))
    monkeypatch.setattr(published_loop.time, "perf_counter", lambda: float(next(clock)))
    loop = PublishedLoop(stored.encoder, stored.model)
    loop.render(stored.inputs["x_T"][:1], stored.inputs["z"][:1], 2)
    # begin, two networks of a tick each, end
    assert loop.network_s == 2.0 and loop.total_s == 5.0 and loop.in_networks == 0.4
