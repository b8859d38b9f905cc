"""What TensorRT for RTX compiles for the GPU when an engine is first run, kept for the next start.

Its engines hold no code for one GPU: the library makes that as it opens and first runs them, in
every process anew unless it is given what it made before. Which of that still fits, it judges itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from diffusionact.engine_files import Gpu, cache_root
from diffusionact.files import write_whole

Execute: TypeAlias = Callable[[int], bool]

FOLDER = "jit"
_log = logging.getLogger("diffusionact")


def cache_path(path_of_plan: Path, gpu: Gpu) -> Path:
    """Return where the code of an engine for a GPU is kept."""
    return cache_root() / FOLDER / f"{path_of_plan.stem}-{gpu.target}.bin"


def open_context(trt: Any, engine: Any, path: Path) -> tuple[Any, Callable[[Execute], Execute]]:
    """Return a context without memory of its own, and what makes of its way to run the one to call:
    that keeps the code in `path` the first time. The context is None where there is none.

    The GPU's context is current in the calling thread.
    """
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(trt, "IRuntimeCache"):  # `tensorrt` compiles as it builds
        return engine.create_execution_context(strategy), lambda execute: execute
    runtime_config = engine.create_runtime_config()
    runtime_config.set_execution_context_allocation_strategy(strategy)
    cache = runtime_config.create_runtime_cache()
    known = _read(path)
    fits = bool(known) and cache.deserialize(known)
    runtime_config.set_runtime_cache(cache)
    context = engine.create_execution_context(runtime_config)
    if fits:
        return context, lambda execute: execute
    return context, lambda execute: _Keeping(execute, cache, path)


class _Keeping:
    """Runs an engine; after its first run, what was compiled for it is in the file."""

    def __init__(self, execute: Execute, cache: Any, path: Path) -> None:
        self._execute = execute
        self._cache: Any = cache
        self._path = path

    def __call__(self, stream: int) -> bool:
        done = self._execute(stream)
        if self._cache is not None and done:
            _keep(self._cache, self._path)
            self._cache = None
        return done


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _keep(cache: Any, path: Path) -> None:
    content = cache.serialize()
    if content is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, bytes(content))
    except OSError as error:
        _log.debug("%s: not kept (%s), compiled again next time", path, error.strerror)
