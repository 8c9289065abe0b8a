# SPDX-License-Identifier: GPL-3.0-or-later
"""Triangles to pixels, with gradients: which face does each pixel centre see, and where on it.

Conventions: clip space is OpenGL's; images have the **top row first** (row 0 is y = +w); pixel centres at half
integers; both sides of a face are seen; faces are clipped at the near plane and cut per pixel at the far plane.

Coverage is exact. Vertices are snapped to 1/256 pixel and edges are evaluated in integers with the top-left rule, so
of faces that share an edge exactly one owns each pixel centre on it: no cracks, no double hits. Among faces at the
same depth the lowest index wins. Hence the portable backends agree bit for bit:

- `numba`: scan conversion on the CPU in bands of rows, two threads;
- `torch`: all candidate fragments at once, any device; the reference twin, and the way on CUDA without nvdiffrast;
- `nvdiffrast`: CUDA when installed; it snaps to 1/16 pixel, so pixels at edges may differ.

A backend only decides visibility. Barycentrics, depth and all gradients are computed here from the visible ids, in
homogeneous coordinates (Olano and Greer 1997: with e_i the edge function of the edge opposite to corner i in (x, y, w),
e_i / sum e is the perspective-correct barycentric), so they are the same everywhere. Silhouettes have no gradient
through the ids; `antialias` gives them one (idea: Laine et al. 2020, "Modular primitives", section 3.4).
"""

from __future__ import annotations

import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Backend = Literal["auto", "numba", "torch", "nvdiffrast"]

SUBPIXEL = 256  # snapping grid per pixel
GUARD = 64.0  # faces are clipped at |x|, |y| = GUARD * w, so that snapped coordinates stay far below 2^31
BANDS = 8  # bands of rows per image that the threads share out
FRAGMENTS = 1 << 22  # candidate fragments that the torch backend holds at once


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


@dataclass(frozen=True)
class _Screen:
    """Screen triangles of one image after clipping, counter-clockwise on the snapped grid."""

    corners: Int[Tensor, "T 3 2"]  # x right, y down, in 1/SUBPIXEL pixels
    plane: Float[Tensor, "T 5"]  # z / w = p0 * column + p1 * row + p2 at pixel centres, kept within [p3, p4]; float64
    face: Int[Tensor, " T"]


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
            face_id = _fill_nvdiffrast(clip, faces, resolution)
        else:
            fill = _fill_numba if backend == "numba" else _fill_torch
            face_id = torch.stack([fill(_to_screen(image, faces, resolution), resolution) for image in clip])
    return _locate(vertices_clip, faces, face_id)


def interpolate(
    attributes: Float[Tensor, "*B V C"], raster: Raster, faces: Int[Tensor, "F 3"]
) -> Float[Tensor, "B H W C"]:
    """Attributes [V, C] or [B, V, C] at the visible points, 0 where nothing is seen. Differentiable with respect to
    the attributes and, through the barycentrics, to the positions. `faces` may index other vertices than those that
    were rasterised, as long as face i is still face i: UVs have their own index."""
    batch, row, column = torch.nonzero(raster.mask, as_tuple=True)
    corners = faces.long()[raster.face_id[batch, row, column]]
    values = attributes[corners] if attributes.ndim == 2 else attributes[batch[:, None], corners]
    weights = raster.barycentrics[batch, row, column].to(values.dtype)
    image = values.new_zeros(*raster.face_id.shape, values.shape[-1])
    return image.index_put((batch, row, column), (values * weights[..., None]).sum(dim=1))


def texture(uvs: Float[Tensor, "B H W 2"], image: Float[Tensor, "h w C"]) -> Float[Tensor, "B H W C"]:
    """Bilinear look-up. UV origin is bottom-left, the image has its top row first; edges are clamped."""
    grid = torch.stack([uvs[..., 0] * 2 - 1, 1 - uvs[..., 1] * 2], dim=-1)
    planes = image.permute(2, 0, 1)[None].expand(len(uvs), -1, -1, -1)
    found = functional.grid_sample(planes, grid.to(image.dtype), padding_mode="border", align_corners=False)
    return found.permute(0, 2, 3, 1)


def _best_backend(device: torch.device) -> Backend:
    if device.type == "cuda":
        return "nvdiffrast" if importlib.util.find_spec("nvdiffrast") else "torch"
    return "numba" if device.type == "cpu" else "torch"


