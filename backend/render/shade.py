# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures of meshes for people and for tests: studio light, flat colour, normals, depth, mask, contact sheets.

Light is computed in linear light and in camera space: the studio turns with the camera, so that a back view is as well
lit as a front view. Images are float in 0..1, sRGB, top row first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from backend.geometry.mesh import vertex_normals

from .camera import Camera, orbit, to_clip
from .rasterize import rasterize, sample, texture, to_image

BACKGROUND = (0.86, 0.87, 0.88)  # sRGB
GREY = 0.7  # sRGB, of meshes without colour

# direction to the light in camera space (x right, y up, z to the viewer), linear colour times strength
LIGHTS = (
    ((-0.55, 0.60, 0.58), (0.96, 0.92, 0.87)),  # key
    ((0.75, 0.10, 0.65), (0.13, 0.15, 0.17)),  # fill
    ((0.35, 0.60, -0.72), (0.44, 0.45, 0.47)),  # rim, from behind
)
SKY, GROUND = (0.30, 0.31, 0.33), (0.13, 0.12, 0.11)

VIEWS = {"front": 0.0, "three_quarter": 35.0, "side": 90.0, "back": 180.0}  # azimuths in degrees


@dataclass(frozen=True)
class Maps:
    """Textures with their UVs, origin bottom-left; images have their top row first."""

    uvs: Float[Tensor, "U 2"]
    face_uvs_idx: Int[Tensor, "F 3"]
    base_color: Float[Tensor, "h w 3"]  # sRGB 0..1
    normal: Float[Tensor, "h w 3"] | None = None  # tangent space, OpenGL (+Y up), 0..1 for -1..1


def to_linear(srgb: Tensor) -> Tensor:
    """sRGB 0..1 to linear light (IEC 61966-2-1)."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: Tensor) -> Tensor:
    """Linear light to sRGB 0..1, clipped (IEC 61966-2-1)."""
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def studio(color: Float[Tensor, "N 3"], normal: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """A matt surface under sky, key, fill and rim light. `color` and the result are linear, `normal` is unit and in
    camera space."""
    up = normal[:, 1:2] * 0.5 + 0.5
    light = normal.new_tensor(GROUND) * (1 - up) + normal.new_tensor(SKY) * up
    for direction, strength in LIGHTS:
        towards = functional.normalize(normal.new_tensor(direction), dim=0)
        light = light + (normal @ towards).clamp(min=0)[:, None] * normal.new_tensor(strength)
    return color * light


def render_mesh(
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    camera: Camera,
    resolution: tuple[int, int],
    colors: Float[Tensor, "V 3"] | None = None,
    maps: Maps | None = None,
    supersample: int = 2,
    background: Sequence[float] = BACKGROUND,
) -> dict[str, Float[Tensor, "B H W C"]]:
    """Images of (height, width) pixels by B cameras, each pixel the mean of `supersample`^2 samples.

    Colour comes from `maps`, else from `colors` (sRGB, per vertex), else it is grey. Both sides of a face are seen,
    each lit as a front. Returned: `shaded` and `flat` (sRGB on the sRGB background), `normal` (unit, camera space),
    `depth` (metres along the line of sight), both 0 where nothing is seen, and `mask` (coverage 0..1).
    """
    faces = faces.long()
    view = camera.view.reshape(-1, 4, 4).to(vertices)
    clip = to_clip(vertices, camera.mvp.reshape(-1, 4, 4))
    raster = rasterize(clip, faces, (resolution[0] * supersample, resolution[1] * supersample))
    image_of = torch.div(raster.pixels, raster.face_id[0].numel(), rounding_mode="floor")
    face_of = raster.face_id.flatten()[raster.pixels]

    normal = functional.normalize(sample(vertex_normals(vertices, faces), raster, faces), dim=-1)
    color = vertices.new_full((len(face_of), 3), GREY)
    if maps is not None:
        uvs = sample(maps.uvs, raster, maps.face_uvs_idx)
        color = texture(uvs, maps.base_color)
        if maps.normal is not None:
            tangents, hand = _tangents(vertices, faces, maps)
            tangent = sample(tangents, raster, maps.face_uvs_idx)
            tangent = functional.normalize(tangent - normal * (tangent * normal).sum(dim=1, keepdim=True), dim=1)
            bitangent = torch.linalg.cross(normal, tangent) * hand[face_of, None]
            x, y, z = (texture(uvs, maps.normal) * 2 - 1).split(1, dim=1)
            normal = functional.normalize(tangent * x + bitangent * y + normal * z, dim=1)
    elif colors is not None:
        color = sample(colors, raster, faces)

    a, b, c = clip[:, :, [0, 1, 3]][:, faces].unbind(2)
    back = ((torch.linalg.cross(a, b) * c).sum(dim=-1) < 0)[image_of, face_of]
    normal = (view[image_of, :3, :3] @ normal[:, :, None]).squeeze(-1)
    normal = torch.where(back[:, None], -normal, normal)
    depth = -sample(to_clip(vertices, view)[..., 2:3], raster, faces)
    linear = to_linear(color)
    behind = to_linear(vertices.new_tensor(list(background)))

    def shrink(rows: Tensor) -> Tensor:
        """Rows of visible samples to the image of pixel means; what is not seen counts as 0."""
        image = to_image(rows, raster).permute(0, 3, 1, 2)
        return functional.avg_pool2d(image, supersample).permute(0, 2, 3, 1)

    mask = shrink(torch.ones_like(depth))
    return {
        "shaded": to_srgb(shrink(studio(linear, normal)) + behind * (1 - mask)),
        "flat": to_srgb(shrink(linear) + behind * (1 - mask)),
        "normal": functional.normalize(shrink(normal), dim=-1),
        "depth": shrink(depth) / mask.clamp(min=1e-8),
        "mask": mask,
    }


def _tangents(
    vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"], maps: Maps
) -> tuple[Float[Tensor, "U 3"], Float[Tensor, " F"]]:
    """Direction of growing u per UV vertex, mean of its faces weighted by angle as in MikkTSpace, and the handedness
    +-1 of each face's UVs. A UV vertex is taken to belong to one vertex and to faces of one handedness."""
    index = maps.face_uvs_idx.long()
    corners, uvs = vertices[faces], maps.uvs[index]
    e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    (u1, v1), (u2, v2) = (uvs[:, 1] - uvs[:, 0]).unbind(1), (uvs[:, 2] - uvs[:, 0]).unbind(1)
    hand = torch.where(u1 * v2 - u2 * v1 < 0, -1.0, 1.0).to(vertices)
    along_u = functional.normalize((e1 * v2[:, None] - e2 * v1[:, None]) * hand[:, None], dim=1)
    sums = vertices.new_zeros(len(maps.uvs), 3)
    for k in range(3):
        to_next, to_previous = corners[:, (k + 1) % 3] - corners[:, k], corners[:, (k + 2) % 3] - corners[:, k]
        cosine = functional.cosine_similarity(to_next, to_previous, dim=1).clamp(-1, 1)
        sums = sums.index_add(0, index[:, k], along_u * torch.acos(cosine)[:, None])
    return sums, hand


