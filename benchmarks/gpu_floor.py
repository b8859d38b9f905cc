"""What a network asks for and what the GPU could do: see benchmarks/gpu.py.

python -m benchmarks.gpu_floor DEVICE RESULT.json        what the device makes of a matrix product
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffusionact.files import write_whole
from diffusionact.training.models import NetworkConfig, ReenactmentEncoder, UNet


def flops(config: NetworkConfig) -> dict[str, float]:
    """Operations of an encoder pass and of a step, counted without computing them."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet, encoder = UNet(config).eval(), ReenactmentEncoder(config).eval()
        picture = torch.zeros(1, 3, config.image_size, config.image_size)
        rows = torch.zeros(1, unet.modulation_size)
    counted = {}
    for name, work in (("encoder", lambda: encoder(picture, picture)),
                       ("step", lambda: unet.step(picture, rows, rows))):  # fmt: skip
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
        counted[name] = float(counter.get_total_flops())
    return counted


def peak_flops(device: str, seconds: float = 1.0) -> float:
    """Operations a second of the largest matrix product in half precision, bf16; fp32 on a CPU."""
    side, kind = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a = torch.ones(side, side, device=device, dtype=kind)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(3):
        a @ a
    wait()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        wait()
        best = max(best, 5 * 2.0 * side**3 / (time.perf_counter() - start))
    return best


def clocks() -> str:
    """What nvidia-smi says of the GPU's clocks, power and heat, as it is now; "" without one."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query},temperature.gpu", "--format=csv"],
            capture_output=True, text=True, timeout=10.0, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def main() -> None:
    device, path = sys.argv[1:]
    found = {"peak_flops": peak_flops(device), "clocks": clocks()}
    write_whole(Path(path), json.dumps(found))


if __name__ == "__main__":
    main()
