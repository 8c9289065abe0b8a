# SPDX-License-Identifier: GPL-3.0-or-later
"""FlexiCubes (Shen et al. 2023, "Flexible isosurface extraction for gradient-based mesh optimization"): dual marching
cubes whose vertices move by learned weights, differentiable in positions, values and weights.

A cube that the surface crosses holds one vertex per sheet of surface in it (Nielson 2004). Its place is a mean of the
crossings on the sheet's edges, weighted by beta (one per edge); alpha (one per corner) shifts where the values cross;
gamma (one per cube) says how the four vertices around an edge become triangles. Negative is inside.

Corners and edges of a cube are numbered as in the authors' code, because weights are. All else follows from the
definition: on a face with four crossings the inside corners stay apart; where two cubes that join both pairs of such a
face's crossings in one sheet share it, both take the other way (cases C16 and C19: without that, an edge would have
four faces).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import HumanField, LatticeField, Step, no_step
from backend.geometry.mesh import TriMesh
from backend.geometry.tetgrid import Lattice
from backend.protocol import PopulaceError

WEIGHTS = 21  # per cube: 12 beta, 8 alpha, 1 gamma
WEIGHT_SCALE = 0.5  # alpha and beta stay within 1 +- this, gamma within the half of it about 1/2
CORNERS = np.array([[c & 1, c >> 1 & 1, c >> 2] for c in range(8)])
EDGES = np.array([(0, 1), (1, 5), (4, 5), (0, 4), (2, 3), (3, 7), (6, 7), (2, 6), (2, 0), (3, 1), (7, 5), (6, 4)])
_LOW = EDGES.min(1)  # the corner of an edge from which it runs along its axis
_AXIS = np.abs(CORNERS[EDGES[:, 0]] - CORNERS[EDGES[:, 1]]).argmax(1)
# Of the four cubes around an edge, which one a cube is that has it as its edge e: 0 for the lowest, 3 for the highest.
_SLOT = np.array([3 - np.delete(CORNERS[low], axis) @ [2, 1] for low, axis in zip(_LOW, _AXIS)])
_CHUNK = 1 << 15


def _sheets() -> tuple[Int[np.ndarray, "256 12"], Int[np.ndarray, " 256"], Int[np.ndarray, "256 3"]]:
    """For every set of inside corners (bit c: corner c): which sheet each edge belongs to (-1: not crossed), how many
    sheets there are, and for C16 and C19 in which direction the face lies whose crossings are all in one sheet."""
    sheet, count, twisted = np.full((256, 12), -1), np.zeros(256, np.int64), np.zeros((256, 3), np.int64)
    for case in range(256):
        inside = [bool(case >> c & 1) for c in range(8)]
        crossed = [e for e, (a, b) in enumerate(EDGES) if inside[a] != inside[b]]
        label = {e: e for e in crossed}
        ambiguous = []
        for axis in range(3):
            for side in range(2):
                on = [e for e in crossed if (CORNERS[EDGES[e], axis] == side).all()]
                arcs = [on] if on else []
                if len(on) == 4:  # those two belong together that share an inside corner
                    arcs = [
                        [e for e in on if c in EDGES[e]] for c in range(8) if inside[c] and CORNERS[c, axis] == side
                    ]
                    ambiguous.append((axis, side, arcs[0][0], arcs[1][0]))
                for a, b in arcs:
                    old, new = label[b], label[a]
                    label = {e: new if now == old else now for e, now in label.items()}
        labels = sorted(set(label.values()))
        count[case] = len(labels)
        for e in crossed:
            sheet[case, e] = labels.index(label[e])
        if len(ambiguous) == 1:
            axis, side, one, other = ambiguous[0]
            twisted[case, axis] = (2 * side - 1) * (label[one] == label[other])
    return sheet, count, twisted


SHEET, SHEETS, TWISTED = _sheets()


@dataclass(frozen=True)
class Crossed:
    """The cubes of a lattice that a surface crosses, in lexicographic order, and their nodes, numbered anew."""

    cubes: Int[Tensor, "C 3"]  # index along each axis
    corners: Int[Tensor, "C 8"]  # into `nodes`
    nodes: Int[Tensor, "U 3"]  # index along each axis, in lexicographic order
    case: Int[Tensor, " C"]  # set of inside corners, after the repair of C16 and C19


@dataclass(frozen=True)
class Dual:
    """A surface, counter-clockwise from outside. It is open where it leaves the lattice."""

    vertices: Float[Tensor, "M 3"]
    faces: Int[Tensor, "F 3"]
    deviation: Float[Tensor, " K"]
    """Per crossing |its distance to its vertex - the mean of that vertex's|. Its mean is the paper's L_dev, which keeps
    faces regular."""


@torch.no_grad()
def find(values: Float[Tensor, "X Y Z"]) -> Crossed:
    """The cubes of which some corners are inside and some not, from the values at all nodes. Negative is inside."""
    inside = values < 0
    some, every = inside, inside
    for axis, size in enumerate(values.shape):
        some = some.narrow(axis, 0, size - 1) | some.narrow(axis, 1, size - 1)
        every = every.narrow(axis, 0, size - 1) & every.narrow(axis, 1, size - 1)
    cubes = (some & ~every).nonzero()
    _, y, z = values.shape
    places = cubes[:, None] + torch.as_tensor(CORNERS, device=values.device)
    flat = (places[..., 0] * y + places[..., 1]) * z + places[..., 2]
    used = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    used[flat.flatten()] = True
    nodes = used.nonzero()[:, 0]
    number = torch.empty(values.numel(), dtype=torch.int64, device=values.device)
    number[nodes] = torch.arange(len(nodes), device=values.device)
    case = (inside.flatten()[flat].long() << torch.arange(8, device=values.device)).sum(1)
    case = _untwisted(cubes, case, [size - 1 for size in values.shape])
    return Crossed(cubes, number[flat], torch.stack([nodes // (y * z), nodes // z % y, nodes % z], 1), case)


def _untwisted(cubes: Int[Tensor, "C 3"], case: Int[Tensor, " C"], cells: list[int]) -> Int[Tensor, " C"]:
    """The complement for C16 and C19 where the cube beyond the ambiguous face is one of them too."""
    towards = torch.as_tensor(TWISTED, device=cubes.device)[case]
    mine = towards.any(1).nonzero()[:, 0]
    beyond = cubes[mine] + towards[mine]
    strides = torch.tensor([cells[1] * cells[2], cells[2], 1], device=cubes.device)
    within = ((beyond >= 0) & (beyond < torch.tensor(cells, device=cubes.device))).all(1)
    mine, beyond = mine[within], (beyond[within] * strides).sum(1)
    both = torch.isin(beyond, (cubes[mine] * strides).sum(1))  # an ambiguous face is one cube's only one, and shared
    return case.index_put((mine[both],), 255 - case[mine[both]])


def normalised(
    weights: Float[Tensor, "C 21"], scale: float = WEIGHT_SCALE
) -> tuple[Float[Tensor, "C 12"], Float[Tensor, "C 8"], Float[Tensor, " C"]]:
    """beta and alpha = 1 + scale tanh(w), gamma = scale sigmoid(w) + (1 - scale) / 2."""
    return (1 + scale * torch.tanh(weights[:, :12]), 1 + scale * torch.tanh(weights[:, 12:20]),
            scale * torch.sigmoid(weights[:, 20]) + (1 - scale) / 2)  # fmt: skip


def dual(
    crossed: Crossed,
    points: Float[Tensor, "U 3"],
    values: Float[Tensor, " U"],
    weights: Float[Tensor, "C 21"] | None = None,
    training: bool = False,
    scale: float = WEIGHT_SCALE,
) -> Dual:
    """The surface in these cubes: `points` and `values` are those of `crossed.nodes`, `weights` raw numbers per cube
    (none: all weights are one).

    The four vertices around a crossed edge give two triangles along the diagonal whose gammas have the greater product.
    In training they give four about a point between the middles of the diagonals, so that gamma has a gradient.
    """
    device, corners = points.device, crossed.corners
    cube, edge = (torch.as_tensor(SHEET, device=device)[crossed.case] >= 0).nonzero().unbind(1)
    sheets = torch.as_tensor(SHEETS, device=device)[crossed.case]
    vertex = (sheets.cumsum(0) - sheets)[cube] + torch.as_tensor(SHEET, device=device)[crossed.case[cube], edge]
    count = int(sheets.sum())
    a, b = torch.as_tensor(EDGES, device=device)[edge].unbind(1)
    near, far = corners[cube, a], corners[cube, b]

    if weights is None:
        beta, gamma = points.new_ones(len(cube)), points.new_ones(len(corners))
        crossing = _crossings(points, near, far, values[near], values[far])
        shifted = crossing
    else:
        betas, alphas, gamma = normalised(weights, scale)
        beta = betas[cube, edge]
        crossing = _crossings(points, near, far, values[near], values[far])
        shifted = _crossings(points, near, far, values[near] * alphas[cube, a], values[far] * alphas[cube, b])
    total = points.new_zeros(count).index_add(0, vertex, beta)
    vertices = points.new_zeros(count, 3).index_add(0, vertex, shifted * beta[:, None]) / total[:, None]

    distance = (crossing - vertices[vertex]).square().sum(1).clamp_min(1e-20).sqrt()
    number = points.new_zeros(count).index_add(0, vertex, torch.ones_like(beta))
    mean = points.new_zeros(count).index_add(0, vertex, distance) / number
    deviation = (distance - mean[vertex]).abs()

    # quads: a table of the four cubes around each crossed edge, which is known by its lower node and its axis
    low = corners[cube, torch.as_tensor(_LOW, device=device)[edge]]
    key = 3 * low + torch.as_tensor(_AXIS, device=device)[edge]
    around = torch.full((3 * len(points), 4), -1, dtype=torch.int64, device=device)
    around[key, torch.as_tensor(_SLOT, device=device)[edge]] = vertex
    kept = (around >= 0).all(1).nonzero()[:, 0]
    quads, axis = around[kept], kept % 3
    # the ring 0 1 3 2 faces down the axes x and z, and up y; what is outside lies where the values are not negative
    inside_low = values.detach()[torch.div(kept, 3, rounding_mode="floor")] < 0
    turned = inside_low ^ (axis == 1)
    quads = torch.where(turned[:, None], quads[:, [2, 3, 1, 0]], quads[:, [0, 1, 3, 2]])
    owner = torch.repeat_interleave(torch.arange(len(sheets), device=device), sheets)
    g = gamma[owner[quads]]
    straight, across = g[:, 0] * g[:, 2], g[:, 1] * g[:, 3]
    if not training:
        split = torch.tensor([[0, 1, 2, 0, 2, 3], [0, 1, 3, 3, 1, 2]], device=device)
        chosen = split[(straight <= across).long()]
        return Dual(vertices, quads.gather(1, chosen).reshape(-1, 3), deviation)
    places = vertices[quads]
    weighted = places[:, [0, 2]].mean(1) * straight[:, None] + places[:, [1, 3]].mean(1) * across[:, None]
    centres = weighted / (straight + across)[:, None]
    middle = count + torch.arange(len(quads), device=device)[:, None].expand(-1, 4)
    faces = torch.stack([quads, quads.roll(-1, 1), middle], 2).reshape(-1, 3)
    return Dual(torch.cat([vertices, centres]), faces, deviation)


def _crossings(
    points: Float[Tensor, "U 3"], a: Int[Tensor, " K"], b: Int[Tensor, " K"],
    at_a: Float[Tensor, " K"], at_b: Float[Tensor, " K"],
) -> Float[Tensor, "K 3"]:  # fmt: skip
    """Where the values, linear along each edge, are zero."""
    return (points[a] * at_b[:, None] - points[b] * at_a[:, None]) / (at_b - at_a)[:, None]


@torch.no_grad()
def extract_surface(field: HumanField, grid_resolution: int, step: Step = no_step) -> TriMesh:
    """The zero surface of `field` on the lattice that `tetgrid.extract_surface` has. A field with
    `cube_weights(points [U, 3], corners [C, 8]) -> [C, 21] | None` is asked for weights where the surface is.

    Raises `empty_surface` if there is no surface, if it leaves the box or if the field is not finite.
    """
    device = field.bounds.device
    lattice = Lattice.of(field.bounds, grid_resolution, field.focus)
    step("surface", 0.0)
    shape = [int(n) + 1 for n in lattice.cells]
    if isinstance(field, LatticeField):
        values = torch.from_numpy(field.sdf_on_axes(lattice.axes(device))).to(device)
    else:
        places = lattice.points(np.indices(shape, np.int32).reshape(3, -1).T, device)
        found = []
        for i, chunk in enumerate(places.split(_CHUNK)):
            found.append(field.sdf(chunk).float())
            step("surface", 0.9 * min(1.0, (i + 1) * _CHUNK / len(places)))
        values = torch.cat(found).reshape(shape)
    border = torch.ones(shape, dtype=torch.bool, device=device)
    border[1:-1, 1:-1, 1:-1] = False
    crossed = find(values)
    what = None
    if not values.isfinite().all():
        what = f"The field of {field.name!r} is not a number everywhere."
    elif ((values < 0) & border).any():
        what = f"The surface of {field.name!r} leaves its box."
    elif not len(crossed.cubes):
        what = f"The field of {field.name!r} has no inside: no surface in {values.numel()} lattice points."
    if what is not None:
        raise PopulaceError("empty_surface", what, "Try another seed or less variation.")
    step("surface", 0.9)
    points = lattice.points(crossed.nodes.cpu().numpy().astype(np.int32), device)
    ask = getattr(field, "cube_weights", None)
    weights = ask(points, crossed.corners) if ask else None
    moved = points + field.offset(points)
    at_nodes = values[tuple(crossed.nodes.T)]
    surface = dual(crossed, moved, at_nodes, weights)
    if not surface.vertices.isfinite().all():
        raise PopulaceError("empty_surface", f"The offsets of {field.name!r} are not finite.", "Try another seed.")
    asked = surface.vertices
    if not getattr(field, "colors_vertices", False):
        asked = dual(crossed, points, at_nodes, weights).vertices
    return TriMesh(surface.vertices, surface.faces, asked)
