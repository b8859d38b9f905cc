"""Data sets as they lie on the user's disk: which clips there are, and of whom.

Only names are read. A split file lists clips, one a line: that is all that is ever taken of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusionact.errors import MediaError, SettingsError

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm", ".gif")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PREPROCESSED = ("frames_cropped", "frames", "chunk_videos")


@dataclass(frozen=True)
class Footage:
    """One clip. name: of its own in the data set; identity: of the person; path: a video, or a
    folder of pictures."""

    name: str
    identity: str
    path: Path


def footage(root: Path, layout: str = "auto", split: Path | None = None) -> list[Footage]:
    """Return the clips of a data set, sorted by name; those that a split file names, if given.

    layout: one of LAYOUTS, or "auto", the first that finds a clip.
    Raises: MediaError for no clip, a clip of the split that is not there, or an unknown place;
    SettingsError for an unknown layout.
    """
    if not root.exists():
        raise MediaError(f"{root}: no such file or folder; wanted a clip or a data set")
    if root.is_file():
        return [Footage(root.stem, root.stem, root)]
    if layout != "auto" and layout not in LAYOUTS:
        raise SettingsError(f"layout {layout!r}; choose from: auto, {', '.join(LAYOUTS)}")
    names = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    for find in names.values():
        if found := sorted(find(root), key=lambda each: each.name):
            return found if split is None else _chosen(found, split)
    raise MediaError(
        f"{root}: no clip of the layout {layout}; docs/evaluation.md shows what each looks like"
    )


def _voxceleb(root: Path) -> Iterator[Footage]:
    """VoxCeleb1 and 2 as published: [set/]idNNNNN/VIDEO/UTTERANCE.mp4, or folders of pictures in
    their place. As HyperReenact's preprocessing leaves it, a video has frames_cropped/, frames/
    and chunk_videos/: the first of these that is there is taken, and nothing beside it."""
    for person in _people(root):
        for video in _folders(person):
            name = f"{person.name}/{video.name}"
            cropped, whole, chunks = (video / part for part in PREPROCESSED)
            if made := next((f for f in (cropped, whole) if f.is_dir() and _has_pictures(f)), None):
                yield Footage(name, person.name, made)
            elif _has_pictures(video):
                yield Footage(name, person.name, video)
            else:
                place = chunks if chunks.is_dir() else video
                for clip in _clips(place):
                    yield Footage(f"{name}/{clip.stem}", person.name, clip)


def _voxceleb_flat(root: Path) -> Iterator[Footage]:
    """VoxCeleb1 as its cropping scripts leave it: idNNNNN#VIDEO#FIRST#LAST.mp4, or folders."""
    for clip in _all_clips(root):
        if match := re.match(r"(id\d+)#", clip.stem):
            yield Footage(clip.stem, match[1], clip)


def _hdtf(root: Path) -> Iterator[Footage]:
    """HDTF: RD_, WDA_ or WRA_, then the speaker and a number: WDA_JohnDoe_000.mp4."""
    for clip in _all_clips(root):
        if match := re.match(r"(?:RD|WDA|WRA)_(.+?)_?\d*$", clip.stem):
            yield Footage(clip.stem, match[1], clip)


def _vfhq(root: Path) -> Iterator[Footage]:
    """VFHQ: Clip+VIDEO+P0+C0+F100-200, folders of pictures or videos; P is the person in it."""
    for clip in _all_clips(root):
        if match := re.match(r"Clip\+(.+\+P\d+)\+C\d+", clip.stem):
            yield Footage(clip.stem, match[1], clip)


def _plain(root: Path) -> Iterator[Footage]:
    """Any folder: each video or folder of pictures in it is one person's clip; in a folder of
    people, PERSON/CLIP."""
    if _has_pictures(root):
        yield Footage(root.name, root.name, root)
        return
    for clip in _clips(root):
        yield Footage(clip.stem, clip.stem, clip)
    for person in _folders(root):
        for clip in _clips(person):
            yield Footage(f"{person.name}/{clip.stem}", person.name, clip)


def _pictures(root: Path) -> Iterator[Footage]:
    """FFHQ and its like: each picture, in whatever folder, is a person of its own."""
    for path in root.rglob("*"):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            name = path.relative_to(root).with_suffix("").as_posix()
            yield Footage(name, name, path)


LAYOUTS: dict[str, Callable[[Path], Iterator[Footage]]] = {
    "voxceleb-flat": _voxceleb_flat,
    "voxceleb": _voxceleb,
    "hdtf": _hdtf,
    "vfhq": _vfhq,
    "folder": _plain,
    "pictures": _pictures,  # the last: never guessed where there are clips
}


def _chosen(found: list[Footage], split: Path) -> list[Footage]:
    try:
        lines = split.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{split}: cannot be read as a list of clips ({error})") from error
    # The first word of a line, without an ending: lists differ in what else they say.
    wanted = [_bare(line.split()[0]) for line in lines if line.split() and line[0] != "#"]
    by_name = {each.name: each for each in found}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise MediaError(
            f"{split}: {len(missing)} of its {len(wanted)} clips are not there, {missing[0]!r} "
            f"first; a clip here is named like {found[0].name!r}"
        )
    return [by_name[name] for name in dict.fromkeys(wanted)]


def _bare(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return name[: -len(suffix)] if suffix in VIDEO_SUFFIXES else name


def _people(root: Path) -> Iterator[Path]:
    for folder in (root, *_folders(root), *(n for f in _folders(root) for n in _folders(f))):
        yield from (each for each in _folders(folder) if re.fullmatch(r"id\d+", each.name))


def _all_clips(root: Path) -> Iterator[Path]:
    """The clips in a folder and in its sub-folders."""
    yield from _clips(root)
    for folder in _folders(root):
        if not _has_pictures(folder):
            yield from _clips(folder)


def _clips(folder: Path) -> Iterator[Path]:
    """The videos and folders of pictures in a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if _has_pictures(path):
                yield path
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            yield path


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())
