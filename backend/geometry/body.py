# SPDX-License-Identifier: GPL-3.0-or-later
"""What a closed body mesh tells of points near it: nearest triangle, sign, and which of its vertices a viewer sees.

GTA and SIFU ask these of a posed body for every point. Answers are exact but for float64 rounding; nothing here needs
kaolin or pytorch3d. The mesh may be wound either way (a mirrored frame turns faces inside out): outside is where the
volume says, and overlapping limbs count as inside.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from backend.geometry.mesh import signed_volume
from backend.render.visibility import visible_numba

LEAF = 4  # triangles in a leaf of the tree
BINS = 192  # squares per side of the grid over x and y in which triangles are looked up for the sign
FLAT = 1e-6  # in place of |n|^2 of a triangle without area (ICON's and its successors' value)
Z_BUFFER = 2048  # pixels per side


class Nearest(NamedTuple):
    """The triangle nearest to each point, and where the point's foot on its *plane* lies."""

    face: Int[Tensor, " N"]
    weights: Float[Tensor, "N 3"]  # barycentric, unclamped: they sum to 1 and may be negative
    distance: Float[Tensor, " N"]  # to the triangle itself, not to its plane


@dataclass(frozen=True)
class BodyMesh:
    """A closed triangle mesh with a code on its vertices. Everything is on the CPU's side of the world: points from
    other devices are answered there and the answers moved back."""

    vertices: Float[Tensor, "V 3"]
    faces: Int[Tensor, "F 3"]
    codes: Float[Tensor, "V 3"]  # 0..1, about injective: which place of the body this is

    @cached_property
    def outward(self) -> float:
        """1 if faces are counter-clockwise seen from outside, else -1."""
        return 1.0 if signed_volume(self.vertices.detach(), self.faces) >= 0 else -1.0

    @cached_property
    def winding_normals(self) -> Float[Tensor, "V 3"]:
        """Unit vertex normals as the winding has them, faces weighted by area: inward in a mirrored frame."""
        a, b, c = self.vertices[self.faces].unbind(1)
        cross = torch.linalg.cross(b - a, c - a, dim=1)
        total = torch.zeros_like(self.vertices).index_add(0, self.faces.flatten(), cross.repeat_interleave(3, 0))
        return functional.normalize(total, dim=1)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        vertices = self.vertices.detach().cpu().numpy().astype(np.float64)
        return vertices, self.faces.cpu().numpy().astype(np.int64)

    @cached_property
    def _tree(self) -> tuple[np.ndarray, ...]:
        vertices, faces = self._arrays
        order, boxes, children = _grow(vertices[faces])
        return order, vertices[faces[order]].reshape(-1, 9), boxes, children

    @cached_property
    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        vertices, faces = self._arrays
        low = vertices[:, :2].min(0)
        size = np.maximum((vertices[:, :2].max(0) - low) / BINS, 1e-12)
        first, members = _bin(vertices, faces, low, size)
        return low, size, first, members

    def nearest(self, points: Float[Tensor, "N 3"]) -> Nearest:
        """Differentiable with respect to points and vertices, as far as the choice of the triangle goes along."""
        order, corners, boxes, children = self._tree
        where = points.detach().cpu().numpy().astype(np.float64)
        pieces = _in_threads(lambda part: _search(part, corners, order, boxes, children), where)
        face = torch.from_numpy(np.concatenate([piece[0] for piece in pieces])).to(points.device)
        inner = torch.from_numpy(np.concatenate([piece[1] for piece in pieces])).to(points)
        triangles = self.vertices.to(points)[self.faces.to(points.device)[face]]
        foot = (inner[..., None] * triangles).sum(1)
        return Nearest(face, plane_weights(points, triangles), torch.linalg.vector_norm(points - foot, dim=1))

    def inside(self, points: Float[Tensor, "N 3"]) -> Bool[Tensor, " N"]:
        """Where the surface winds around: faces above the point, along z, count +1 or -1 by where they look."""
        vertices, faces = self._arrays
        low, size, first, members = self._columns
        where = points.detach().cpu().numpy().astype(np.float64)
        pieces = _in_threads(lambda part: _wind(part, vertices, faces, low, size, first, members), where)
        return torch.from_numpy(np.concatenate(pieces) * self.outward > 0).to(points.device)

    def signed_distance(self, points: Float[Tensor, "N 3"], nearest: Nearest | None = None) -> Float[Tensor, " N"]:
        """Positive inside, in the units of the vertices."""
        distance = (nearest or self.nearest(points)).distance
        return torch.where(self.inside(points), distance, -distance)

    def carry(self, attributes: Float[Tensor, "V C"], nearest: Nearest) -> Float[Tensor, "N C"]:
        """Attributes of vertices at the points' feet."""
        corners = self.faces.to(attributes.device)[nearest.face.to(attributes.device)]
        weights = nearest.weights.to(attributes)
        return functional.embedding_bag(corners, attributes, per_sample_weights=weights, mode="sum")

    def seen(self, legacy: bool = False) -> Bool[Tensor, " V"]:
        """Which vertices a viewer far up the z axis sees: those of faces that look at the viewer and win a pixel of a
        z-buffer over the square [-1, 1]^2. In a frame whose y points down the answer is the same.

        `legacy` is what the released demo does: of faces that look at the viewer the farthest wins, and the last face
        always counts.
        """
        vertices, faces = self._arrays
        a, b, c = vertices[faces].transpose(1, 0, 2)
        facing = np.nonzero(np.cross(b - a, c - a)[:, 2] * self.outward > 0)[0]
        depth = vertices[:, 2] if legacy else -vertices[:, 2]
        depth = depth / max(1.0, 2 * float(np.abs(depth).max()))  # or the near plane would cut what reaches far
        clip = torch.from_numpy(np.stack([vertices[:, 0], -vertices[:, 1], depth, np.ones(len(depth))], 1))
        won = visible_numba(clip, torch.from_numpy(faces[facing]), (Z_BUFFER, Z_BUFFER)).numpy()
        winners = facing[np.unique(won[won >= 0])]
        if legacy:
            winners = np.append(winners, len(faces) - 1)
        found = np.zeros(len(vertices), bool)
        found[faces[winners].ravel()] = True
        return torch.from_numpy(found)


