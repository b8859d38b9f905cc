"""The GPU of this machine, as the driver's own tool tells it: no library, no context, no crash."""

from __future__ import annotations

import shutil
import subprocess

from diffusionact.engine_files import Gpu
from diffusionact.errors import DeviceError

TIMEOUT_S = 10.0
_QUERY = "--query-gpu=name,compute_cap,driver_version"


def gpu_here() -> Gpu | None:
    """Return the first GPU, or None where there is no NVIDIA driver.

    Raises: DeviceError when there is one that does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, _QUERY, "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        name, capability, driver = done.stdout.splitlines()[0].split(", ")
        major = int(driver.split(".")[0])
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        raise DeviceError(
            f"nvidia-smi does not name a GPU ({error}); see what `nvidia-smi` says, or build ahead "
            "of time with --gpu sm_89"
        ) from error
    return Gpu(name, f"sm_{capability.replace('.', '')}", major)
