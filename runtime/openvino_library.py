"""The door to openvino: imported here, without the report that it makes of that to its makers."""

from __future__ import annotations

import sys

from diffusionact.errors import BackendMissing

__all__ = ["op", "openvino"]

# Importing openvino reports the import to its makers over the network, unless the package that
# does so cannot be imported: then openvino takes the empty one that it brings along.
_TELEMETRY = "openvino_telemetry"
_blocked = _TELEMETRY not in sys.modules
try:
    if _blocked:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    import openvino
    import openvino.opset13 as op
except ImportError as error:
    raise BackendMissing(
        f"backend 'openvino' needs openvino ({error}); run: pip install 'diffusionact[openvino]'"
    ) from error
finally:
    if _blocked:
        sys.modules.pop(_TELEMETRY, None)