# --- from clip space to snapped screen triangles ---------------------------------------------------------------------


def _to_screen(clip: Float[Tensor, "V 4"], faces: Int[Tensor, "F 3"], resolution: tuple[int, int]) -> _Screen:
    """Clip, snap, wind and drop triangles. All in float64 and, from the snapping on, in integers."""
    height, width = resolution
    x, y, z, w = clip.unbind(-1)
    inside = torch.stack([z + w, GUARD * w - x, GUARD * w + x, GUARD * w - y, GUARD * w + y], dim=-1) >= 0
    outside = ~(inside & torch.isfinite(clip).all(dim=-1, keepdim=True))[faces]  # [F, 3, planes]
    beyond = (torch.stack([z > w, x > w, x < -w, y > w, y < -w], dim=-1)[faces].all(dim=1)).any(dim=-1)
    hidden = outside.all(dim=1).any(dim=-1) | beyond
    crossing = outside.flatten(1).any(dim=-1) & ~hidden
    whole = torch.nonzero(~crossing & ~hidden).squeeze(-1)
    triangles, source = clip[faces[whole]], whole
    if crossing.any():
        cut, cut_source = _clip_faces(clip, faces, torch.nonzero(crossing).squeeze(-1))
        triangles, source = torch.cat([triangles, cut]), torch.cat([source, cut_source])

    ndc = triangles[..., :3] / triangles[..., 3:]
    size = ndc.new_tensor([width, height])
    pixels = (ndc[..., :2] * ndc.new_tensor([0.5, -0.5]) + 0.5) * size
    corners = torch.floor(pixels * SUBPIXEL + 0.5).long()
    a, b, c = corners.unbind(1)
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    corners = torch.where((area < 0)[:, None, None], corners[:, [0, 2, 1]], corners)

    # depth as a plane over the screen, from the unsnapped corners
    (ax, ay), (bx, by), (cx, cy) = (corner.unbind(-1) for corner in pixels.unbind(1))
    az, bz, cz = ndc[..., 2].unbind(-1)
    denominator = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    p0 = ((bz - az) * (cy - ay) - (cz - az) * (by - ay)) / denominator
    p1 = ((cz - az) * (bx - ax) - (bz - az) * (cx - ax)) / denominator
    p2 = az + p0 * (0.5 - ax) + p1 * (0.5 - ay)
    plane = torch.stack([p0, p1, p2, ndc[..., 2].amin(dim=1), ndc[..., 2].amax(dim=1)], dim=-1)
    # An edge-on face can gain area by snapping though it has none and no depth plane; it is not seen.
    keep = (area != 0) & torch.isfinite(plane).all(dim=-1)
    return _Screen(corners[keep], plane[keep], source[keep])


def _clip_faces(
    clip: Float[Tensor, "V 4"], faces: Int[Tensor, "F 3"], which: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "T 3 4"], Int[Tensor, " T"]]:
    """Sutherland-Hodgman in homogeneous space for the few faces that need it. A new corner is computed from the
    inner to the outer end of its edge, whichever face asks, so that neighbours get the same corner and stay closed."""
    planes = clip.new_tensor(
        [[0, 0, 1, 1], [-1, 0, 0, GUARD], [1, 0, 0, GUARD], [0, -1, 0, GUARD], [0, 1, 0, GUARD]]
    ).cpu().numpy()
    corners = clip[faces[which]].cpu().numpy()
    triangles, sources = [], []
    for polygon, source in zip(corners, which.tolist()):
        points = list(polygon) if np.isfinite(polygon).all() else []
        for plane in planes:
            kept = []
            distances = [float(plane @ point) for point in points]
            for i, (point, distance) in enumerate(zip(points, distances)):
                previous, before = points[i - 1], distances[i - 1]
                if (distance >= 0) != (before >= 0):
                    inner, outer = (point, previous) if distance >= 0 else (previous, point)
                    d_in, d_out = (distance, before) if distance >= 0 else (before, distance)
                    kept.append(inner + (outer - inner) * (d_in / (d_in - d_out)))
                if distance >= 0:
                    kept.append(point)
            points = kept
        for i in range(1, len(points) - 1):
            if points[0][3] > 0 and points[i][3] > 0 and points[i + 1][3] > 0:
                triangles.append(np.stack([points[0], points[i], points[i + 1]]))
                sources.append(source)
    found = torch.from_numpy(np.array(triangles).reshape(-1, 3, 4)).to(clip)
    return found, torch.tensor(sources, dtype=torch.long, device=clip.device)


