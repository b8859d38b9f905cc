"""What a run keeps beside its output until it has succeeded, so that a killed one goes on.

Kept is what took long: the prepared source, the driver's motion, and the rendered crops. All else
is done again, so that the result is that of a run which nothing disturbed, to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from diffusionact.errors import MediaError
from diffusionact.files import write_whole
from diffusionact.runtime.journal import Journal
from diffusionact.runtime.media import Image
from diffusionact.runtime.motion import Motion
from diffusionact.runtime.recipe import differences
from diffusionact.runtime.source import Source

log = logging.getLogger(__name__)

FORMAT = 1
KEPT_FROM_S = 60.0  # of work: what is stopped or fails earlier leaves nothing behind
LOCK, RECIPE = "lock", "recipe.json"
SOURCE, MOTION, CROPS = KEPT = "source.npz", "motion.npz", "crops.bin"


def parts_folder(output: str | os.PathLike[str]) -> Path:
    """Return where the parts of an unfinished result lie: beside it, .NAME.parts."""
    path = Path(os.path.abspath(output))  # "." has no name
    return path.with_name(f".{path.name}.parts")


def forget_parts(output: str | os.PathLike[str]) -> None:
    """Return nothing; what an interrupted run kept for this output is gone.

    Raises: MediaError when another run is at work on it.
    """
    folder = parts_folder(output)
    if folder.exists():
        with Parts(Path(output), {"": "made to be removed"}):
            pass


class Parts:
    """The folder of one output, held by one run at a time. Used with `with`.

    source, motion: of an interrupted run of the same recipe, or None; done: frames that it had
    rendered, their crops in `crops()`. Success removes the folder. After an error or a signal it
    stays where that saves a minute, and a warning names it; a killed process leaves it as it is.
    """

    def __init__(self, output: Path, recipe: Mapping[str, str]) -> None:
        """recipe: what the frames depend on, by name; parts of another one are removed.

        Raises: MediaError when the folder cannot be written, or another run holds it.
        """
        self.output = output
        self.folder = parts_folder(output)
        self.source: Source | None = None
        self.motion: Motion | None = None
        self._begun_s = time.monotonic()
        with self._disk_errors_named():
            self.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        if not _locked(self._lock):
            os.close(self._lock)
            raise MediaError(
                f"{output}: another run is writing it; wait for its end, or name another with -o"
            )
        try:
            with self._disk_errors_named():
                self._begin({"format of parts": str(FORMAT), **recipe})
                self._journal: Journal | None = Journal(self.folder / CROPS)
        except BaseException:
            self._let_go(keep=self.source is not None)
            raise
        self.resumed = self.motion is not None
        self.done = self._journal.count
        self._say()

    def crops(self) -> Iterator[Image]:
        """Yield the `done` crops of the interrupted run, uint8 [S,S,3]."""
        return iter(()) if self._journal is None else self._journal.pictures()

    def keep_source(self, source: Source) -> None:
        """Return nothing; the prepared portrait is kept. Raises: MediaError."""
        source.save(self.folder / SOURCE)

    def keep_motion(self, motion: Motion) -> None:
        """Return nothing; the driver's motion is kept. Raises: MediaError."""
        motion.save(self.folder / MOTION)
        self.motion = motion

    def keep_crop(self, crop: Image) -> None:
        """Return nothing; the next crop is kept. A disk without room for it ends the keeping, not
        the run."""
        if self._journal is None:
            return
        try:
            self._journal.append(crop)
        except OSError as error:
            log.warning(
                "%s: no room to keep finished frames (%s); the run goes on, but would start anew "
                "if it were interrupted", self.output, error.strerror or error,
            )  # fmt: skip
            self._close_journal()
            (self.folder / CROPS).unlink()

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = 0 if self._journal is None else self._journal.count
        self._close_journal()
        saves_time = self.resumed or time.monotonic() - self._begun_s >= KEPT_FROM_S
        if kind is not None and self.motion is not None and saves_time:
            log.warning(
                "%s: not finished. The same command goes on after %d of %d frames; they are kept "
                "in %s, which can be removed",
                self.output, kept, len(self.motion.spans_ns), self.folder,
            )  # fmt: skip
            self._let_go(keep=True)
        else:
            self._let_go(keep=False)

    def _let_go(self, keep: bool) -> None:
        """Give the folder back: with what a later run can use, or not at all."""
        self._remove_all_but(LOCK, *((RECIPE, *KEPT) if keep else ()))
        os.close(self._lock)
        if not keep:
            with contextlib.suppress(OSError):  # the next run may hold it already
                (self.folder / LOCK).unlink()
                self.folder.rmdir()

    def _begin(self, recipe: Mapping[str, str]) -> None:
        """Take over what an interrupted run left, or remove it."""
        found = (self.folder / SOURCE).exists()
        before = _recipe(self.folder / RECIPE)
        if found and before == recipe:
            self._take_over()
        elif found:
            log.warning(
                "%s: an interrupted run left its parts, but %s: starting afresh",
                self.output, differences(before, recipe),
            )  # fmt: skip
        useful = {SOURCE: self.source, MOTION: self.motion, CROPS: self.motion}
        self._remove_all_but(LOCK, *(name for name, part in useful.items() if part is not None))
        write_whole(self.folder / RECIPE, json.dumps(recipe, indent=1))

    def _take_over(self) -> None:
        try:
            self.source = Source.load(self.folder / SOURCE)
            self.motion = Motion.load(self.folder / MOTION)
        except MediaError as error:  # killed before it was there
            log.info("%s", error)

    def _say(self) -> None:
        """What an interrupted run spares this one."""
        if self.motion is not None:
            log.warning(
                "%s: an interrupted run is going on after %d of %d frames (--fresh starts anew)",
                self.output, self.done, len(self.motion.spans_ns),
            )  # fmt: skip
        elif self.source is not None:
            log.warning(
                "%s: an interrupted run had not yet tracked its driver: from the start",
                self.output,
            )

    def _remove_all_but(self, *names: str) -> None:
        for path in self.folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    @contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MediaError(
                f"{self.output}: cannot be written ({error.strerror}); name another place with -o"
            ) from error


def _recipe(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # killed before it was there
        return {}


def _locked(file: int) -> bool:
    """Whether this process holds the file now; the system lets go of it when the process ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a disk over the network, that knows no locks
        return True
    return True