def plane_weights(points: Float[Tensor, "N 3"], triangles: Float[Tensor, "N 3 3"]) -> Float[Tensor, "N 3"]:
    """Barycentric coordinates of the points' projections on the planes of their triangles (Heidrich 2005)."""
    v0, v1, v2 = triangles.unbind(1)
    e1, e2, w = v1 - v0, v2 - v0, points - v0
    n = torch.linalg.cross(e1, e2, dim=1)
    square = (n * n).sum(1)
    square = torch.where(square == 0, FLAT, square)
    b2 = (torch.linalg.cross(e1, w, dim=1) * n).sum(1) / square
    b1 = (torch.linalg.cross(w, e2, dim=1) * n).sum(1) / square
    return torch.stack([1 - b1 - b2, b1, b2], 1)


def _in_threads(work, points: np.ndarray) -> list:
    """The work on equal pieces of the points, side by side where torch may use several cores."""
    count = max(1, min(torch.get_num_threads(), len(points) // 4096))
    if count == 1:
        return [work(points)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, np.array_split(points, count)))


@numba.njit(cache=True, nogil=True)
def _grow(corners):
    """A tree of boxes: the order of triangles in its leaves, boxes [M, 6], children [M, 2] (of a leaf: minus its first
    place in the order, minus one; and its number of triangles)."""
    count = len(corners)
    order = np.arange(count)
    middle = np.empty((count, 3))
    for i in range(count):
        for k in range(3):
            middle[i, k] = (corners[i, 0, k] + corners[i, 1, k] + corners[i, 2, k]) / 3
    boxes = np.empty((2 * count + 1, 6))
    children = np.zeros((2 * count + 1, 2), np.int64)
    stack = [(0, 0, count)]
    made = 1
    while len(stack):
        node, begin, end = stack.pop()
        box = boxes[node]
        box[:3], box[3:] = np.inf, -np.inf
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        for i in order[begin:end]:
            for k in range(3):
                low[k], high[k] = min(low[k], middle[i, k]), max(high[k], middle[i, k])
                for c in range(3):
                    box[k], box[3 + k] = min(box[k], corners[i, c, k]), max(box[3 + k], corners[i, c, k])
        if end - begin <= LEAF:
            children[node] = -begin - 1, end - begin
            continue
        axis = np.argmax(high - low)
        part = order[begin:end]
        order[begin:end] = part[np.argsort(middle[part, axis], kind="mergesort")]
        half = (begin + end) // 2
        children[node] = made, made + 1
        stack.append((made, begin, half))
        stack.append((made + 1, half, end))
        made += 2
    return order, boxes[:made], children[:made]


@numba.njit(cache=True, nogil=True, inline="always")
def _dot(ax, ay, az, bx, by, bz):
    return ax * bx + ay * by + az * bz


@numba.njit(cache=True, nogil=True)
def _foot(px, py, pz, t):
    """Barycentrics of the point of triangle t [9] nearest to p (Ericson 2005, section 5.1.5), and its squared
    distance."""
    abx, aby, abz = t[3] - t[0], t[4] - t[1], t[5] - t[2]
    acx, acy, acz = t[6] - t[0], t[7] - t[1], t[8] - t[2]
    apx, apy, apz = px - t[0], py - t[1], pz - t[2]
    d1, d2 = _dot(abx, aby, abz, apx, apy, apz), _dot(acx, acy, acz, apx, apy, apz)
    bpx, bpy, bpz = px - t[3], py - t[4], pz - t[5]
    d3, d4 = _dot(abx, aby, abz, bpx, bpy, bpz), _dot(acx, acy, acz, bpx, bpy, bpz)
    cpx, cpy, cpz = px - t[6], py - t[7], pz - t[8]
    d5, d6 = _dot(abx, aby, abz, cpx, cpy, cpz), _dot(acx, acy, acz, cpx, cpy, cpz)
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    if d1 <= 0 and d2 <= 0:
        v, w = 0.0, 0.0
    elif d3 >= 0 and d4 <= d3:
        v, w = 1.0, 0.0
    elif vc <= 0 and d1 >= 0 and d3 <= 0:
        v, w = (d1 / (d1 - d3) if d1 != d3 else 0.0), 0.0
    elif d6 >= 0 and d5 <= d6:
        v, w = 0.0, 1.0
    elif vb <= 0 and d2 >= 0 and d6 <= 0:
        v, w = 0.0, (d2 / (d2 - d6) if d2 != d6 else 0.0)
    elif va <= 0 and d4 - d3 >= 0 and d5 - d6 >= 0:
        span = (d4 - d3) + (d5 - d6)
        w = (d4 - d3) / span if span != 0 else 0.0
        v = 1 - w
    else:
        total = va + vb + vc
        v, w = vb / total, vc / total
    dx, dy, dz = apx - v * abx - w * acx, apy - v * aby - w * acy, apz - v * abz - w * acz
    return v, w, dx * dx + dy * dy + dz * dz


@numba.njit(cache=True, nogil=True)
def _gap(px, py, pz, box):
    """Squared distance of a point to a box."""
    dx = max(box[0] - px, 0.0, px - box[3])
    dy = max(box[1] - py, 0.0, py - box[4])
    dz = max(box[2] - pz, 0.0, pz - box[5])
    return dx * dx + dy * dy + dz * dz


@numba.njit(cache=True, nogil=True)
def _search(points, corners, order, boxes, children):
    """Per point the nearest triangle, of those equally near the one of lowest index, and the weights of its foot.
    `corners` [F, 9] are in the order of the tree."""
    face, weights = np.zeros(len(points), np.int64), np.empty((len(points), 3))
    stack, away = np.empty(128, np.int64), np.empty(128)
    last = 0
    for n in range(len(points)):
        px, py, pz = points[n]
        bv, bw, best = _foot(px, py, pz, corners[last])
        which = last
        stack[0], away[0], top = 0, 0.0, 1
        while top:
            top -= 1
            node = stack[top]
            if away[top] > best:
                continue
            one, two = children[node]
            if one < 0:
                for k in range(-one - 1, -one - 1 + two):
                    v, w, square = _foot(px, py, pz, corners[k])
                    if square < best or (square == best and order[k] < order[which]):
                        best, which, bv, bw = square, k, v, w
                continue
            first, second = _gap(px, py, pz, boxes[one]), _gap(px, py, pz, boxes[two])
            if first < second:
                one, two, first, second = two, one, second, first
            stack[top], away[top] = one, first  # the nearer one is looked at next
            stack[top + 1], away[top + 1] = two, second
            top += 2
        face[n], last = order[which], which
        weights[n, 0], weights[n, 1], weights[n, 2] = 1 - bv - bw, bv, bw
    return face, weights


@numba.njit(cache=True, nogil=True)
def _bin(vertices, faces, low, size):
    """Which faces' boxes touch each square of a grid over x and y: `members[first[s] : first[s + 1]]`."""
    spans = np.empty((len(faces), 4), np.int64)
    counts = np.zeros(BINS * BINS + 1, np.int64)
    for f in range(len(faces)):
        for k in range(2):
            a, b, c = vertices[faces[f, 0], k], vertices[faces[f, 1], k], vertices[faces[f, 2], k]
            spans[f, k] = min(max(int((min(a, b, c) - low[k]) / size[k]) - 1, 0), BINS - 1)
            spans[f, 2 + k] = min(max(int((max(a, b, c) - low[k]) / size[k]) + 1, 0), BINS - 1)
        for i in range(spans[f, 0], spans[f, 2] + 1):
            for j in range(spans[f, 1], spans[f, 3] + 1):
                counts[i * BINS + j + 1] += 1
    first = np.cumsum(counts)
    members, at = np.empty(first[-1], np.int64), first[:-1].copy()
    for f in range(len(faces)):
        for i in range(spans[f, 0], spans[f, 2] + 1):
            for j in range(spans[f, 1], spans[f, 3] + 1):
                members[at[i * BINS + j]] = f
                at[i * BINS + j] += 1
    return first, members


@numba.njit(cache=True, nogil=True)
def _side(a, b, p, vertices):
    """On which side of the line from vertex a to vertex b, seen along z, a point lies. The answer is computed from the
    lower index to the higher, so that both faces of an edge agree; a point on the line is thought of as moved a little
    along x, and less along y."""
    sign = 1.0
    if a > b:
        a, b, sign = b, a, -1.0
    dx, dy = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1]
    e = dx * (p[1] - vertices[a, 1]) - dy * (p[0] - vertices[a, 0])
    if e == 0:
        e = -dy if dy != 0 else dx
    return sign if e > 0 else (-sign if e < 0 else 0.0)


