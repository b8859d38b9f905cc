"""Libraries that only some commands need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusionact.errors import BackendMissing


@contextmanager
def extra(command: str, name: str | None = None) -> Iterator[None]:
    """Turn a library that is not installed into a message that names the extra it comes with.

    name: of the extra, where it is not the command's own. Raises: BackendMissing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "diffusionact":
            raise
        raise BackendMissing(
            f"`diffusionact {command}` needs {error.name}, which is not installed; "
            f"run: pip install 'diffusionact[{name or command}]', or `make dev` in a checkout"
        ) from error
