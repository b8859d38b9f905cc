"""Every error the package raises on purpose, under one root.

A message says what was wrong, what was seen, what was wanted and which command comes next. The
command line prints it and exits with status 2; any other exception is a bug and keeps its trace.
"""

from __future__ import annotations


class DiffusionActError(Exception):
    """The root: `except DiffusionActError` catches all that the package raises on purpose."""


class BundleError(DiffusionActError):
    """A bundle is missing, damaged, or of a format this version cannot read."""


class EngineError(DiffusionActError):
    """An engine does not belong to this bundle, GPU or library version, or cannot be built."""


class BackendMissing(DiffusionActError):
    """The library behind a backend, the tracker or a command is not installed here."""


class NoFace(DiffusionActError):
    """No face was found, or more than one where exactly one was asked for."""


class DeviceError(DiffusionActError):
    """The device asked for is absent, or does not work with the backend asked for."""


class SettingsError(DiffusionActError):
    """A setting, recipe value or argument is out of range or contradicts another."""


class MediaError(DiffusionActError):
    """A picture, video or landmark track is missing, unreadable, empty or cannot be written."""
