"""One-shot face reenactment with a diffusion autoencoder, on ONNX.

    from diffusionact import Reenactor, bundle_path

    with Reenactor.load(bundle_path()) as act:
        source = act.prepare(portrait_bgr)
        result = act.reenact(frame_bgr, source)

Every name is loaded when it is first used: importing the package loads neither NumPy nor OpenCV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusionact._version import __version__

if TYPE_CHECKING:
    from diffusionact.assets import bundle_path, driver_path, portrait_paths
    from diffusionact.errors import (
        BackendMissing,
        BundleError,
        DeviceError,
        DiffusionActError,
        EngineError,
        MediaError,
        NoFace,
        SettingsError,
    )
    from diffusionact.landmarks import Landmarks, Track
    from diffusionact.runtime.media import open_reader
    from diffusionact.runtime.reenactor import Reenactor, Result
    from diffusionact.runtime.session import Session
    from diffusionact.runtime.settings import Settings
    from diffusionact.runtime.source import Source
    from diffusionact.runtime.stream import StreamReport, stream
    from diffusionact.runtime.writer import open_writer

__all__ = [
    "BackendMissing",
    "BundleError",
    "DeviceError",
    "DiffusionActError",
    "EngineError",
    "Landmarks",
    "MediaError",
    "NoFace",
    "Reenactor",
    "Result",
    "Session",
    "Settings",
    "SettingsError",
    "Source",
    "StreamReport",
    "Track",
    "__version__",
    "bundle_path",
    "driver_path",
    "open_reader",
    "open_writer",
    "portrait_paths",
    "stream",
]

_MODULES = {
    "assets": ("bundle_path", "driver_path", "portrait_paths"),
    "errors": (
        "BackendMissing", "BundleError", "DeviceError", "DiffusionActError", "EngineError",
        "MediaError", "NoFace", "SettingsError",
    ),
    "landmarks": ("Landmarks", "Track"),
    "runtime.media": ("open_reader",),
    "runtime.reenactor": ("Reenactor", "Result"),
    "runtime.session": ("Session",),
    "runtime.settings": ("Settings",),
    "runtime.source": ("Source",),
    "runtime.stream": ("StreamReport", "stream"),
    "runtime.writer": ("open_writer",),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Return a public name from the module it lives in (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffusionact' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"diffusionact.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
