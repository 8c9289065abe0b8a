# SPDX-License-Identifier: GPL-3.0-or-later
"""What a PNG, JPEG or WebP file says of itself, without decoding it: format, size, which way is up.

Standard library only: the server looks at what it was sent with this, and leaves decoding to the worker.

Sources: PNG (W3C, third edition) sec. 11.2 and 11.3.4 (eXIf); JPEG (ITU T.81) annex B; WebP (RFC 9649) sec. 2; EXIF 2.3
sec. 4.6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal

from backend.protocol import PopulaceError

MAX_PIXELS: Final = 64_000_000
MAX_JPEG_PIXELS: Final = 128_000_000  # JPEGs can be decoded at a fraction of their size
MIN_SIDE: Final = 16
MAX_SIDE: Final = 32_767  # more than a WebP file can have, half of what JPEG can
HINT: Final = "Give a photo as PNG, JPEG or WebP."

_ORIENTATION, _EXIF_DIRECTORY, _WIDTH, _HEIGHT, _FOCAL_35MM = 0x0112, 0x8769, 0xA002, 0xA003, 0xA405  # EXIF tags
_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))  # SOF markers


@dataclass(frozen=True)
class Header:
    format: Literal["PNG", "JPEG", "WEBP"]
    width: int  # upright, pixels
    height: int
    orientation: int  # 1..8, as EXIF has it; 1: as stored
    focal_35mm: float | None = None  # millimetres on a frame of 36 x 24, where the camera tells and nothing was cut off


class _Damaged(Exception):
    pass


def measure(data: bytes | bytearray | memoryview) -> Header:
    """Raises `image_unreadable` unless it begins as one of the three formats does, and `too_large` for more pixels
    than there is memory for."""
    view = memoryview(data).cast("B")
    try:
        if view[:8] == b"\x89PNG\r\n\x1a\n":
            kind, (width, height, exif) = "PNG", _png(view)
        elif view[:3] == b"\xff\xd8\xff":
            kind, (width, height, exif) = "JPEG", _jpeg(view)
        elif view[:4] == b"RIFF" and view[8:12] == b"WEBP":
            kind, (width, height, exif) = "WEBP", _webp(view)
        else:
            raise PopulaceError("image_unreadable", "This is not a picture in a format that can be read here.", HINT)
    except (_Damaged, struct.error, IndexError):
        raise PopulaceError("image_unreadable", "The picture's file is damaged or cut off.", HINT) from None
    if min(width, height) < MIN_SIDE:
        raise PopulaceError("image_unreadable", f"The picture has only {width} x {height} pixels.",
                            "Give one where the person is at least 64 pixels tall.")  # fmt: skip
    limit = MAX_JPEG_PIXELS if kind == "JPEG" else MAX_PIXELS
    if width * height > limit or max(width, height) > MAX_SIDE:
        raise PopulaceError("too_large", f"The picture has {width} x {height} pixels, more than {limit // 10**6} "
                            "megapixels.", "Make it smaller; 4000 pixels of height are plenty.")  # fmt: skip
    said = _exif(exif)
    orientation = said.get(_ORIENTATION, 1)
    orientation = orientation if 1 <= orientation <= 8 else 1
    focal, taken = said.get(_FOCAL_35MM, 0), (said.get(_WIDTH, 0), said.get(_HEIGHT, 0))
    is_whole = min(taken) > 0 and abs(taken[0] * height / (taken[1] * width) - 1) < 0.01
    if orientation > 4:
        width, height = height, width
    return Header(kind, width, height, orientation, float(focal) if is_whole and 5 <= focal <= 1000 else None)


def _png(view: memoryview) -> tuple[int, int, memoryview]:
    if view[12:16] != b"IHDR":
        raise _Damaged
    width, height = struct.unpack_from(">II", view, 16)
    at, exif = 8, view[:0]
    while at + 8 <= len(view):
        (size,), kind = struct.unpack_from(">I", view, at), bytes(view[at + 4 : at + 8])
        if kind in (b"IEND", b"IDAT"):  # decoders ignore an eXIf behind the pixels, so do we
            break
        if kind == b"eXIf":
            exif = view[at + 8 : at + 8 + size]
        at += 12 + size
    return width, height, exif


def _jpeg(view: memoryview) -> tuple[int, int, memoryview]:
    at, exif = 2, view[:0]
    while True:
        while view[at] == 0xFF and view[at + 1] == 0xFF:  # fill bytes
            at += 1
        if view[at] != 0xFF:
            raise _Damaged
        marker = view[at + 1]
        (size,) = struct.unpack_from(">H", view, at + 2)
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", view, at + 5)
            return width, height, exif
        if marker in (0xD9, 0xDA):  # the end, or pixels before any frame
            raise _Damaged
        segment = view[at + 4 : at + 2 + size]
        if marker == 0xE1 and segment[:6] == b"Exif\0\0" and not len(exif):
            exif = segment[6:]
        at += 2 + size


def _webp(view: memoryview) -> tuple[int, int, memoryview]:
    size: tuple[int, int] | None = None
    at, exif = 12, view[:0]
    while at + 8 <= len(view):
        kind, (length,) = bytes(view[at : at + 4]), struct.unpack_from("<I", view, at + 4)
        body = view[at + 8 : at + 8 + length]
        if kind == b"VP8X" and size is None:
            size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif kind == b"VP8 " and size is None:
            if body[3:6] != b"\x9d\x01\x2a":
                raise _Damaged
            width, height = struct.unpack_from("<HH", body, 6)
            size = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L" and size is None:
            (bits,) = struct.unpack_from("<I", body, 1)
            size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif kind == b"EXIF":
            exif = body[6:] if body[:6] == b"Exif\0\0" else body
        at += 8 + length + (length & 1)
    if size is None:
        raise _Damaged
    return *size, exif


def _exif(block: memoryview) -> dict[int, int]:
    """Whole numbers of a TIFF block's first directory and of its EXIF directory, by tag. Whatever is damaged is left
    out, for the pixels may be whole all the same."""
    found: dict[int, int] = {}
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(block[:2])]
        (at,) = struct.unpack_from(order + "I", block, 4)
        for _ in range(2):
            (count,) = struct.unpack_from(order + "H", block, at)
            for i in range(count):
                tag, kind, number = struct.unpack_from(order + "HHI", block, at + 2 + 12 * i)
                if number == 1 and kind in (3, 4):  # 16 and 32 bits
                    value = struct.unpack_from(order + ("H" if kind == 3 else "I"), block, at + 10 + 12 * i)
                    found.setdefault(tag, value[0])
            at = found[_EXIF_DIRECTORY]
    except (KeyError, struct.error):
        pass
    return found
