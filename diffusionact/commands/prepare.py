"""`diffusionact prepare`: shards for training out of videos and pictures of people."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusionact.assets import bundle_path
from diffusionact.commands.exits import DONE
from diffusionact.commands.extras import extra
from diffusionact.commands.output import say

if TYPE_CHECKING:
    from diffusionact.landmarks import Landmarks
    from diffusionact.manifest import Manifest
    from diffusionact.runtime.tracker import Tracker
    from diffusionact.training.prepare_clip import Request

HELP = "Turns clips of people into shards for training: crops, landmarks, gaze, codes, masks."

SIZE, FRAMES, CLIPS, LEAST_SHARPNESS = 256, 32, 32, 10.0
TRACKERS = ("auto", "mediapipe", "published")
HULL = "hull of the 68 landmarks and a forehead above them, without hair, ears and neck"


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATASET", help="a folder of clips, or one clip")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="for the shards; a run "
        "that was cut short goes on there")  # fmt: skip
    add("--layout", default="auto", help="voxceleb, voxceleb-flat, hdtf, vfhq, folder: "
        "PERSON/CLIP, or pictures: each a person (default: auto, the first that finds a clip)")  # fmt: skip
    add("--split", type=Path, metavar="FILE", help="names of the clips to take, one a line")
    add("--size", type=int, metavar="PX", help=f"of the crops (default: {SIZE}, or the bundle's)")
    add("--frames-per-clip", type=int, default=FRAMES, metavar="N",
        help=f"at most, evenly spread (default: {FRAMES})")  # fmt: skip
    add("--bundle", type=Path, nargs="?", const=Path(bundle_path()), metavar="DIR",
        help="crop and draw as this model does, the shipped one where none is named; its published "
        "tracker, if it has one (default: the published FFHQ crop)")  # fmt: skip
    add("--tracker", default="auto", choices=TRACKERS, help="auto: the bundle's, else mediapipe")
    add("--least-side", type=float, metavar="PX", help="of the crop in the picture: smaller faces "
        "are dropped (default: half of --size)")  # fmt: skip
    add("--least-sharpness", type=float, default=LEAST_SHARPNESS, metavar="V",
        help=f"variance of the Laplacian, 0 for all (default: {LEAST_SHARPNESS:.0f})")  # fmt: skip
    add("--bisenet", type=Path, metavar="FILE", help="79999_iter.pth: masks by this network "
        "(default: the hull of the landmarks)")  # fmt: skip
    add("--clips-per-shard", type=int, default=CLIPS, metavar="N", help=f"(default: {CLIPS})")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Prepare what is not prepared yet, and draw a sheet of what was kept."""
    from diffusionact.evaluation.layouts import footage
    from diffusionact.progress import Progress

    with extra("prepare", "train"):
        from diffusionact.training.contact_sheet import write_contact_sheet
        from diffusionact.training.prepare import prepare, report_text
        from diffusionact.training.shards import Shards

    clips = footage(arguments.data, arguments.layout, arguments.split)
    request = _request(arguments)
    published = request.codes > 0 or arguments.tracker == "published"
    bundle = arguments.bundle if published else None
    open_reader = partial(ClipReader, bundle, arguments.bisenet)
    with Progress("preparing", unit="clip", quiet=arguments.quiet) as progress:
        made = prepare(
            clips, arguments.output, request, open_reader,
            workers=arguments.workers, progress=progress,
        )  # fmt: skip
    sheet = arguments.output / "contact_sheet.png"
    write_contact_sheet(Shards.open(arguments.output), sheet)
    values = {"folder": str(arguments.output), "sheet": str(sheet), **made.report}
    say(arguments, values, f"{report_text(made.report)}look at {sheet}")
    return DONE


