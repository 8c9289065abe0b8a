# SPDX-License-Identifier: GPL-3.0-or-later
"""The triangle mesh that travels from extraction to baking."""

from __future__ import annotations

from dataclasses import dataclass

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
    normal: Int[Tensor, "H W 3"]  # uint8, tangent space, OpenGL convention (+Y up), MikkTSpace-compatible tangents
