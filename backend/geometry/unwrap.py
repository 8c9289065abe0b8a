# SPDX-License-Identifier: GPL-3.0-or-later
"""UV coordinates: an atlas of projections that takes no search, or xatlas.

The atlas cuts the surface by region and by the side that a face looks to, in the region's own frame, so a limb gives
four long charts and two caps. Every chart is projected along its side. What would overlap there (a fold, an armpit)
moves to charts of its own. Charts are packed as rectangles.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.geometry.clean import face_components, half_edge_twins
from backend.geometry.mesh import TriMesh
from backend.protocol import PopulaceError

log = logging.getLogger(__name__)

# A face may join a chart whose direction is at most this far (cosine) from its normal: at most 3 times stretched.
_STEEPEST = 0.34
# What one like-minded neighbour is worth against the cosine when borders between sides are smoothed.
_NEIGHBOUR = 0.25
# Charts of fewer faces join a neighbour, if they can.
_TINY = 24


def unwrap(
    mesh: TriMesh,
    region: Int[Tensor, " V"],
    texture_size: int,
    method: Literal["atlas", "xatlas"] = "atlas",
    density: Float[Tensor, " R"] | None = None,
) -> TriMesh:
    """`mesh` with uvs in 0..1, origin bottom-left: no overlaps, mirrored nowhere, charts at least `gap(texture_size)`
    texels apart. `density`: texels per area of each region relative to the others. xatlas knows no regions.

    Raises `internal_error` if xatlas is asked for and not installed.
    """
    vertices = np.ascontiguousarray(mesh.vertices.detach().cpu().numpy(), np.float64)
    faces = np.ascontiguousarray(mesh.faces.cpu().numpy())
    if method == "xatlas":
        uvs, corners = _xatlas(vertices, faces, texture_size)
    else:
        weights = None if density is None else density.cpu().numpy().astype(np.float64)
        uvs, corners = _atlas(vertices, faces, region.cpu().numpy().astype(np.int64), texture_size, weights)
    device = mesh.vertices.device
    return dataclasses.replace(
        mesh, uvs=torch.from_numpy(uvs.astype(np.float32)).to(device), face_uvs_idx=torch.from_numpy(corners).to(device)
    )


def gap(texture_size: int) -> int:
    """Least distance between charts in texels: two levels of mipmaps at 1024 do not mix them."""
    return max(4, texture_size // 256)


def _atlas(
    vertices: Float[np.ndarray, "V 3"],
    faces: Int[np.ndarray, "F 3"],
    region: Int[np.ndarray, " V"],
    texture_size: int,
    density: Float[np.ndarray, " R"] | None,
) -> tuple[Float[np.ndarray, "U 2"], Int[np.ndarray, "F 3"]]:
    a, b, c = region[faces].T
    face_region = np.where(b == c, b, a)  # what two of three corners say
    normals = np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])
    areas = np.linalg.norm(normals, axis=1) / 2
    normals /= np.maximum(2 * areas, 1e-30)[:, None]
    frames = _frames(vertices[faces].mean(1), areas, face_region)
    twins = half_edge_twins(faces, len(vertices))
    same_region = (twins >= 0) & (face_region[twins // 3] == face_region[:, None])

    cosines = np.einsum("fi,fdi->fd", normals, frames[face_region])
    cosines = np.concatenate([cosines, -cosines], 1)  # towards +x, +y, +z, -x, -y, -z of the frame
    side = _smooth(cosines.argmax(1), cosines, np.where(same_region, twins, -1))
    side += 6 * face_region
    directions = np.concatenate([frames, -frames], 1).reshape(-1, 3)
    for _ in range(3):
        side = _merge_tiny(side, twins, normals, directions)
    direction, x_axis = directions[side], directions[side // 6 * 6 + (side + 1) % 3]
    flat = _project(vertices, faces, direction, x_axis)
    depth = np.einsum("fi,fi->f", vertices[faces].mean(1), direction)
    chart, count = _charts(side, twins)
    layer, rounds, cell = side, 0, float(np.sqrt(areas.mean()))
    moved = np.flatnonzero(_hidden(flat, chart, count, depth, cell))
    while moved.size:  # what stayed has lost all it overlapped with: only what moved is looked at again
        rounds += 1  # after a few rounds every face that is still hidden gets a chart of its own
        fresh = layer[moved] + len(directions) if rounds < 6 else rounds * len(directions) + moved
        layer = layer.copy()
        layer[moved] = fresh
        chart, count = _charts(layer, twins)
        moved = moved[_hidden(flat[moved], chart[moved], count, depth[moved], cell)]

    scale = np.ones(count) if density is None else np.sqrt(density[face_region[_first_face(chart, count)]])
    keys, corners = np.unique((chart[:, None] * len(vertices) + faces).reshape(-1), return_inverse=True)
    corners = corners.reshape(-1, 3)
    local = np.empty((len(keys), 2))
    local[corners.reshape(-1)] = flat.reshape(-1, 2)
    owner = keys // len(vertices)
    local *= scale[owner, None]
    uvs, texels = _pack(local, owner, count, texture_size)
    log.info("atlas: %d charts, %d rounds of taking folds apart, %.0f texels per metre", count, rounds, texels)
    return uvs, corners


def _frames(
    centres: Float[np.ndarray, "F 3"], areas: Float[np.ndarray, " F"], region: Int[np.ndarray, " F"]
) -> Float[np.ndarray, "R 3 3"]:
    """Right-handed axes per region, as rows: y along the region where it is clearly elongated, else upright; z as far
    to the front as can be."""
    frames = np.tile(np.eye(3), (region.max() + 1, 1, 1))
    for r in np.unique(region):
        chosen = region == r
        weight = areas[chosen] / max(areas[chosen].sum(), 1e-30)
        offset = centres[chosen] - (centres[chosen] * weight[:, None]).sum(0)  # no BLAS: its sums hang on its threads
        spread, axes = np.linalg.eigh(np.einsum("fi,fj,f->ij", offset, offset, weight))
        if spread[2] > 3 * spread[1]:
            along = axes[:, 2] * np.sign(axes[np.abs(axes[:, 2]).argmax(), 2])
            front = np.array([0.0, 0.0, 1.0]) if abs(along[2]) < 0.9 else np.array([0.0, 1.0, 0.0])
            across = np.cross(along, front)
            across /= np.linalg.norm(across)
            frames[r] = across, along, np.cross(across, along)
    return frames


def _charts(label: Int[np.ndarray, " F"], twins: Int[np.ndarray, "F 3"]) -> tuple[Int[np.ndarray, " F"], int]:
    """Connected pieces of equal label: chart of each face, number of charts."""
    return face_components(np.where((twins >= 0) & (label[twins // 3] == label[:, None]), twins, -1))


def _first_face(chart: Int[np.ndarray, " F"], count: int) -> Int[np.ndarray, " C"]:
    first = np.empty(count, np.int64)
    first[chart[::-1]] = np.arange(len(chart))[::-1]
    return first


@numba.njit(cache=True, nogil=True)
def _smooth(side, cosines, twins):
    """A few rounds in which every face takes the side that it and its neighbours like best."""
    for _ in range(4):
        before = side.copy()
        for f in range(len(side)):
            best = -1.0
            for d in range(6):
                score = cosines[f, d]
                if score < _STEEPEST:
                    continue
                for i in range(3):
                    if twins[f, i] >= 0 and before[twins[f, i] // 3] == d:
                        score += _NEIGHBOUR
                if score > best:
                    best, side[f] = score, d
    return side


def _merge_tiny(
    side: Int[np.ndarray, " F"],
    twins: Int[np.ndarray, "F 3"],
    normals: Float[np.ndarray, "F 3"],
    directions: Float[np.ndarray, "D 3"],
) -> Int[np.ndarray, " F"]:
    """Give each tiny chart the side of the larger neighbour with which it has the longest border, of those whose
    direction all its faces bear. That may be in another region."""
    chart, count = _charts(side, twins)
    size = np.bincount(chart, minlength=count)
    return _vote(side, twins, normals, directions, chart, size, np.flatnonzero(size[chart] < _TINY))


@numba.njit(cache=True, nogil=True)
def _vote(side, twins, normals, directions, chart, size, tiny):
    """`_merge_tiny` for the faces `tiny`."""
    border = np.zeros((len(size), len(directions)), np.int32)
    for f in tiny:
        for i in range(3):
            if twins[f, i] >= 0 and size[chart[twins[f, i] // 3]] > size[chart[f]]:
                border[chart[f], side[twins[f, i] // 3]] += 1
    for f in tiny:
        for d in range(len(directions)):
            if border[chart[f], d] and (normals[f] * directions[d]).sum() < _STEEPEST / 2:
                border[chart[f], d] = 0
    merged = side.copy()
    for f in tiny:
        best = border[chart[f]].argmax()
        if border[chart[f], best]:
            merged[f] = best
    return merged


@numba.njit(cache=True, nogil=True)
def _project(vertices, faces, direction, x_axis):
    """Corners of each face in the plane across its `direction`, [F, 3, 2], wound as seen from there."""
    flat = np.empty((len(faces), 3, 2))
    for f in range(len(faces)):
        d, x = direction[f], x_axis[f]
        y0, y1, y2 = d[1] * x[2] - d[2] * x[1], d[2] * x[0] - d[0] * x[2], d[0] * x[1] - d[1] * x[0]
        for i in range(3):
            p = vertices[faces[f, i]]
            flat[f, i, 0] = p[0] * x[0] + p[1] * x[1] + p[2] * x[2]
            flat[f, i, 1] = p[0] * y0 + p[1] * y1 + p[2] * y2
    return flat


@numba.njit(cache=True, nogil=True)
def _hidden(flat, chart, count, depth, cell):
    """Faces that overlap another one of their chart and lie behind it. Candidates come from a grid per chart; they
    overlap unless an edge of one has the other on its far side (separating axes), give or take a micrometre."""
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    for f in range(len(flat)):
        for i in range(3):
            for k in range(2):
                low[chart[f], k] = min(low[chart[f], k], flat[f, i, k])
                high[chart[f], k] = max(high[chart[f], k], flat[f, i, k])
    width = np.empty(count, np.int64)
    base = np.zeros(count + 1, np.int64)
    for c in range(count):
        width[c] = 0
        base[c + 1] = base[c]
        if low[c, 0] > high[c, 0]:
            continue  # none of the faces
        width[c] = int((high[c, 0] - low[c, 0]) / cell) + 1
        base[c + 1] = base[c] + width[c] * (int((high[c, 1] - low[c, 1]) / cell) + 1)
    box = np.empty((len(flat), 4), np.int64)
    start = np.zeros(base[count] + 1, np.int64)
    for f in range(len(flat)):
        for k in range(2):
            least = min(flat[f, 0, k], flat[f, 1, k], flat[f, 2, k])
            most = max(flat[f, 0, k], flat[f, 1, k], flat[f, 2, k])
            box[f, k] = int((least - low[chart[f], k]) / cell)
            box[f, 2 + k] = int((most - low[chart[f], k]) / cell)
        for y in range(box[f, 1], box[f, 3] + 1):
            for x in range(box[f, 0], box[f, 2] + 1):
                start[base[chart[f]] + y * width[chart[f]] + x + 1] += 1
    for n in range(base[count]):
        start[n + 1] += start[n]
    fill = start[:-1].copy()
    members = np.empty(start[-1], np.int64)
    hidden = np.zeros(len(flat), np.bool_)
    for f in range(len(flat)):
        for y in range(box[f, 1], box[f, 3] + 1):
            for x in range(box[f, 0], box[f, 2] + 1):
                here = base[chart[f]] + y * width[chart[f]] + x
                for n in range(start[here], fill[here]):
                    g = members[n]
                    # meet a pair once, in the first cell that both boxes have
                    if x != max(box[f, 0], box[g, 0]) or y != max(box[f, 1], box[g, 1]):
                        continue
                    if not (_apart(flat[f], flat[g]) or _apart(flat[g], flat[f])):
                        hidden[f if depth[f] < depth[g] else g] = True
                members[fill[here]] = f
                fill[here] += 1
    return hidden


@numba.njit(cache=True, nogil=True)
def _apart(p, q):
    """Whether an edge of triangle p has all of q on its outer side. Triangles without area are apart from all."""
    for i in range(3):
        ax, ay = p[i, 0], p[i, 1]
        ux, uy = p[(i + 1) % 3, 0] - ax, p[(i + 1) % 3, 1] - ay
        limit = 1e-6 * np.sqrt(ux * ux + uy * uy)
        outside = True
        for j in range(3):
            outside = outside and ux * (q[j, 1] - ay) - uy * (q[j, 0] - ax) <= limit
        if outside:
            return True
    return False


def _pack(
    local: Float[np.ndarray, "U 2"], owner: Int[np.ndarray, " U"], count: int, texture_size: int
) -> tuple[Float[np.ndarray, "U 2"], float]:
    """Place the charts, each upright in its rectangle, as large as they fit. Returns uvs and texels per unit."""
    starts = np.searchsorted(owner, np.arange(count))  # `owner` ascends
    low, high = np.minimum.reduceat(local, starts), np.maximum.reduceat(local, starts)
    lying = (high - low)[:, 0] > (high - low)[:, 1]
    turned = np.stack([-local[:, 1], local[:, 0]], 1)  # a quarter turn, no mirroring
    local = np.where(lying[owner, None], turned, local)
    low, high = np.minimum.reduceat(local, starts), np.maximum.reduceat(local, starts)
    size = high - low
    margin = gap(texture_size)
    room = texture_size - margin  # half a margin at each border
    fits, fails = 0.0, 1.5 * room / np.sqrt(np.maximum(size[:, 0] * size[:, 1], 1e-12).sum())
    corner = np.empty((count, 2))
    orders = [np.argsort(-key, kind="stable") for key in (size[:, 1], size[:, 0], size.prod(1))]
    while fits == 0.0 or fails - fits > 2e-3 * fits:
        texels = (fits + fails) / 2
        if texels * size.max() < 1e-3:
            raise PopulaceError(
                "internal_error", f"{count} charts do not fit a texture of {texture_size} texels.",
                "Take a larger texture or fewer faces."
            )  # fmt: skip
        cells = np.ceil(size * texels).astype(np.int64) + margin
        for order in orders:
            placed = _skyline(cells[order], room)
            if len(placed):
                corner[order] = placed
                fits = texels
                break
        else:
            fails = texels
    return ((local - low[owner]) * fits + corner[owner] + margin) / texture_size, fits


@numba.njit(cache=True, nogil=True)
def _skyline(cells, room):
    """Put each rectangle where its top edge comes lowest; lower left corners, or nothing if they do not fit in a
    square of side `room` (Jylanki 2010, skyline bottom-left)."""
    top = np.zeros(room, np.int64)  # of what is placed so far, per column
    placed = np.empty((len(cells), 2))
    for n in range(len(cells)):
        w, h = cells[n]
        best, at = room - h + 1, -1
        x = 0
        while x + w <= room:
            y = 0
            for k in range(w - 1, -1, -1):  # from the right: the highest column that blocks tells how far to jump
                if top[x + k] > y:
                    y = top[x + k]
                    if y >= best:
                        break
            if y < best:
                best, at = y, x
            blocked = x + 1
            for k in range(w - 1, -1, -1):
                if top[x + k] >= best:
                    blocked = x + k + 1
                    break
            x = blocked
        if at < 0:
            return np.empty((0, 2))
        placed[n, 0], placed[n, 1] = at, best
        for k in range(w):
            top[at + k] = best + h
    return placed


def _xatlas(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], texture_size: int
) -> tuple[Float[np.ndarray, "U 2"], Int[np.ndarray, "F 3"]]:
    """Charts of low stretch. Slow: seconds for 30 000 faces."""
    try:
        import xatlas
    except ImportError:
        raise PopulaceError(
            "internal_error", "The unwrap method 'xatlas' needs the package xatlas, which is not installed.",
            "Install it with: pip install xatlas, or choose 'atlas'."
        ) from None  # fmt: skip
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    pack = xatlas.PackOptions()
    pack.resolution, pack.padding = texture_size, gap(texture_size) + 2  # some is lost in fitting the square
    atlas.generate(pack_options=pack)
    _, corners, uvs = atlas[0]
    size = np.array([atlas.width, atlas.height])
    margin = gap(texture_size) / 2
    uvs = uvs.astype(np.float64) * size / size.max()
    return uvs * (1 - 2 * margin / texture_size) + margin / texture_size, corners.astype(np.int64)