@numba.njit(cache=True, nogil=True)
def _wind(points, vertices, faces, low, size, first, members):
    """How often the surface winds around each point, by the faces above it."""
    winding = np.zeros(len(points), np.int64)
    for n in range(len(points)):
        p = points[n]
        i, j = int(np.floor((p[0] - low[0]) / size[0])), int(np.floor((p[1] - low[1]) / size[1]))
        if i < 0 or j < 0 or i > BINS or j > BINS:
            continue
        square = min(i, BINS - 1) * BINS + min(j, BINS - 1)
        for f in members[first[square] : first[square + 1]]:
            a, b, c = faces[f]
            s = _side(a, b, p, vertices)
            if s == 0 or s != _side(b, c, p, vertices) or s != _side(c, a, p, vertices):
                continue
            va, vb, vc = vertices[a], vertices[b], vertices[c]
            wa = abs((vb[0] - p[0]) * (vc[1] - p[1]) - (vb[1] - p[1]) * (vc[0] - p[0]))
            wb = abs((vc[0] - p[0]) * (va[1] - p[1]) - (vc[1] - p[1]) * (va[0] - p[0]))
            wc = abs((va[0] - p[0]) * (vb[1] - p[1]) - (va[1] - p[1]) * (vb[0] - p[0]))
            total = wa + wb + wc
            z = (wa * va[2] + wb * vb[2] + wc * vc[2]) / total if total > 0 else max(va[2], vb[2], vc[2])
            if z > p[2]:
                winding[n] += int(s)
    return winding
