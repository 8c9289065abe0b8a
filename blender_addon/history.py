# SPDX-License-Identifier: GPL-3.0-or-later
"""What people were and who is worth keeping: versions on the object, favourites in the user's own folder.

A favourite is one JSON file: name, recipe, thumbnail. Its folder outlives updates of the add-on and serves every file.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import bpy

from . import tasks, thumbnails
from .messages import BackendError
from .properties import active_human, other_human, thumbnail_key

log = logging.getLogger(__name__)

FOLDER: Final = "favourites"
MAX_FAVOURITES: Final = 500
MAX_FILE_BYTES: Final = 64 << 20  # people from photos carry what the photos showed
_SCHEMA: Final = 1
_favourites: list[Favourite] = []
_is_fresh = False


@dataclass(frozen=True)
class Favourite:
    """A person kept for later."""

    id: str
    name: str
    recipe: str  # JSON, as on the object
    key: str  # of its thumbnail
    thumbnail: str  # base64


def favourites() -> list[Favourite]:
    """As they were read last; in order of their names."""
    return _favourites


def favourite(favourite_id: str) -> Favourite:
    """Raises `BackendError`."""
    refresh()
    for found in _favourites:
        if found.id == favourite_id:
            return found
    raise BackendError("no_favourite", "This favourite is gone.", "Choose another one.")


def keep(root: bpy.types.Object, name: str) -> Favourite:
    """Make a favourite of a person. Raises `BackendError`."""
    about = root.populace
    thumbnail = next((v.thumbnail for v in reversed(about.versions) if v.recipe == about.recipe), "")
    recipe = json.dumps(about.whole_recipe, sort_keys=True)
    kept = {"schema": _SCHEMA, "name": name, "recipe": recipe, "thumbnail": thumbnail}
    path = _folder() / f"{uuid.uuid4().hex}.json"
    try:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(kept), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise BackendError("disk", f"The favourite could not be saved ({error.strerror}).",
                           "Make room on the disk of your Blender settings.") from None  # fmt: skip
    return favourite(path.stem)


def drop(favourite_id: str) -> None:
    """Raises `BackendError`."""
    found = favourite(favourite_id)
    try:
        (_folder() / f"{found.id}.json").unlink(missing_ok=True)
    except OSError as error:
        raise BackendError("disk", f"The favourite could not be removed ({error.strerror}).", "Try again.") from None
    refresh()


def refresh() -> None:
    """Read the folder again; files that are none of ours are left alone."""
    global _favourites, _is_fresh
    _is_fresh = True
    try:
        paths = sorted(_folder().glob("*.json"))[:MAX_FAVOURITES]
    except (OSError, BackendError):
        paths = []
    found = [_read(path) for path in paths]
    _favourites = sorted((f for f in found if f is not None), key=lambda f: (f.name.casefold(), f.id))


def _read(path: Path) -> Favourite | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != _SCHEMA or not isinstance(json.loads(raw["recipe"]), dict):
            return None
        png = base64.b64decode(raw["thumbnail"])
        return Favourite(path.stem, str(raw["name"])[:60], raw["recipe"], thumbnail_key(png) if png else "",
                         raw["thumbnail"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, binascii.Error):
        log.warning("favourite %s cannot be read", path.name)
        return None


def _folder() -> Path:
    try:
        return Path(bpy.utils.extension_path_user(__package__, path=FOLDER, create=True))
    except (OSError, ValueError):
        raise BackendError("disk", "Blender has no folder for this add-on's data.",
                           "Install Populace as an extension.") from None  # fmt: skip


def _watch() -> bool:
    """Hand on the thumbnails that the panel is about to draw and that are not decoded yet. True if there were any."""
    was_new = False
    if not _is_fresh:
        refresh()
    shown = [root for root in (active_human(bpy.context), other_human(bpy.context)) if root is not None]
    for kept in (*(version for root in shown for version in root.populace.versions), *_favourites):
        if not thumbnails.has(kept.key):
            thumbnails.offer(kept.key, base64.b64decode(kept.thumbnail))
            was_new = True
    return was_new


def register() -> None:
    tasks.watchers.append(_watch)


def unregister() -> None:
    global _is_fresh
    tasks.watchers.remove(_watch)
    _is_fresh = False
