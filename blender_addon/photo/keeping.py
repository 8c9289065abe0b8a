# SPDX-License-Identifier: GPL-3.0-or-later
"""What photos showed of a person's parts, kept in the .blend as packed images that the person's object holds.

A stored recipe names them by the hash of their bytes, so that all versions of a person share them; a request wants the
bytes themselves. They go when no version needs them any more.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

import bpy

from .. import recipes, scene
from ..messages import inline

log = logging.getLogger(__name__)

KEY: Final = "populace_map"  # on an image: the hash of its bytes
MAPS: Final = "latent_maps"  # in a recipe
MAX_TEXTS: Final = 32


def keep(about: Any, maps: Mapping[str, bytes]) -> dict[str, str]:
    """Hold these PNGs of "PART/photo" on a person; returns what the recipe says instead of them."""
    return {name: _hold(about, name, png) for name, png in maps.items()}


def whole(about: Any, text: str) -> dict[str, Any]:
    """A stored recipe of this person with the maps themselves in it. Raises `BackendError` if it cannot be read."""
    recipe = recipes.parse(text)
    named = recipe.get(MAPS)
    if not isinstance(named, dict) or not named:
        return recipe
    here = {row.sha256: row.image for row in about.maps if row.image is not None and row.image.packed_file is not None}
    if gone := [name for name, sha in named.items() if sha not in here]:
        log.warning("what photos showed is not in this file any more: %s", ", ".join(sorted(gone)))
    return {**recipe, MAPS: {name: _inline(sha, here[sha]) for name, sha in named.items() if sha in here}}


def prune(about: Any) -> None:
    """Let go of what neither the person nor a version of it names."""
    texts = [about.recipe, *(version.recipe for version in about.versions)]
    for i in reversed(range(len(about.maps))):
        row = about.maps[i]
        if not any(row.sha256 in text for text in texts):
            image = row.image
            about.maps.remove(i)
            drop([image])


def take_over(about: Any, other: Any) -> None:
    for row in other.maps:
        mine = about.maps.add()
        mine.sha256, mine.image = row.sha256, row.image


def images_of(objects: Iterable[bpy.types.Object]) -> list[bpy.types.Image]:
    return [row.image for o in objects for row in o.populace.maps if row.image is not None]


def drop(images: Iterable[bpy.types.Image | None]) -> None:
    """Remove those that nobody holds."""
    bpy.data.batch_remove({image for image in images if image is not None and not image.users})


def _hold(about: Any, name: str, png: bytes) -> str:
    sha = hashlib.sha256(png).hexdigest()
    if any(row.sha256 == sha and row.image is not None for row in about.maps):
        return sha
    image = next((image for image in bpy.data.images if image.get(KEY) == sha and image.packed_file), None)
    if image is None:
        stage = scene.Stage()
        try:
            image = scene.packed_image(stage, f"Human {name.replace('/', ' ').title()}", png)
        except BaseException:
            stage.roll_back()
            raise
        image[KEY] = sha
    row = about.maps.add()
    row.sha256, row.image = sha, image
    return sha


def _inline(sha: str, image: bpy.types.Image) -> str:
    if sha not in _texts:
        while len(_texts) >= MAX_TEXTS:
            del _texts[next(iter(_texts))]
        _texts[sha] = inline(bytes(image.packed_file.data))
    return _texts[sha]


_texts: dict[str, str] = {}  # a slider asks for the same ones again and again


@functools.lru_cache(maxsize=4)  # drawn again and again
def facts(text: str) -> Mapping[str, Any]:
    """What the generator said of the photo: camera, rotations and more; {} where there was none."""
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}
