"""The one place that finds TensorRT: `tensorrt`, or `tensorrt_rtx`, which builds without a GPU.

Both have the same classes; what only one has is asked for with `hasattr` where it is used.
Importing either touches no driver. Making a `Runtime` of `tensorrt` on a machine without one
crashes the process, so whoever makes one must have seen a GPU first.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusionact.errors import BackendMissing, SettingsError

# name -> the module that holds its classes. That of RTX is there without its meta package too.
MODULES: Mapping[str, str] = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx_bindings",
}
INSTALL: Mapping[str, str] = {
    "tensorrt": "pip install 'diffusionact[trt]'",
    "tensorrt_rtx": "pip install 'diffusionact[rtx]'",
}


@dataclass(frozen=True)
class Library:
    """One of the two, imported."""

    name: str
    version: str
    module: Any


def installed() -> tuple[str, ...]:
    """Return the names of those that are installed; nothing is imported."""
    return tuple(n for n, module in MODULES.items() if importlib.util.find_spec(module))


def find(name: str | None = None) -> Library:
    """Return the library of a name, or the first that is installed.

    Raises: SettingsError for an unknown name, BackendMissing with the command that installs it.
    """
    if name is not None and name not in MODULES:
        raise SettingsError(f"library {name!r}; choose from: {', '.join(MODULES)}")
    here = installed()
    if not here or (name is not None and name not in here):
        wanted = [INSTALL[name]] if name else list(INSTALL.values())
        raise BackendMissing(f"{name or 'TensorRT'} is not installed; run: {', or '.join(wanted)}")
    chosen = name or here[0]
    try:
        module = importlib.import_module(MODULES[chosen])
    except (ImportError, OSError) as error:
        raise BackendMissing(
            f"{chosen} is installed but does not load ({error}); run: {INSTALL[chosen]}"
        ) from error
    return Library(chosen, module.__version__, module)