def _request(arguments: argparse.Namespace) -> Request:
    """What the options ask for. Raises: BundleError, SettingsError."""
    from diffusionact.condition import Drawing
    from diffusionact.errors import SettingsError
    from diffusionact.training.prepare_clip import Request

    manifest = _manifest(arguments.bundle)
    if arguments.tracker == "published" and manifest is None:
        raise SettingsError("--tracker published needs the --bundle that carries its networks")
    codes = 0 if manifest is None else _codes(manifest, arguments.tracker)
    size = arguments.size or (SIZE if manifest is None else manifest.image_size)
    if codes and manifest is not None and size != manifest.image_size:
        raise SettingsError(
            f"--size {size}: the bundle's tracker draws for {manifest.image_size} px; leave it out"
        )
    drawing = Drawing() if manifest is None else manifest.drawing
    return Request(
        size=size,
        frames_per_clip=arguments.frames_per_clip,
        clips_per_shard=arguments.clips_per_shard,
        least_side_px=size / 2 if arguments.least_side is None else arguments.least_side,
        least_sharpness=arguments.least_sharpness,
        rotate=True if manifest is None else manifest.crop.rotate,
        scale=1.0 if manifest is None else manifest.crop.scale,
        drawing=dataclasses.asdict(drawing),
        tracker="published: S3FD, FAN, EMOCA, gaze" if codes else "MediaPipe 0.10.21 face mesh",
        mask=HULL
        if arguments.bisenet is None
        else f"BiSeNet, {arguments.bisenet.name}: all that is not background",
        codes=codes,
    )


def _manifest(bundle: Path | None) -> Manifest | None:
    from diffusionact import manifest

    return None if bundle is None else manifest.read(bundle)


def _codes(manifest: Manifest, tracker: str) -> int:
    """How many codes the published networks of a bundle give; 0 where they are not to be used, or
    not there: then opening the tracker says what lacks."""
    from diffusionact.manifest import ASSETS, tracker_tensors

    parts = {*manifest.tracker, *manifest.assets}
    whole = all(name in parts for name in (*tracker_tensors(), *ASSETS))
    if tracker == "mediapipe" or not whole:
        return 0
    networks = (manifest.tracker["emoca"], manifest.tracker["gaze"])
    return sum(int(spec.shape[-1]) for network in networks for spec in network.outputs)


class ClipReader:
    """The runtime's reading of clips and faces, for `training.prepare`."""

    def __init__(self, bundle: Path | None = None, bisenet: Path | None = None) -> None:
        """bundle: with the published tracker, where it is that one; bisenet: weights of the network
        that tells masks. Raises: BackendMissing, BundleError, SettingsError."""
        from diffusionact import manifest
        from diffusionact.runtime.tracker import open_tracker, open_tracker_of

        self._tracker: Tracker = (
            open_tracker()
            if bundle is None
            else open_tracker_of(bundle, manifest.read(bundle), "published")
        )
        self._parse: Callable[[Any], Any] | None = None
        if bisenet is not None:
            from diffusionact.training.masks import open_parser

            self._parse = open_parser(bisenet)

    def length(self, path: Path) -> int | None:
        """Return how many frames the clip promises."""
        from diffusionact.runtime.media import open_reader

        return open_reader(path).length

    def pictures(self, path: Path) -> Iterator[tuple[Any, int]]:
        """Yield the frames with their times; None for a file of a folder that is no picture."""
        from diffusionact.errors import MediaError
        from diffusionact.runtime.media import FolderReader, open_reader, read_image

        reader = open_reader(path)
        if not isinstance(reader, FolderReader):
            yield from ((frame.image_bgr, frame.pts_ns) for frame in reader)
            return
        for picture, pts_ns in zip(reader.paths, reader.times_ns, strict=True):
            try:
                yield read_image(picture), pts_ns
            except MediaError:
                yield None, pts_ns

    def faces(self, image_bgr: Any) -> list[Landmarks]:
        """Return the faces of a picture, the largest first."""
        return self._tracker.detect(image_bgr)

    def drawn(self, face: Landmarks) -> Landmarks | None:
        """Return what the published model draws of the face; None for our own landmarks."""
        from diffusionact.runtime.published.tracker import PublishedTracker

        if isinstance(self._tracker, PublishedTracker):
            return self._tracker.mixed(face, face)
        return None

    def mask(self, crop: Any) -> Any:
        """Return 255 on what is not background; None where no network tells it."""
        return None if self._parse is None else self._parse(crop)

    def close(self) -> None:
        self._tracker.close()
