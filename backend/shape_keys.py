# SPDX-License-Identifier: GPL-3.0-or-later
"""Shape keys: what moves each vertex of a person to where it stands at an end of an attribute's range.

Every numeric attribute that moves the surface gives two, NAME_min and NAME_max. The edited person is another field; a
vertex is carried to the same place of it and keeps its distance to the surface, to which a simplified mesh is only
close. So the mesh stays closed, and a key of an attribute that changes nothing is exactly zero. The joints of the
edited person go with the key: who poses a person made taller by a key wants the knees where they are then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backend import families
from backend.families.base import FamilyModel, HumanField, Latents, Step
from backend.geometry.mesh import TriMesh

STEPS = 8  # of Newton's method along the gradient of the distance
STEP_M = 0.02  # no longer than this, or a vertex would cross to the next finger
CLOSE_M = 1e-5


@dataclass(frozen=True)
class ShapeKey:
    """What one key adds, in person space, metres."""

    moves: Sequence[Float[Tensor, "V 3"]]  # to the vertices of each mesh
    joints: Float[Tensor, "J 3"] | None  # to the heads of the bones; None without a rig


def make(
    names: Sequence[str],
    latents: Latents,
    model: FamilyModel,
    made: Sequence[tuple[HumanField, TriMesh]],
    separate: bool,
    step: Step,
) -> dict[str, ShapeKey]:
    """The keys by name, both ends of each attribute; `checks` knows that the names exist.

    Raises what `model.edit` raises.
    """
    keys: dict[str, ShapeKey] = {}
    ends = [
        (f"{attribute.name}_{end}", attribute.name, value)
        for name in names
        for attribute in families.info(model.name).attributes
        if attribute.name == name
        for end, value in (("min", attribute.low), ("max", attribute.high))
    ]
    for i, (key, name, value) in enumerate(ends):
        step("shape keys", i / len(ends))
        edited = model.decode(model.edit(latents, {name: value}), separate=separate)
        others = {field.name: field for field in edited}
        moves = [carried(field, others[field.name], mesh.points) for field, mesh in made]
        keys[key] = ShapeKey(moves, _joints([field for field, _ in made], others))
    return keys


def _joints(fields: Sequence[HumanField], others: Mapping[str, HumanField]) -> Float[Tensor, "J 3"] | None:
    field = next((field for field in fields if field.rig is not None), None)
    other = others[field.name].rig if field is not None else None
    if field is None or field.rig is None or other is None:
        return None
    return other.heads - field.rig.heads


def carried(field: HumanField, other: HumanField, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """How far these field-space points move in person space, from the person of `field` to that of `other`."""
    depth = field.sdf(points)
    moved = field.counterpart(points, other)
    for _ in range(STEPS):
        lack = other.sdf(moved) - depth
        if float(lack.abs().max()) < CLOSE_M:
            break
        gradient = _gradient(other, moved)
        move = -lack[:, None] * gradient / gradient.square().sum(1, keepdim=True).clamp_min(0.25)
        moved = moved + move * (STEP_M / move.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return (moved + other.offset(moved)) - (points + field.offset(points))


def _gradient(field: HumanField, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    with torch.enable_grad():
        at = points.detach().requires_grad_()
        return torch.autograd.grad(field.sdf(at).sum(), at)[0]
