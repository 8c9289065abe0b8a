# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures of meshes for people and for tests: studio light, flat colour, normals, depth, mask, contact sheets.

Light is computed in linear light and in camera space: the studio turns with the camera, so that a back view is as well
lit as a front view. Images are float in 0..1, sRGB, top row first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from .camera import Camera, orbit, to_clip
from .rasterize import interpolate, rasterize, texture

BACKGROUND = (0.86, 0.87, 0.88)  # sRGB

# direction to the light in camera space (x right, y up, z to the viewer), colour times strength in linear light
KEY = ((-0.45, 0.55, 0.70), (2.05, 1.98, 1.88))
FILL = ((0.75, 0.10, 0.65), (0.50, 0.54, 0.60))
RIM = ((0.35, 0.60, -0.72), (1.10, 1.12, 1.18))
AMBIENT_SKY, AMBIENT_GROUND = (0.30, 0.31, 0.33), (0.16, 0.15, 0.14)


def vertex_normals(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, "V 3"]:
    """Unit normals, mean of the adjacent faces weighted by area; zero where a vertex has no face."""
    a, b, c = vertices[faces.long()].unbind(1)
    face_normals = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros_like(vertices)
    for corner in faces.long().unbind(1):
        sums = sums.index_add(0, corner, face_normals)
    return functional.normalize(sums, dim=-1)


def to_linear(srgb: Tensor) -> Tensor:
    """sRGB 0..1 to linear light."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: Tensor) -> Tensor:
    """Linear light to sRGB 0..1, clipped."""
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def studio(color: Float[Tensor, "... 3"], normal: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """Matt surface under key, fill and rim light and a sky. `color` is linear, `normal` unit and in camera space; the
    result is linear."""
    up = normal[..., 1:2] * 0.5 + 0.5
    light = normal.new_tensor(AMBIENT_GROUND) * (1 - up) + normal.new_tensor(AMBIENT_SKY) * up
    for direction, strength in (KEY, FILL, RIM):
        towards = functional.normalize(normal.new_tensor(direction), dim=0)
        light = light + (normal @ towards).clamp(min=0)[..., None] * normal.new_tensor(strength) / math.pi
    return color * light * 1.25


def render_mesh(
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    camera: Camera,
    resolution: tuple[int, int],
    colors: Float[Tensor, "V 3"] | None = None,
    uvs: Float[Tensor, "U 2"] | None = None,
    face_uvs_idx: Int[Tensor, "F 3"] | None = None,
    base_color: Float[Tensor, "h w 3"] | None = None,
    normals: Float[Tensor, "V 3"] | None = None,
    supersample: int = 2,
    background: Sequence[float] = BACKGROUND,
) -> dict[str, Float[Tensor, "B H W C"]]:
    """Images of (height, width) pixels by B cameras, each averaged from `supersample`^2 samples a pixel.

    Colour comes from `base_color` (sRGB 0..1, through the UVs), else from `colors` (sRGB, per vertex), else it is grey.
    Returned: `shaded` and `flat` (sRGB on the background), `normal` (unit, camera space; 0 where nothing is seen),
    `depth` (metres along the line of sight; 0 where nothing is seen), `mask` (coverage 0..1).
    """
    faces = faces.long()
    mvp = camera.mvp.reshape(-1, 4, 4).to(vertices)
    view = camera.view.reshape(-1, 4, 4).to(vertices)
    raster = rasterize(to_clip(vertices, mvp), faces, (resolution[0] * supersample, resolution[1] * supersample))
    mask = raster.mask[..., None].to(vertices.dtype)

    seen = to_clip(vertices, view)[..., :3]
    depth = -interpolate(seen, raster, faces)[..., 2:]
    if normals is None:
        normals = vertex_normals(vertices, faces)
    turned = interpolate(normals @ view[:, :3, :3].transpose(-1, -2), raster, faces)
    normal = functional.normalize(turned, dim=-1)
    # Both sides of a face are seen; a back side is lit as the surface that it shows.
    away = (normal * interpolate(seen, raster, faces)).sum(dim=-1, keepdim=True) > 0.2 * seen.norm(dim=-1).mean()
    normal = torch.where(away, -normal, normal)

    if base_color is not None:
        if uvs is None or face_uvs_idx is None:
            raise ValueError("base_color needs uvs and face_uvs_idx")
        color = texture(interpolate(uvs, raster, face_uvs_idx), base_color)
    elif colors is not None:
        color = interpolate(colors, raster, faces)
    else:
        color = torch.full_like(normal, 0.7)
    linear = to_linear(color)
    behind = to_linear(vertices.new_tensor(list(background)))

    def shrink(image: Tensor) -> Tensor:
        return functional.avg_pool2d(image.permute(0, 3, 1, 2), supersample).permute(0, 2, 3, 1)

    coverage = shrink(mask)
    covered = coverage.clamp(min=1e-8)
    return {
        "shaded": to_srgb(shrink(studio(linear, normal) * mask + behind * (1 - mask))),
        "flat": to_srgb(shrink(linear * mask + behind * (1 - mask))),
        "normal": functional.normalize(shrink(normal * mask), dim=-1),
        "depth": shrink(depth * mask) / covered,
        "mask": coverage,
    }


VIEWS = {"front": 0.0, "three_quarter": math.radians(35), "side": math.radians(90), "back": math.radians(180)}


def render_sheet(
    people: Sequence[tuple[Tensor | np.ndarray, Tensor | np.ndarray, Tensor | np.ndarray | None]],
    views: Sequence[str] = ("front", "back", "face"),
    height: int = 640,
    supersample: int = 2,
    output: str = "shaded",
) -> UInt8[np.ndarray, "H W 3"]:
    """A contact sheet: one row of views per person, each person (vertices [V, 3], faces [F, 3], sRGB colours [V, 3]).

    Views: those of `VIEWS`, all at the same scale of 2.1 m to the height so that sizes compare, and `face`: the top
    0.34 m from the front, slightly turned. `output` is a key of `render_mesh`'s result. Write it with
    `PIL.Image.fromarray(sheet).save(path)`.
    """
    width = height * 9 // 16
    rows = []
    for person in people:
        vertices, faces = (torch.as_tensor(part) for part in person[:2])
        colors = None if person[2] is None else torch.as_tensor(person[2]).float()
        vertices = vertices.float()
        low, high = vertices.amin(dim=0), vertices.amax(dim=0)
        tiles = []
        for view in views:
            if view == "face":
                box = vertices[vertices[:, 1] > high[1] - 0.34]
                middle = (box.amin(dim=0) + box.amax(dim=0)) / 2
                half = middle.new_tensor([0.14, 0.17, 0.14])
                azimuth = math.radians(15)
            else:
                middle = torch.stack([(low[0] + high[0]) / 2, low.new_tensor(0.93), (low[2] + high[2]) / 2])
                half = middle.new_tensor([0.5, 1.05, 0.5])
                azimuth = VIEWS[view]
            frame = torch.stack([middle - half, middle + half])
            camera = orbit(frame, [azimuth], math.radians(4), aspect=width / height)
            images = render_mesh(vertices, faces, camera, (height, width), colors, supersample=supersample)
            image = images[output][0]
            image = image * 0.5 + 0.5 if output == "normal" else image
            tiles.append((image.expand(-1, -1, 3).clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy())
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)