def render_sheet(
    people: Sequence[tuple[Tensor | np.ndarray, Tensor | np.ndarray, Tensor | np.ndarray | Maps | None]],
    views: Sequence[str] = ("front", "back", "face"),
    height: int = 640,
    supersample: int = 2,
    output: str = "shaded",
) -> UInt8[np.ndarray, "H W 3"]:
    """A contact sheet, one row of views per person; `PIL.Image.fromarray(sheet).save(path)` writes it.

    A person is (vertices [V, 3], faces [F, 3], sRGB colours [V, 3] or `Maps` or None). Views: those of `VIEWS`, all at
    the same scale, 2.1 m to the tile with the feet near its lower edge, so that sizes compare; and `face`, the top
    0.3 m turned a little. `output` is a key of `render_mesh`'s result.
    """
    width = height * 2 // 3
    rows = []
    for vertices, faces, look in people:
        vertices, faces = torch.as_tensor(vertices).float(), torch.as_tensor(faces)
        colors = None if look is None or isinstance(look, Maps) else torch.as_tensor(look).float()
        maps = look if isinstance(look, Maps) else None
        tiles = []
        for view in views:
            camera = face_camera(vertices, width / height) if view == "face" else _body_camera(view, width / height)
            images = render_mesh(vertices, faces, camera, (height, width), colors, maps, supersample)
            image = images["normal"] * 0.5 + 0.5 if output == "normal" else images[output]
            tiles.append((image[0].expand(-1, -1, 3).clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy())
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)


def _body_camera(view: str, aspect: float) -> Camera:
    bounds = torch.tensor([[-0.4, -0.02, -0.4], [0.4, 1.96, 0.4]])
    return orbit(bounds, [math.radians(VIEWS[view])], math.radians(2), math.radians(12), aspect, margin=1.0)


def face_camera(vertices: Float[Tensor, "V 3"], aspect: float) -> Camera:
    top = vertices[:, 1].amax()
    head = vertices[vertices[:, 1] > top - 0.22]
    middle = (head.amin(dim=0) + head.amax(dim=0)) / 2
    middle[1] = top - 0.14
    half = middle.new_tensor([0.09, 0.17, 0.09])
    return orbit(torch.stack([middle - half, middle + half]), [math.radians(15)], 0.0, math.radians(15), aspect)
