# SPDX-License-Identifier: GPL-3.0-or-later
"""Smooth outlines with gradients: without them no loss on a mask could move a vertex.

A raster is constant while an outline moves between two pixel centres. `antialias` finds where the outline crosses the
line between the centres and lets the pixel on whose half it falls take a share of the other's colour, so that colour
and coverage change continuously with the vertices. The idea is that of Laine et al. 2020, "Modular primitives for
high-performance differentiable rendering", section 3.4; two things differ:

- The outline's edges are walked, not the pixels' own triangles. Triangles at an outline are seen edge-on and often
  hold no pixel centre; their edges are found all the same.
- Steep edges act between horizontal neighbours, flat ones between vertical neighbours, never both: so a slanted
  outline moves the covered area by what it sweeps, once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .rasterize import Raster


def edge_topology(faces: Int[Tensor, "F 3"]) -> Int[Tensor, "E 4"]:
    """Unique edges: both ends and the corners opposite to them in the two adjacent faces, -1 if there is one face
    only. Of an edge with more faces the first two count. Compute it once for a fixed topology."""
    faces = faces.long()
    ends = torch.cat([faces[:, [1, 2]], faces[:, [2, 0]], faces[:, [0, 1]]]).sort(dim=1).values
    opposite = faces.t().flatten()
    key, order = (ends[:, 0] * (int(faces.max()) + 1 if len(faces) else 1) + ends[:, 1]).sort(stable=True)
    _, count = torch.unique_consecutive(key, return_counts=True)
    first = torch.cumsum(count, dim=0) - count
    second = torch.where(count > 1, opposite[order[(first + 1).clamp(max=len(order) - 1)]], -1)
    return torch.cat([ends[order[first]], opposite[order[first]][:, None], second[:, None]], dim=1)


def antialias(
    image: Float[Tensor, "B H W C"],
    raster: Raster,
    vertices_clip: Float[Tensor, "B V 4"],
    faces: Int[Tensor, "F 3"],
    topology: Int[Tensor, "E 4"] | None = None,
) -> Float[Tensor, "B H W C"]:
    """`image` blended across outlines; differentiable with respect to image and clip positions. `raster` is that of the
    same positions and faces; `topology` is `edge_topology(faces)`, computed here if it is not given. Vertices must be
    shared between faces: an edge with one face is an outline. Edges that reach behind the camera are left as they are.
    """
    topology = edge_topology(faces) if topology is None else topology
    count, height, width, channels = image.shape
    pixels_of = height * width
    depth = torch.where(raster.mask, raster.depth.detach().double(), torch.inf).flatten()
    face_id, positions = raster.face_id.flatten(), vertices_clip.double()

    inner, outer, crossing = [], [], []
    for index in range(count):
        edges, side = _outline(positions[index].detach(), topology)
        ends = positions[index][edges]  # [N, 2, 4]
        z = ends[..., 2] / ends[..., 3]
        x = (ends[..., 0] / ends[..., 3] * 0.5 + 0.5) * width
        y = (ends[..., 1] / ends[..., 3] * -0.5 + 0.5) * height
        steep = (x[:, 1] - x[:, 0]).abs() <= (y[:, 1] - y[:, 0]).abs()
        for chosen, across, along, size, lines, stride, step, turn in (
            (steep, x, y, width, height, width, 1, 1),  # between columns, on every row that the edge spans
            (~steep, y, x, height, width, 1, width, -1),  # between rows, on every column
        ):
            found = _crossings(across[chosen], along[chosen], z[chosen].detach(), side[chosen] * turn, size, lines)
            line, before, inward, offset, edge_depth = found
            base = index * pixels_of + line * stride + before * step
            p, q = torch.where(inward > 0, base + step, base), torch.where(inward > 0, base, base + step)
            # p is on the covered side: it must be nearer than q, and the edge not hidden by what q sees
            seen = (depth[p] < depth[q]) & (edge_depth < depth[q]) & (face_id[p] != face_id[q])
            inner.append(p[seen])
            outer.append(q[seen])
            crossing.append(torch.where(inward > 0, 1 - offset, offset)[seen])
    p, q, t = torch.cat(inner), torch.cat(outer), torch.cat(crossing)
    p, q, t = _outermost(p, q, t)

    share = (t - 0.5).to(image.dtype)
    receiver, giver = torch.where(share > 0, q, p), torch.where(share > 0, p, q)
    flat = image.reshape(-1, channels)
    change = share.abs()[:, None] * (flat.index_select(0, giver) - flat.index_select(0, receiver))
    return flat.index_add(0, receiver, change).view_as(image)


def _outline(positions: Float[Tensor, "V 4"], topology: Int[Tensor, "E 4"]) -> tuple[Tensor, Tensor]:
    """Edges [N, 2] whose faces all lie on one side as seen from the camera, and that side: +1 if it is to the left of
    the edge's direction (with y up), else -1. The side of a corner is the sign of det(end, end, corner) in (x, y, w),
    which holds for corners behind the camera too."""
    xyw = positions[:, [0, 1, 3]]
    a, b, c, d = topology.unbind(1)
    plane = torch.linalg.cross(xyw[a], xyw[b])
    side_c = (plane * xyw[c]).sum(dim=1).sign()
    side_d = torch.where(d < 0, side_c, (plane * xyw[d.clamp(min=0)]).sum(dim=1).sign())
    keep = (side_c == side_d) & (side_c != 0) & (positions[a, 3] > 0) & (positions[b, 3] > 0)
    return topology[keep, :2], side_c[keep]


def _crossings(
    across: Float[Tensor, "N 2"],
    along: Float[Tensor, "N 2"],
    depth: Float[Tensor, "N 2"],
    side: Float[Tensor, " N"],
    size: int,
    lines: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where edges cross the lines through pixel centres at along = i + 0.5, 0 <= i < lines, one entry per crossing:
    line, pixel before it on that line, +1 or -1 for the direction across in which the faces lie, distance from the
    pixel's centre (0..1, differentiable), depth of the edge there. Crossings outside of the image are left out."""
    low, high = along.detach().amin(dim=1), along.detach().amax(dim=1)
    begin = torch.ceil(low - 0.5).clamp(0, lines)  # half-open, so that edges of a chain meet without gap or overlap
    number = (torch.ceil(high - 0.5).clamp(0, lines) - begin).long()
    edge = torch.repeat_interleave(torch.arange(len(number), device=number.device), number)
    index = torch.arange(len(edge), device=edge.device) - (torch.cumsum(number, dim=0) - number)[edge]
    line = begin.long()[edge] + index
    (a0, a1), (s0, s1) = across[edge].unbind(1), along[edge].unbind(1)
    fraction = (line + 0.5 - s0) / (s1 - s0)
    place = a0 + fraction * (a1 - a0) - 0.5
    before = torch.floor(place.detach())
    inward = side[edge] * (s1 - s0).detach().sign()
    edge_depth = depth[edge, 0] + fraction.detach() * (depth[edge, 1] - depth[edge, 0])
    inside = (before >= 0) & (before < size - 1)
    before = before[inside]
    return line[inside], before.long(), inward[inside], place[inside] - before, edge_depth[inside]


def _outermost(p: Tensor, q: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of several crossings between the same two pixels the one farthest out, the first of equals."""
    pair, group = torch.unique(torch.stack([p, q], dim=1), dim=0, return_inverse=True)
    farthest = t.new_full((len(pair),), -torch.inf).scatter_reduce(0, group, t.detach(), "amax")
    index = torch.arange(len(t), device=t.device)
    candidates = t.detach() == farthest[group]
    winner = index.new_full((len(pair),), len(t)).scatter_reduce(0, group[candidates], index[candidates], "amin")
    return p[winner], q[winner], t[winner]
