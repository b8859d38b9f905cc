"""The bytes between page and server: what is read of a message, and how one is made.

Little-endian. The page's frames and the server's pictures begin with the same sixteen bytes:
kind u8, flags u8, zero u16, frame id u32, capture time u64 in microseconds of the page's clock;
of a picture the u16 is the number of steps it took. What is not exactly of this form is
`Malformed`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from diffusionact.landmarks import POINTS, Landmarks

PROTOCOL = 1
HEAD = struct.Struct("<BBHIQ")
TIMES = struct.Struct("<QQIIII")
SEEN, NEUTRAL = 1, 2  # flags: a face was seen; the neutral face is still being looked for
# Coordinates are int16, in 1/16384 of the longer side of the camera's picture: a hair's breadth of
# 0.04 px at 640, and room for a face that is twice as far out as the picture is wide.
UNITS = 16384
REFERENCE_PX = 640.0  # the longer side that received landmarks are laid on
LANDMARK_BYTES = (POINTS + 2) * 3 * 2
MAX_PICTURE_BYTES = 512 * 1024  # of a camera frame
MAX_PORTRAIT_BYTES = 4 * 1024 * 1024
MAX_COMMAND_BYTES = 1024
MAX_MESSAGE_BYTES = HEAD.size + MAX_PORTRAIT_BYTES


class Kind(IntEnum):
    """First byte of a message."""

    LANDMARKS = 1  # page: head, then 70 x 3 int16 when a face was seen, else nothing
    FRAME = 2  # page: head, then a JPEG of the camera
    PORTRAIT = 3  # page: head (frame: its number), then a JPEG or PNG
    NEXT = 16  # server: the head alone; one frame may come now
    PICTURE = 17  # server: head, times, JPEG


class Malformed(Exception):
    """A message that the page never sends: its session ends."""


@dataclass(frozen=True)
class Packet:
    """kind, flags, frame id and capture time (us, of the page's clock) of a message, and the
    rest of it."""

    kind: Kind
    seen: bool
    frame: int
    captured_us: int
    body: bytes


@dataclass(frozen=True)
class Moments:
    """When a frame came and its picture left (monotonic ns), its stages (ns), and the diffusion
    steps of its rendering."""

    received_ns: int
    sent_ns: int
    track_ns: int
    wait_ns: int
    render_ns: int
    encode_ns: int
    steps: int = 0


def read_packet(message: bytes) -> Packet:
    """Return what a binary message of the page says. Raises: Malformed."""
    if len(message) < HEAD.size:
        raise Malformed(f"{len(message)} bytes; a message has {HEAD.size} or more")
    number, flags, zero, frame, captured_us = HEAD.unpack_from(message)
    if number not in (Kind.LANDMARKS, Kind.FRAME, Kind.PORTRAIT) or zero or flags & ~SEEN:
        raise Malformed(f"kind {number}, flags {flags}, {zero}")
    kind, body = Kind(number), message[HEAD.size :]
    most = {Kind.FRAME: MAX_PICTURE_BYTES, Kind.PORTRAIT: MAX_PORTRAIT_BYTES}
    if kind is Kind.LANDMARKS and len(body) != (LANDMARK_BYTES if flags & SEEN else 0):
        raise Malformed(f"{len(body)} bytes of landmarks; wanted {LANDMARK_BYTES}, or 0 unseen")
    if kind in most and not 0 < len(body) <= most[kind]:
        raise Malformed(f"a picture of {len(body)} bytes; wanted up to {most[kind]}")
    return Packet(kind, bool(flags & SEEN), frame, captured_us, body)


def landmarks_of(packet: Packet) -> Landmarks | None:
    """Return the face of a LANDMARKS packet, px of a picture REFERENCE_PX long; None unseen."""
    if not packet.seen:
        return None
    xyz = np.frombuffer(packet.body, "<i2").reshape(POINTS + 2, 3).astype(np.float32)
    xyz *= np.float32(REFERENCE_PX / UNITS)
    return Landmarks(xyz[:POINTS], np.ascontiguousarray(xyz[POINTS:, :2]))


def landmarks_message(
    face: Landmarks | None, longer_side_px: float, frame: int, captured_us: int
) -> bytes:
    """Return the message that a page sends for a face: for scripts and tests."""
    head = HEAD.pack(Kind.LANDMARKS, SEEN if face is not None else 0, 0, frame, captured_us)
    if face is None:
        return head
    irises = np.concatenate([face.gaze, np.zeros((2, 1), np.float32)], axis=1)
    xyz = np.nan_to_num(np.concatenate([face.points, irises])) * (UNITS / longer_side_px)
    body: bytes = np.clip(np.rint(xyz), -32768, 32767).astype("<i2").tobytes()
    return head + body


def frame_message(jpeg: bytes, frame: int, captured_us: int) -> bytes:
    """Return the message that a page sends for a camera picture."""
    return HEAD.pack(Kind.FRAME, 0, 0, frame, captured_us) + jpeg


def portrait_message(encoded: bytes, upload: int = 0) -> bytes:
    """Return the message that a page sends for a portrait of its user's; upload: its number, which
    the answer has."""
    return HEAD.pack(Kind.PORTRAIT, 0, 0, upload, 0) + encoded


def next_message() -> bytes:
    """Return the server's leave to send one frame."""
    return HEAD.pack(Kind.NEXT, 0, 0, 0, 0)


def picture_message(
    jpeg: bytes, frame: int, captured_us: int, moments: Moments, *, seen: bool, neutral: bool
) -> bytes:
    """Return the server's answer to a frame, whose id and capture time it carries."""
    flags = SEEN * seen | NEUTRAL * neutral
    stages = (moments.track_ns, moments.wait_ns, moments.render_ns, moments.encode_ns)
    head = HEAD.pack(Kind.PICTURE, flags, moments.steps, frame, captured_us)
    times = TIMES.pack(
        moments.received_ns // 1000,
        moments.sent_ns // 1000,
        *(min(max(ns, 0) // 1000, 0xFFFFFFFF) for ns in stages),
    )
    return head + times + jpeg


def read_picture(message: bytes) -> tuple[int, int, bool, bool, Moments, bytes]:
    """Return frame id, capture time us, seen, neutral, moments and JPEG of the server's answer:
    for scripts and tests. Raises: Malformed."""
    if len(message) < HEAD.size + TIMES.size or message[0] != Kind.PICTURE:
        raise Malformed(f"{len(message)} bytes of kind {message[:1].hex()}; wanted a picture")
    _, flags, steps, frame, captured_us = HEAD.unpack_from(message)
    received, sent, track, wait, render, encode = (
        us * 1000 for us in TIMES.unpack_from(message, HEAD.size)
    )
    moments = Moments(received, sent, track, wait, render, encode, steps)
    jpeg = message[HEAD.size + TIMES.size :]
    return frame, captured_us, bool(flags & SEEN), bool(flags & NEUTRAL), moments, jpeg


def read_command(message: str) -> dict[str, Any]:
    """Return what a text message of the page asks: an object with the text `do`.

    Raises: Malformed.
    """
    if len(message) > MAX_COMMAND_BYTES:
        raise Malformed(f"a command of {len(message)} characters; wanted up to {MAX_COMMAND_BYTES}")
    try:
        command = json.loads(message)
    except (ValueError, RecursionError):
        raise Malformed("a command that is no JSON") from None
    if not isinstance(command, dict) or not isinstance(command.get("do"), str):
        raise Malformed('a command without {"do": ...}')
    return command
