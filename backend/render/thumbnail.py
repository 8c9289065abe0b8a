# SPDX-License-Identifier: GPL-3.0-or-later
"""A small picture of a whole person, for lists to choose from: the figure on the left, the face on the right."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from backend.geometry.mesh import TriMesh

from .camera import orbit
from .shade import Maps, face_camera, render_mesh

SIZE = 192  # pixels, square
_BODY_WIDTH = 88
_MAX_TEXTURE = 512  # of each part: nothing finer can be seen
_COLORS = 96  # of the palette; with it a thumbnail has about 6 kB
_BODY_BOX = ((-0.3, -0.02, -0.3), (0.3, 1.9, 0.3))  # metres; the same for all, so that sizes compare


def thumbnail(parts: Sequence[tuple[TriMesh, UInt8[Tensor, "h w 3"]]]) -> bytes:
    """PNG of a person in rest pose: meshes with UVs, each with its base colour. The same parts give the same bytes."""
    vertices, faces, uvs, corners = [], [], [], []
    for i, (mesh, _) in enumerate(parts):
        assert mesh.uvs is not None
        assert mesh.face_uvs_idx is not None
        faces.append(mesh.faces + sum(map(len, vertices)))
        corners.append(mesh.face_uvs_idx + sum(map(len, uvs)))
        vertices.append(mesh.vertices)
        uvs.append((mesh.uvs + mesh.uvs.new_tensor([i, 0])) / mesh.uvs.new_tensor([len(parts), 1]))
    maps = Maps(torch.cat(uvs), torch.cat(corners), torch.cat([_shrunk(color) for _, color in parts], 1))
    points, triangles = torch.cat(vertices), torch.cat(faces)
    box = points.new_tensor(_BODY_BOX) + points.new_tensor([0, 1, 0]) * points[:, 1].amin()
    cameras = ((_BODY_WIDTH, orbit(box, [0.44], 0.03, 0.21, _BODY_WIDTH / SIZE, margin=1.0)),
               (SIZE - _BODY_WIDTH, face_camera(points, 1 - _BODY_WIDTH / SIZE)))  # fmt: skip
    tiles = [render_mesh(points, triangles, camera, (SIZE, width), None, maps)["shaded"][0]
             for width, camera in cameras]  # fmt: skip
    pixels = (torch.cat(tiles, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).quantize(_COLORS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _shrunk(color: UInt8[Tensor, "h w 3"]) -> Float[Tensor, "s s 3"]:
    """The texture as `Maps` want it, all parts alike in size."""
    planes = color.permute(2, 0, 1)[None].float() / 255
    return functional.adaptive_avg_pool2d(planes, min(_MAX_TEXTURE, color.shape[0]))[0].permute(1, 2, 0)
