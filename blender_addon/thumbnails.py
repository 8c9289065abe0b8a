# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures of people for the panel: PNG bytes become icons, one per tick, never while drawing.

A picture's name is its hash, so the same picture is decoded once, wherever it comes from.
"""

from __future__ import annotations

import base64
import logging
from typing import Any, Final

import bpy
import numpy as np
from bpy.utils import previews

from . import tasks

log = logging.getLogger(__name__)

MAX_ICONS: Final = 300
MAX_SIDE: Final = 512
_DOT: Final = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAAC0lEQVR42mNgAAIAAAUAAen63NgAAAAASUVORK5CYII="
)
_icons: Any = None  # the preview collection
_waiting: dict[str, bytes] = {}
_broken: set[str] = set()
_is_warm = False


def icon(key: str) -> int:
    """The icon of a picture, 0 while there is none."""
    return _icons[key].icon_id if _icons is not None and key in _icons else 0


def offer(key: str, png: bytes) -> None:
    """This picture will be drawn soon."""
    if key and _icons is not None and key not in _icons and key not in _broken:
        _waiting.setdefault(key, png)


def has(key: str) -> bool:
    """Whether there is nothing to offer."""
    return not key or _icons is None or key in _icons or key in _waiting or key in _broken


def _decode_one() -> bool:
    """A few milliseconds. True while there are more."""
    global _is_warm
    if not _is_warm:  # Blender's first picture takes it 60 ms, for its colour management: before anybody works
        _is_warm = True
        _pixels(_DOT)
    if not _waiting:
        return False
    key = next(iter(_waiting))
    png = _waiting.pop(key)
    if len(_icons) >= MAX_ICONS:
        _icons.clear()
    try:
        pixels = _pixels(png)
        made = _icons.new(key)
        made.image_size = made.icon_size = pixels.shape[1], pixels.shape[0]
        made.image_pixels_float.foreach_set(pixels.ravel())
        made.icon_pixels_float.foreach_set(pixels.ravel())
    except (RuntimeError, ValueError):
        log.warning("a thumbnail cannot be decoded")
        _broken.add(key)
    tasks.redraw()
    return bool(_waiting)


def _pixels(png: bytes) -> np.ndarray[Any, Any]:
    """float32 [h, w, 4], bottom row first. Blender decodes; the image does not outlive this call."""
    image = bpy.data.images.new("Populace Thumbnail", 1, 1)
    try:
        image.source = "FILE"
        image.pack(data=png, data_len=len(png))
        width, height = image.size
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and image.channels == 4):
            raise ValueError("not a thumbnail")
        pixels = np.empty(width * height * 4, np.float32)
        image.pixels.foreach_get(pixels)
        return pixels.reshape(height, width, 4)
    finally:
        bpy.data.images.remove(image)


def register() -> None:
    global _icons
    _icons = previews.new()
    tasks.watchers.append(_decode_one)


def unregister() -> None:
    global _icons
    tasks.watchers.remove(_decode_one)
    _waiting.clear()
    _broken.clear()
    previews.remove(_icons)
    _icons = None