# --- visibility ------------------------------------------------------------------------------------------------------


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="rasterize")


def _fill_numba(screen: _Screen, resolution: tuple[int, int]) -> Int[Tensor, "H W"]:
    height, width = resolution
    face_id = np.full((height, width), -1, dtype=np.int64)
    depth = np.full((height, width), np.inf)
    arrays = (screen.corners.cpu().numpy(), screen.plane.cpu().numpy(), screen.face.cpu().numpy())
    rows = np.linspace(0, height, BANDS + 1).astype(np.int64)
    # Threads of our own and a kernel without the GIL: numba's parallel loops forbid calls from two threads at once.
    jobs = [_threads().submit(_scan, *arrays, rows[i], rows[i + 1], depth, face_id) for i in range(BANDS)]
    for job in jobs:
        job.result()
    return torch.from_numpy(face_id).to(screen.face.device)


@numba.njit(nogil=True, cache=True)
def _scan(corners, plane, face, row_begin, row_end, depth, face_id):  # pragma: no cover (compiled)
    """Rows [row_begin, row_end) of one image: the nearest face of every pixel centre, lowest index on a tie."""
    width = face_id.shape[1]
    for t in range(corners.shape[0]):
        ax, ay = corners[t, 0, 0], corners[t, 0, 1]
        bx, by = corners[t, 1, 0], corners[t, 1, 1]
        cx, cy = corners[t, 2, 0], corners[t, 2, 1]
        # pixel centres lie at SUBPIXEL * i + SUBPIXEL / 2: first and last one inside the bounding box
        top = max((min(ay, by, cy) + SUBPIXEL // 2 - 1) // SUBPIXEL, row_begin)
        bottom = min((max(ay, by, cy) - SUBPIXEL // 2) // SUBPIXEL, row_end - 1)
        left = max((min(ax, bx, cx) + SUBPIXEL // 2 - 1) // SUBPIXEL, 0)
        right = min((max(ax, bx, cx) - SUBPIXEL // 2) // SUBPIXEL, width - 1)
        if top > bottom or left > right:
            continue
        # top-left rule: with y down and positive area a left edge goes up, a top edge goes right
        keep_a = 0 if (cy < by) or (cy == by and cx > bx) else 1
        keep_b = 0 if (ay < cy) or (ay == cy and ax > cx) else 1
        keep_c = 0 if (by < ay) or (by == ay and bx > ax) else 1
        p0, p1, p2, low, high = plane[t, 0], plane[t, 1], plane[t, 2], plane[t, 3], plane[t, 4]
        x = left * SUBPIXEL + SUBPIXEL // 2
        for row in range(top, bottom + 1):
            y = row * SUBPIXEL + SUBPIXEL // 2
            ea = (cx - bx) * (y - by) - (cy - by) * (x - bx) - keep_a
            eb = (ax - cx) * (y - cy) - (ay - cy) * (x - cx) - keep_b
            ec = (bx - ax) * (y - ay) - (by - ay) * (x - ax) - keep_c
            for column in range(left, right + 1):
                if (ea | eb | ec) >= 0:
                    z = min(max(p0 * column + p1 * row + p2, low), high)
                    old = depth[row, column]
                    if z <= 1.0 and (z < old or (z == old and face[t] < face_id[row, column])):
                        depth[row, column] = z
                        face_id[row, column] = face[t]
                ea -= (cy - by) * SUBPIXEL
                eb -= (ay - cy) * SUBPIXEL
                ec -= (by - ay) * SUBPIXEL


def _fill_torch(screen: _Screen, resolution: tuple[int, int]) -> Int[Tensor, "H W"]:
    """The same decision from all (triangle, pixel of its bounding box) pairs, in chunks."""
    height, width = resolution
    corners, plane, face = screen.corners, screen.plane, screen.face
    half = SUBPIXEL // 2
    first = torch.clamp((corners.amin(dim=1) + half - 1) // SUBPIXEL, min=0)
    last = torch.minimum((corners.amax(dim=1) - half) // SUBPIXEL, corners.new_tensor([width - 1, height - 1]))
    extent = torch.clamp(last - first + 1, min=0)
    count = extent.prod(dim=1)
    depth = plane.new_full((height * width,), torch.inf)
    face_id = face.new_full((height * width,), torch.iinfo(torch.int64).max)
    begin, ends = 0, torch.cumsum(count, dim=0)
    while begin < len(count):
        done = int(ends[begin - 1]) if begin else 0
        end = max(int(torch.searchsorted(ends, done + FRAGMENTS, right=True)), begin + 1)
        t = torch.repeat_interleave(torch.arange(begin, end, device=face.device), count[begin:end])
        index = torch.arange(len(t), device=face.device) + done - (ends - count)[t]
        column, row = first[t, 0] + index % extent[t, 0], first[t, 1] + index // extent[t, 0]
        covered = torch.ones_like(t, dtype=torch.bool)
        for i in range(3):
            (sx, sy), (ex, ey) = corners[:, (i + 1) % 3].unbind(-1), corners[:, (i + 2) % 3].unbind(-1)
            dx, dy = ex - sx, ey - sy
            owns = (dy < 0) | ((dy == 0) & (dx > 0))
            edge = dx[t] * (row * SUBPIXEL + half - sy[t]) - dy[t] * (column * SUBPIXEL + half - sx[t])
            covered &= (edge > 0) | ((edge == 0) & owns[t])
        p0, p1, p2, low, high = plane[t].unbind(-1)
        z = torch.minimum(torch.maximum(p0 * column + p1 * row + p2, low), high)
        covered &= z <= 1
        pixel, z, faces = (row * width + column)[covered], z[covered], face[t[covered]]
        nearest = depth.scatter_reduce(0, pixel, z, "amin")
        face_id[nearest < depth] = torch.iinfo(torch.int64).max
        front = z == nearest[pixel]
        face_id = face_id.scatter_reduce(0, pixel[front], faces[front], "amin")
        depth, begin = nearest, end
    return torch.where(torch.isinf(depth), -1, face_id).view(height, width)


@functools.cache
def _nvdiffrast_context(device: torch.device):
    import nvdiffrast.torch as dr  # pyright: ignore[reportMissingImports]

    return dr.RasterizeCudaContext(device=device)  # the OpenGL context fails on machines without a display


def _fill_nvdiffrast(
    clip: Float[Tensor, "B V 4"], faces: Int[Tensor, "F 3"], resolution: tuple[int, int]
) -> Int[Tensor, "B H W"]:
    import nvdiffrast.torch as dr  # pyright: ignore[reportMissingImports]

    flipped = (clip * clip.new_tensor([1, -1, 1, 1])).float().contiguous()  # nvdiffrast has the bottom row first
    found, _ = dr.rasterize(_nvdiffrast_context(clip.device), flipped, faces.int().contiguous(), resolution)
    return found[..., 3].long() - 1


# --- where on the face -----------------------------------------------------------------------------------------------


def _locate(vertices_clip: Float[Tensor, "B V 4"], faces: Int[Tensor, "F 3"], face_id: Int[Tensor, "B H W"]) -> Raster:
    """Barycentrics and depth of the visible points, differentiable with respect to the clip positions."""
    _, height, width = face_id.shape
    batch, row, column = torch.nonzero(face_id >= 0, as_tuple=True)
    corners = vertices_clip[batch[:, None], faces[face_id[batch, row, column]]].double()  # [N, 3, 4]
    x = (column.double() + 0.5) * (2 / width) - 1
    y = 1 - (row.double() + 0.5) * (2 / height)
    # Corners relative to the pixel's ray: then e_i is a 2D cross product, and precise where the pixel is.
    u = corners[..., 0] - x[:, None] * corners[..., 3]
    v = corners[..., 1] - y[:, None] * corners[..., 3]
    edges = torch.roll(u, -1, 1) * torch.roll(v, -2, 1) - torch.roll(v, -1, 1) * torch.roll(u, -2, 1)
    # Snapping lets a centre lie up to 1/512 pixel outside; on slivers that could be far away in the face's own measure.
    weights = torch.clamp(edges / edges.sum(dim=1, keepdim=True), min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    z = (weights * corners[..., 2]).sum(dim=1) / (weights * corners[..., 3]).sum(dim=1)
    at = (batch, row, column)
    barycentrics = vertices_clip.new_zeros(*face_id.shape, 3).index_put(at, weights.to(vertices_clip.dtype))
    depth = vertices_clip.new_ones(face_id.shape).index_put(at, z.to(vertices_clip.dtype))
    return Raster(face_id, barycentrics, depth)
