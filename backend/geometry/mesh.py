# SPDX-License-Identifier: GPL-3.0-or-later
"""The triangle mesh that travels from extraction to baking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TriMesh:
    """Triangles, counter-clockwise seen from outside. `vertices` are in person space, `points` the same vertices in
    the field's space (see `families.base`), for asking the field about colour, region and skin."""

    vertices: Float[Tensor, "V 3"]
    faces: Int[Tensor, "F 3"]  # int64
    points: Float[Tensor, "V 3"]
    uvs: Float[Tensor, "U 2"] | None = None
    face_uvs_idx: Int[Tensor, "F 3"] | None = None


@dataclass(frozen=True)
class Textures:
    """Baked maps, top row first as image files have them."""

    base_color: Int[Tensor, "H W 3"]  # uint8 sRGB
    normal: Int[Tensor, "H W 3"] | None = None  # uint8, tangent space, OpenGL convention (+Y up), MikkTSpace tangents
    orm: Int[Tensor, "H W 3"] | None = None  # uint8, glTF's layout: occlusion (255: none), roughness, metallic


def vertex_normals(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, "V 3"]:
    """Smooth unit normals: face normals averaged with the angles at the vertex as weights (Thuermer & Wuethrich 1998),
    as Blender does for smooth shading. (0, 1, 0) at vertices without faces. Differentiable."""
    corners = vertices[faces]  # [F, 3 corners, 3]
    forward = torch.nn.functional.normalize(corners.roll(-1, 1) - corners, dim=2)
    cross = torch.linalg.cross(forward, -forward.roll(1, 1), dim=2)
    angle = torch.atan2(cross.norm(dim=2), -(forward * forward.roll(1, 1)).sum(2))
    flat = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=1)
    weighted = angle[..., None] * torch.nn.functional.normalize(flat, dim=1, eps=1e-20)[:, None]
    total = torch.zeros_like(vertices).index_add(0, faces.flatten(), weighted.flatten(0, 1))
    length = total.norm(dim=1, keepdim=True)
    up = total.new_tensor([0.0, 1.0, 0.0]).expand_as(total)
    return torch.where(length > 1e-12, total / length.clamp_min(1e-12), up)


def signed_volume(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> float:
    """Cubic metres inside; negative if the faces are wound inward."""
    a, b, c = vertices.double()[faces].unbind(1)
    return float((a * torch.linalg.cross(b, c, dim=1)).sum()) / 6
