# SPDX-License-Identifier: GPL-3.0-or-later
"""Bytes of a PNG, JPEG or WebP file -> one person: `load`. Pixels come out upright, in sRGB, 8 bits.

Files are not to be trusted: `header.measure` sees to their size before anything is decoded, and only the decoders of
these three formats are used.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import replace
from typing import Any, Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms

from backend.photo.header import HINT, measure
from backend.photo.matting import Found, find
from backend.protocol import PopulaceError

MAX_SIDE: Final = 4096  # of the picture that is worked with, pixels
_SAME_SHAPE: Final = 0.02  # by how much the proportions of a mask may be off

# What EXIF's orientation asks to be done, in the order of its numbers from 2 on.
_TURNS: Final = (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip
_UNREADABLE: Final = (OSError, SyntaxError, ValueError, KeyError, IndexError, struct.error, zlib.error, OverflowError,
                      EOFError, TypeError)  # fmt: skip


def load(data: bytes, mask: bytes | None = None, person: int = 0) -> Found:
    """One person of a photo: number `person` from the left, counted from 0.

    Raises `image_unreadable`, `too_large`, `no_person_found`, and `mask_needed` where nothing tells the person from the
    background.
    """
    rgba, focal = decode(data), measure(data).focal_35mm
    found = find(rgba, None if mask is None else _mask(mask, rgba), person)
    if focal is None:
        return found
    height, width = rgba.shape[:2]  # "35 mm" lenses are compared by the diagonal, 43.27 mm on film
    return replace(found, fov_y_rad=2 * math.atan(43.27 / 2 / focal * height / math.hypot(height, width)))


def decode(data: bytes, max_side: int = MAX_SIDE) -> UInt8[np.ndarray, "H W 4"]:
    """The upright picture in sRGB with its alpha channel, scaled down to `max_side`. Of an animation the first frame.

    Raises `image_unreadable` and `too_large`.
    """
    header = measure(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which was measured, and of oddities in metadata
            image: Any = Image.open(io.BytesIO(data), formats=[header.format])
            scale = min(1.0, max_side / max(image.size))
            if header.format == "JPEG" and scale < 1:
                image.draft(None, tuple(round(side * scale) for side in image.size))
            image.load()
            image = _to_srgb(image)
    except _UNREADABLE:
        raise PopulaceError("image_unreadable", "The picture's file is damaged or cut off.", HINT) from None
    scale = min(1.0, max_side / max(image.size))
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if header.orientation > 1:
        image = image.transpose(_TURNS[header.orientation - 2])
    return np.array(image.convert("RGBA"))


def decode_map(data: bytes) -> UInt8[np.ndarray, "H W 4"]:
    """The very pixels of an RGBA PNG that a packet held. Raises `invalid_latents`."""
    try:
        if measure(data).format != "PNG":
            raise ValueError
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.mode != "RGBA" or max(image.size) > MAX_SIDE:
            raise ValueError
        return np.array(image)
    except (PopulaceError, *_UNREADABLE):
        raise PopulaceError("invalid_latents", "A map of the latents is not an RGBA picture as a packet has it.",
                            "Send the maps of the packet as they are.") from None  # fmt: skip


def _to_srgb(image: Any) -> Any:
    """RGB or RGBA of any mode that the three formats decode to."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    alpha = None
    if image.mode in ("P", "PA", "LA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGB")
    if profile:
        image = _by_profile(image, profile)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _by_profile(image: Any, profile: bytes) -> Any:
    """Colours as the embedded ICC profile means them; as they are where it cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in (ImageCms.getProfileDescription(source) or "").lower():
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # of another kind of colours, or damaged
        return image


def _mask(data: bytes, rgba: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W"]:
    """A mask at the photo's size: its alpha channel if that says anything, else its brightness."""
    mask = decode(data)
    height, width = rgba.shape[:2]
    if abs(mask.shape[1] / mask.shape[0] / (width / height) - 1) > _SAME_SHAPE:
        raise PopulaceError(
            "image_unreadable", f"The mask is {mask.shape[1]} x {mask.shape[0]} pixels, the photo {width} x {height}.",
            "Make a mask of the photo's proportions: white where the person is."
        )  # fmt: skip
    grey = Image.fromarray(mask[:, :, 3] if mask[:, :, 3].min() < 255 else np.array(Image.fromarray(mask).convert("L")))
    return np.array(grey.resize((width, height), Image.Resampling.BILINEAR))
