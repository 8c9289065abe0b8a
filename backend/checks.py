# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything that can be said against a request before a model is loaded. No torch: the server asks before it queues.

`protocol` knows the form of a request; what a family has (parameters, parts, attributes, codes) its `FamilyInfo` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from backend import families, poses
from backend.protocol import (
    PHOTO_POSE,
    GenerateRequest,
    Mix,
    PopulaceError,
    Remove,
    Reroll,
    SetValues,
    TakeParts,
    Vary,
)

if TYPE_CHECKING:
    from backend.families.base import Attribute, AttributeValue, FamilyInfo

FLOAT32_MAX = 3.4028234e38


def check(request: GenerateRequest) -> None:
    """Raises `unknown_family`, `invalid_request` or `invalid_latents`, each with what there is to choose from."""
    info = families.info(request.family)
    families.check_parameters(request.family, request.parameters)
    if request.photos and "image" not in info.inputs:
        able = [other.name for other in families.infos() if "image" in other.inputs]
        raise PopulaceError("invalid_request", f"The family {request.family!r} makes nobody from photos.",
                            f"These do: {', '.join(able) or 'none yet'}.")  # fmt: skip
    if "seed" not in info.inputs and not request.photos and request.latents is None:
        raise PopulaceError("invalid_request", f"The family {request.family!r} makes people from photos only.",
                            "Give a photo, or choose another family.")  # fmt: skip
    if request.pose not in poses.pose_names() and not (request.photos and request.pose == PHOTO_POSE):
        raise PopulaceError("invalid_request", f"There is no pose called {request.pose!r}.",
                            f"Choose one of: {', '.join(poses.pose_names())}.")  # fmt: skip
    _shape_keys(info, request.shape_keys)
    _codes(info, request.latents or {})
    _parts(info, (name.partition("/")[0] for name in request.latent_maps))
    for edit in request.edits:
        match edit:
            case Mix(other=other):
                _codes(info, other.latents or {})
            case TakeParts(parts=parts, other=other):
                _parts(info, parts)
                _codes(info, other.latents or {})
            case Vary(parts=parts):
                _parts(info, parts or ())
            case Remove(parts=parts) | Reroll(lock=parts):
                _parts(info, parts)
            case SetValues(values=values):
                _values(info, values)
            case _:
                pass


def complete(info: FamilyInfo, names: Iterable[str], body: str) -> None:
    """Raise `invalid_latents` unless these codes are a whole person: the body, and every part with all its codes."""
    found = set(names)
    parts = {body, *(name.partition("/")[0] for name in found)}
    missing = [name for name in info.codes if name.partition("/")[0] in parts and name not in found]
    if missing:
        raise PopulaceError("invalid_latents", f"Latents are missing: {', '.join(missing)}.",
                            "Send all codes of every part that is worn.")  # fmt: skip


def _codes(info: FamilyInfo, latents: Mapping[str, list[list[float]]]) -> None:
    for name, rows in latents.items():
        if name not in info.codes:
            raise PopulaceError("invalid_latents", f"The family {info.name!r} has no latents called {name!r}.",
                                f"It has: {', '.join(info.codes)}.")  # fmt: skip
        code, found = info.codes[name], (len(rows), len(rows[0]))
        if any(want not in (0, has) for want, has in zip((code.rows, code.size), found)):
            raise PopulaceError(
                "invalid_latents", f"Latents {name!r} are {found[0]}x{found[1]} numbers instead of "
                f"{code.rows or 'any'}x{code.size or 'any'}.",
                "Send latents of a person of the same family and version."
            )  # fmt: skip
        if not all(abs(x) <= FLOAT32_MAX for row in rows for x in row):
            raise PopulaceError("invalid_latents", f"Latents {name!r} are too large for float32.", "Send smaller ones.")


def _shape_keys(info: FamilyInfo, names: Iterable[str]) -> None:
    numbers = [attribute.name for attribute in info.attributes if attribute.kind == "number" and attribute.shape]
    for name in names:
        if name not in numbers:
            raise PopulaceError("invalid_request", f"The family {info.name!r} has no shape keys of {name!r}.",
                                f"It has them of: {', '.join(numbers) or 'nothing'}.")  # fmt: skip


def _parts(info: FamilyInfo, parts: Iterable[str]) -> None:
    for part in parts:
        if part not in info.parts:
            raise PopulaceError("invalid_request", f"The family {info.name!r} has no part {part!r}.",
                                f"It has: {', '.join(info.parts)}.")  # fmt: skip


def _values(info: FamilyInfo, values: Mapping[str, AttributeValue]) -> None:
    known = {attribute.name: attribute for attribute in info.attributes}
    for name, value in values.items():
        if name not in known:
            raise PopulaceError("invalid_request", f"The family {info.name!r} has no attribute {name!r}.",
                                f"It has: {', '.join(known) or 'none'}.")  # fmt: skip
        want = _wanted(known[name], value)
        if want:
            raise PopulaceError("invalid_request", f"Attribute {name!r} cannot be set to that.", f"It is {want}.")


def _wanted(attribute: Attribute, value: AttributeValue) -> str:
    """What the value should have been; empty if it fits."""
    if attribute.kind == "number":
        fits = isinstance(value, (int, float)) and attribute.low <= value <= attribute.high
        return "" if fits else f"a number in {attribute.low:g}..{attribute.high:g} {attribute.unit}".strip()
    if attribute.kind == "color":  # `protocol` lets only colours through as lists
        return "" if isinstance(value, (list, tuple)) else "a colour: three numbers in 0..1 (sRGB)"
    return "" if value in attribute.choices else f"one of: {', '.join(attribute.choices)}"
