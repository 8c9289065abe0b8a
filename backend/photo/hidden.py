# SPDX-License-Identifier: GPL-3.0-or-later
"""On the main road: the baked textures of a person who comes from photos, refined where no photo saw anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from backend.families.base import FamilyModel, HumanField, Latents, Step, no_step
from backend.geometry.mesh import Textures, TriMesh
from backend.photo import diffusion, refine
from backend.photo.refine import Editor, Painted
from backend.photo.symmetric_fill import SymmetricFill
from backend.protocol import GenerateRequest
from backend.settings import Settings

Made = tuple[HumanField, int, TriMesh, Textures]
"""A field, its level of detail, its mesh and its textures, as `pipeline` has them."""

CHUNK = 1 << 15


def editors(request: GenerateRequest, device: torch.device) -> list[Editor]:
    """What the request asks for: nothing, or diffusion, which starts from the symmetric fill. Raises `weights_missing`
    and `weights_corrupt`."""
    if request.inversion.refine != "diffusion":
        return []
    painter = diffusion.load(Settings.load().data_dir, device, request.prompt or "", request.seed % 2**32)
    return [SymmetricFill(), painter] if request.inversion.symmetric else [painter]


def paint(
    made: Sequence[Made], model: FamilyModel, latents: Latents, separate: bool, chosen: Sequence[Editor],
    step: Step = no_step,
) -> list[Made]:  # fmt: skip
    """The same with other base colours, level by level. Without maps of photos or editors nothing changes."""
    if not chosen or not latents.maps:
        return list(made)
    plain = {field.name: field for field in model.decode(replace(latents, maps={}), separate)}
    whole = {name: torch.cat([torch.full_like(pixels[..., :3], 255), pixels[..., 3:]], 2)
             for name, pixels in latents.maps.items()}  # fmt: skip
    none = {name: pixels * pixels.new_tensor([0, 0, 0, 1]) for name, pixels in latents.maps.items()}
    ends = [{field.name: field for field in model.decode(replace(latents, maps=maps), separate)}
            for maps in (whole, none)]  # fmt: skip
    out, levels = list(made), sorted({lod for _, lod, *_ in made})
    for done, level in enumerate(levels):
        mine = [i for i, (_, lod, *_) in enumerate(made) if lod == level]
        parts = [_painted(made[i], plain, ends) for i in mine]
        for editor in chosen:
            colors = refine.refine(parts, editor, lambda stage, x, n=done: step(stage, (n + x) / len(levels)))
            parts = [replace(part, color=color) for part, color in zip(parts, colors, strict=True)]
        for i, part in zip(mine, parts, strict=True):
            field, lod, mesh, textures = made[i]
            pixels = (part.color * 255 + 0.5).to(torch.uint8).to(textures.base_color.device)
            out[i] = field, lod, mesh, replace(textures, base_color=pixels)
    return out


def _painted(one: Made, plain: dict[str, HumanField], ends: list[dict[str, HumanField]]) -> Painted:
    """Field, mesh and texture as `refine` wants them. How far a texel is the photo's is the field's own word (`shown`);
    where it has none, colours are a mean of photo and belief, so what white and black photos make of a place tells."""
    field, _, mesh, textures = one
    color = textures.base_color.to(mesh.vertices) / 255
    place = refine.chart(replace(mesh, vertices=mesh.points), (color.shape[0], color.shape[1]))
    at = place.points[place.covered]

    def whole(values: Tensor, start: Tensor) -> Tensor:
        out = start.clone()
        out[place.covered] = values
        return out

    shown = getattr(field, "shown", None)
    if shown is not None:
        seen = _asked(shown, at)
    else:
        white, black = (_asked(end[field.name].color, at) for end in ends)
        seen = (white - black).mean(1).clamp(0, 1)
    base = whole(_asked(plain[field.name].color, at), color)
    return Painted(mesh, color, whole(seen, torch.ones_like(color[..., 0])), base)


def _asked(ask: Any, points: Float[Tensor, "N 3"]) -> Tensor:
    return torch.cat([ask(chunk) for chunk in points.split(CHUNK)]) if len(points) else points
