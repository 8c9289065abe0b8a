# SPDX-License-Identifier: GPL-3.0-or-later
"""Normals of a body as pictures from four sides, as the networks were trained to see them; differentiable.

Colours are outward unit normals in the viewer's frame (x right, y up, z to the viewer), -1..1, background 0. Pixels are
those of `grid_sample(align_corners=True)`: the outermost centres lie at +-1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.families.sifu.prior import NETWORK
from backend.geometry.body import BodyMesh
from backend.render.rasterize import rasterize, sample, to_image
from backend.render.silhouette import antialias

FLAT_DEPTH = 0.25  # depths are so much smaller than the other axes, so that nothing reaches beyond the far planes
# Per side: column, row (up) and depth (away from the viewer) of the viewer's frame, each an axis with a sign.
SIDES = {
    "F": ((0, 1), (1, 1), (2, -1)),
    "B": ((0, 1), (1, 1), (2, 1)),  # as seen from behind, then flipped: its pixels lie over the front's
    "R": ((2, 1), (1, 1), (0, -1)),  # what is seen from +x, not mirrored
    "L": ((2, 1), (1, 1), (0, 1)),  # what is seen from -x
}


def clip_of(viewer: Float[Tensor, "V 3"], side: str, size: int) -> Float[Tensor, "V 4"]:
    """Clip coordinates of a parallel view from one side of the cube [-1, 1]^3."""
    (c, cs), (r, rs), (d, ds) = SIDES[side]
    shrink = (size - 1) / size
    return torch.stack([cs * viewer[:, c] * shrink, rs * viewer[:, r] * shrink, ds * FLAT_DEPTH * viewer[:, d],
                        torch.ones_like(viewer[:, 0])], 1)  # fmt: skip


def side_colors(normals: Float[Tensor, "N 3"], legacy: bool = False) -> Float[Tensor, "N 3"]:
    """What the right and left pictures show of outward normals; `legacy` is what the released demo feeds."""
    x, y, z = normals.unbind(1)
    return torch.stack([-z if legacy else z, -y if legacy else y, -x], 1)


def normal_views(
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    size: int,
    sides: Sequence[str] = ("F", "B", "R", "L"),
    legacy_side_normals: bool = False,
    smooth: bool = False,
    topology: Int[Tensor, "E 4"] | None = None,
) -> dict[str, Float[Tensor, "4 S S"]]:
    """Per side the normals and, last, the silhouette. `vertices` are in the network's frame. With `smooth` outlines
    are blended, so that a loss on the pictures moves the vertices."""
    normals = outward_normals(vertices, faces)
    viewer = vertices * vertices.new_tensor(NETWORK)
    pictures = {}
    for side in sides:
        clip = clip_of(viewer, side, size)[None]
        raster = rasterize(clip, faces, (size, size))
        rows = functional.normalize(sample(normals, raster, faces), dim=1)
        if side in ("R", "L"):
            rows = side_colors(rows, legacy_side_normals)
        image = to_image(torch.cat([rows, torch.ones_like(rows[:, :1])], 1), raster)
        if smooth:
            image = antialias(image, raster, clip, faces, topology)
        pictures[side] = image[0].movedim(2, 0)
    return pictures


def outward_normals(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, "V 3"]:
    """Outward unit normals in the viewer's frame, of vertices in the network's: that frame is mirrored, so what the
    winding gives points inward there."""
    body = BodyMesh(vertices, faces, vertices)
    return body.winding_normals * vertices.new_tensor([-1.0, 1.0, -1.0])
