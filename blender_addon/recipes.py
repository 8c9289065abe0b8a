# SPDX-License-Identifier: GPL-3.0-or-later
"""From what is stored on a person to the request that makes it again, edited or not. Pure Python: no bpy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

from .families import Family
from .messages import BackendError, Request
from .packet import recipe_latents

PREVIEW: Final[Mapping[str, Any]] = {"grid_resolution": 96, "faces": 6000, "texture_size": 512}
OUTPUT: Final = ("pose", "joint_rotations", "separate", "grid_resolution", "faces", "lods", "texture_size", "maps",
                 "shape_keys")  # fmt: skip
"""Fields of a request that say how a person is delivered, not who it is."""


def parse(text: str) -> dict[str, Any]:
    """The stored recipe. Raises `BackendError` when somebody changed it."""
    try:
        recipe = json.loads(text)
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):
        raise _unreadable()
    return recipe


def latents(recipe: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """The exact codes of a person, as a request has them. Raises `BackendError`."""
    try:
        return recipe_latents(recipe)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _unreadable() from None


def person(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """This very person as the other one of an edit. Raises `BackendError`."""
    maps = recipe.get("latent_maps")
    return {"latents": latents(recipe), **({"latent_maps": maps} if maps else {})}


def request_of(recipe: Mapping[str, Any], edits: Sequence[Mapping[str, Any]] = (), **output: Any) -> Request:
    """The request for this very person with `edits` applied. Words and edits that once led to the person are in its
    latents already. Raises `BackendError`."""
    known = {f.name: recipe[f.name] for f in fields(Request) if f.name in recipe}
    known |= {"latents": latents(recipe) or None, "prompt": None, "edits": list(edits), **output}
    return Request(**known)


def preview_of(request: Request) -> Request:
    """The same person, coarse and soon."""
    return replace(request, lods=1, maps="color", shape_keys=[], faces=min(request.faces, PREVIEW["faces"]),
                   grid_resolution=min(request.grid_resolution, PREVIEW["grid_resolution"]),
                   texture_size=PREVIEW["texture_size"])  # fmt: skip


def remark(recipe: Mapping[str, Any], family: Family | None, families: Sequence[Family]) -> str:
    """One sentence when this generator would not make the same person; "" if it would, or if nothing is known."""
    name = recipe.get("family", "")
    if not families:
        return ""
    if family is None:
        return f"This generator has no family \"{name}\": this person cannot be edited here"
    if family.weights_sha256 != (recipe.get("weights_sha256") or ""):
        return "Made with other weights: an edit may change more than you ask for"
    return ""


def _unreadable() -> BackendError:
    return BackendError("bad_recipe", "This person's recipe was changed and cannot be read.",
                        "Undo that change, or make the person anew.")  # fmt: skip
