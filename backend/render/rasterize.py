# SPDX-License-Identifier: GPL-3.0-or-later
"""Triangles to pixels, with gradients: which face does each pixel centre see, and where on it.

Conventions: clip space is OpenGL's; images have the **top row first** (row 0 is y = +w); pixel centres lie at half
integers; both sides of a face are seen; faces are clipped at the near plane and cut per pixel at the far plane.
Coverage is exact: of faces that share an edge exactly one owns each pixel centre, no cracks and no double hits.

A backend only decides visibility: "numba" on the CPU and its reference twin "torch" on any device (see
`visibility`; they agree bit for bit), "nvdiffrast" on CUDA when 0.3.3 or later is installed (older ones take only some
resolutions; it snaps corners to a coarser grid, so pixels at edges may differ). Barycentrics, depth and gradients are
computed here from the visible faces, in homogeneous coordinates (Olano and Greer 1997: e_i / sum e, with e_i the edge
function opposite to corner i in (x, y, w), is the perspective-correct barycentric, also for faces that reach behind
the camera), so they are the same everywhere.
The visible faces have no gradient; `silhouette.antialias` gives one to the outlines.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from .visibility import visible_numba, visible_torch

Backend = Literal["auto", "numba", "torch", "nvdiffrast"]


@dataclass(frozen=True)
class Raster:
    """What the pixels see. Barycentrics and depth carry gradients to the clip positions they were made from."""

    face_id: Int[Tensor, "B H W"]  # int64 index into faces, -1 where nothing is seen
    barycentrics: Float[Tensor, "B H W 3"]  # perspective-correct weights of the three corners; 0 where nothing is seen
    depth: Float[Tensor, "B H W"]  # z / w, -1 near to 1 far; 1 where nothing is seen

    @property
    def mask(self) -> Tensor:
        """bool [B, H, W]"""
        return self.face_id >= 0

    @functools.cached_property
    def pixels(self) -> Int[Tensor, " N"]:
        """Flat indices (batch, row, column) of the pixels that see a face."""
        return torch.nonzero(self.face_id.flatten() >= 0).squeeze(-1)


def rasterize(
    vertices_clip: Float[Tensor, "B V 4"],
    faces: Int[Tensor, "F 3"],
    resolution: tuple[int, int],
    backend: Backend = "auto",
) -> Raster:
    """Visible face, barycentrics and depth of every pixel of B images of (height, width) pixels."""
    if vertices_clip.ndim != 3 or vertices_clip.shape[-1] != 4:
        raise ValueError(f"vertices_clip must be [B, V, 4], got {list(vertices_clip.shape)}")
    faces = faces.long()
    with torch.no_grad():
        clip = vertices_clip.detach().double()
        if backend == "auto":
            backend = _best_backend(vertices_clip.device)
        if backend == "nvdiffrast":
            face_id = _visible_nvdiffrast(clip, faces, resolution)
        else:
            visible = visible_numba if backend == "numba" else visible_torch
            face_id = torch.stack([visible(image, faces, resolution) for image in clip])
    return _locate(vertices_clip, faces, face_id)


def sample(attributes: Float[Tensor, "*B V C"], raster: Raster, faces: Int[Tensor, "F 3"]) -> Float[Tensor, "N C"]:
    """Attributes [V, C] or [B, V, C] at the visible points, one row for each of `raster.pixels`. Differentiable with
    respect to the attributes and, through the barycentrics, to the positions. `faces` may index other vertices than
    those that were rasterised, as long as face i is still face i: UVs have their own index."""
    pixels = raster.pixels
    corners = faces.long().index_select(0, raster.face_id.flatten().index_select(0, pixels))
    if attributes.ndim == 3:
        image_of = torch.div(pixels, raster.face_id[0].numel(), rounding_mode="floor")
        corners = corners + (image_of * attributes.shape[1])[:, None]
    weights = raster.barycentrics.reshape(-1, 3).index_select(0, pixels).to(attributes.dtype)
    table = attributes.reshape(-1, attributes.shape[-1])
    # a weighted sum of three rows of a table per pixel: one fused kernel, with gradients to rows and weights
    return functional.embedding_bag(corners, table, mode="sum", per_sample_weights=weights)


def to_image(rows: Float[Tensor, "N C"], raster: Raster) -> Float[Tensor, "B H W C"]:
    """Rows for `raster.pixels` put in their places, 0 where nothing is seen."""
    image = rows.new_zeros(raster.face_id.numel(), rows.shape[-1]).index_copy(0, raster.pixels, rows)
    return image.view(*raster.face_id.shape, -1)


def interpolate(
    attributes: Float[Tensor, "*B V C"], raster: Raster, faces: Int[Tensor, "F 3"]
) -> Float[Tensor, "B H W C"]:
    """`sample` as an image, 0 where nothing is seen."""
    return to_image(sample(attributes, raster, faces), raster)


def texture(uvs: Float[Tensor, "... 2"], image: Float[Tensor, "h w C"]) -> Float[Tensor, "... C"]:
    """Bilinear look-up. UV origin is bottom-left, the image has its top row first; edges are clamped."""
    grid = torch.stack([uvs[..., 0] * 2 - 1, 1 - uvs[..., 1] * 2], dim=-1).reshape(1, 1, -1, 2).to(image.dtype)
    planes = image.permute(2, 0, 1)[None]
    found = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return found[0, :, 0].t().reshape(*uvs.shape[:-1], -1)


def _best_backend(device: torch.device) -> Backend:
    if device.type != "cuda":
        return "numba"
    return "nvdiffrast" if importlib.util.find_spec("nvdiffrast") else "torch"


@functools.cache
def _nvdiffrast_context(device: torch.device):
    import nvdiffrast.torch as dr  # pyright: ignore[reportMissingImports]

    return dr.RasterizeCudaContext(device=device)  # the OpenGL context fails on machines without a display


def _visible_nvdiffrast(
    clip: Float[Tensor, "B V 4"], faces: Int[Tensor, "F 3"], resolution: tuple[int, int]
) -> Int[Tensor, "B H W"]:
    import nvdiffrast.torch as dr  # pyright: ignore[reportMissingImports]

    flipped = (clip * clip.new_tensor([1, -1, 1, 1])).float().contiguous()  # nvdiffrast has the bottom row first
    found, _ = dr.rasterize(_nvdiffrast_context(clip.device), flipped, faces.int().contiguous(), resolution)
    return found[..., 3].long() - 1


def _locate(vertices_clip: Float[Tensor, "B V 4"], faces: Int[Tensor, "F 3"], face_id: Int[Tensor, "B H W"]) -> Raster:
    """Barycentrics and depth of the visible points, differentiable with respect to the clip positions."""
    count, height, width = face_id.shape
    raster = Raster(face_id, vertices_clip.new_zeros(count, height, width, 3), vertices_clip.new_ones(face_id.shape))
    pixels = raster.pixels
    image_of = torch.div(pixels, height * width, rounding_mode="floor")
    row = torch.div(pixels, width, rounding_mode="floor") - image_of * height
    corners = faces.index_select(0, face_id.flatten().index_select(0, pixels))
    corners = corners + (image_of * vertices_clip.shape[1])[:, None]
    table = vertices_clip.reshape(-1, 4)
    seen = table.index_select(0, corners.t().flatten()).double().t().reshape(4, 3, -1)  # component, corner, pixel
    x, y, z, w = seen.unbind(0)
    # Corners relative to the pixel's ray: then e_i is a 2D cross product, and precise where the pixel is.
    ua, ub, uc = x - w * (((pixels % width).double() + 0.5) * (2 / width) - 1)
    va, vb, vc = y - w * (1 - (row.double() + 0.5) * (2 / height))
    edges = (ub * vc - vb * uc, uc * va - vc * ua, ua * vb - va * ub)
    # Snapping lets a centre lie up to 1/512 pixel outside; on slivers that could be far away in the face's own measure.
    edge_sum = edges[0] + edges[1] + edges[2]
    a, b, c = (torch.clamp(edge / edge_sum, min=0) for edge in edges)
    weight_sum = a + b + c
    a, b, c = a / weight_sum, b / weight_sum, c / weight_sum
    depth = (a * z[0] + b * z[1] + c * z[2]) / (a * w[0] + b * w[1] + c * w[2])
    weights = torch.stack([a, b, c], dim=1)
    flat = raster.barycentrics.view(-1, 3).index_copy(0, pixels, weights.to(table.dtype))
    depths = raster.depth.view(-1).index_copy(0, pixels, depth.to(table.dtype))
    return Raster(face_id, flat.view(count, height, width, 3), depths.view(face_id.shape))
