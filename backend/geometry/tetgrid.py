# SPDX-License-Identifier: GPL-3.0-or-later
"""From a signed distance field to triangles: marching tetrahedra (Doi & Koide 1991) on a deformable lattice
(DMTet, Shen et al. 2021), evaluated only near the surface.

The lattice is the cubic one. Every cube is cut into five tetrahedra: one between its four corners of even parity
(i + j + k even, counted over the whole lattice) and one at each odd corner. All diagonals join even nodes, so
neighbouring cubes agree on their shared face, and the lattice has all the symmetries of the cube: a mirrored body
gives a mirrored mesh. Corner c of a cube sits at ((c >> 2) & 1, (c >> 1) & 1, c & 1).
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import HumanField, Step, no_step
from backend.geometry.mesh import TriMesh
from backend.protocol import PopulaceError

log = logging.getLogger(__name__)

# A vertex keeps this share of its edge away from either end, so that no triangle degenerates where the field is zero
# at a lattice node.
_KEEP_OFF = 1e-3
# How much steeper than a true distance the field may be before cells are only found by following the surface.
_LIPSCHITZ = 1.2
# By how many cells the interpolated surface may be off before a cell is only found that way.
_MARGIN = 0.35
_COARSEST = 32  # cells along the longest side at the first level, about

_CORNERS = np.array([[c >> 2 & 1, c >> 1 & 1, c & 1] for c in range(8)], np.int32)
_TET_EDGES = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def _triangle_table() -> tuple[Int[np.ndarray, "16 2 3"], Int[np.ndarray, " 16"]]:
    """For every set of inside corners (bit i: corner i) of a positively oriented tetrahedron, the edges that bear the
    corners of its triangles, counter-clockwise seen from outside, and how many triangles there are."""
    edge = {frozenset(pair): i for i, pair in enumerate(_TET_EDGES.tolist())}
    table, count = np.zeros((16, 2, 3), np.int64), np.zeros(16, np.int64)
    for i, j, k, m in itertools.permutations(range(4)):
        if np.linalg.det(np.eye(4)[[i, j, k, m]]) < 0:  # even permutations keep the orientation
            continue
        e = [[edge.get(frozenset((a, b)), -1) for b in range(4)] for a in range(4)]
        table[1 << i, 0] = e[i][j], e[i][k], e[i][m]
        table[15 - (1 << i), 0] = e[i][j], e[i][m], e[i][k]
        count[[1 << i, 15 - (1 << i)]] = 1
        if i < j:  # the quad i|k, i|m, j|m, j|k: i and j inside, k and m outside
            table[1 << i | 1 << j] = (e[i][k], e[i][m], e[j][m]), (e[i][k], e[j][m], e[j][k])
            count[1 << i | 1 << j] = 2
    return table, count


_TRIANGLES, _TRIANGLE_COUNT = _triangle_table()


def _cube_tets() -> Int[np.ndarray, "2 5 4"]:
    """Corners of the five positively oriented tetrahedra of a cube whose corner 0 is even, and odd."""
    tets = np.zeros((2, 5, 4), np.int64)
    for parity in range(2):
        odd = [c for c in range(8) if (c.bit_count() + parity) % 2]
        tets[parity, 0] = [c for c in range(8) if c not in odd]
        tets[parity, 1:] = [[c, c ^ 1, c ^ 2, c ^ 4] for c in odd]
        for tet in tets[parity]:
            if np.linalg.det((_CORNERS[tet[1:]] - _CORNERS[tet[0]]).astype(float)) < 0:
                tet[2:] = tet[:1:-1]
    return tets


_CUBE_TETS = _cube_tets()


def _cube_table() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The triangles of a whole cube for every set of inside corners.

    Returns edges [24, 2] (corners, lower first), where they are kept [24, 2] (corner, slot), triangles
    [2 parities, 256 codes, 12, 3] (edges) and their number [2, 256]. An edge along an axis is kept at its lower corner
    in slot 0..2, a face's diagonal (each face has one) at the face's lowest corner in slot 3..5.
    """
    edges = [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b).bit_count() < 3]
    kept = np.zeros((len(edges), 2), np.int32)
    for i, (a, b) in enumerate(edges):
        along = a ^ b
        kept[i] = a & b, {4: 0, 2: 1, 1: 2, 3: 3, 5: 4, 6: 5}[along]
    triangles, count = np.zeros((2, 256, 12, 3), np.int32), np.zeros((2, 256), np.int32)
    for parity, code in itertools.product(range(2), range(256)):
        for tet in _CUBE_TETS[parity]:
            case = sum((code >> int(tet[i]) & 1) << i for i in range(4))
            for triangle in _TRIANGLES[case, : _TRIANGLE_COUNT[case]]:
                pairs = [tuple(sorted(tet[_TET_EDGES[e]].tolist())) for e in triangle]
                triangles[parity, code, count[parity, code]] = [edges.index(pair) for pair in pairs]
                count[parity, code] += 1
    return np.array(edges, np.int32), kept, triangles, count


_EDGES, _KEPT, _CUBE_TRIANGLES, _CUBE_COUNT = _cube_table()


def interpolate(
    values: Float[Tensor, "V C"], sdf: Float[Tensor, " V"], edges: Int[Tensor, "M 2"]
) -> Float[Tensor, "M C"]:
    """`values` where the field, linear along each edge, is zero (DMTet, eq. 3). Swapping the ends changes no bit."""
    a, b = edges.unbind(1)
    difference = sdf[a] - sdf[b]
    to_a = (-sdf[b] / difference).clamp(_KEEP_OFF, 1 - _KEEP_OFF)
    to_b = (sdf[a] / difference).clamp(_KEEP_OFF, 1 - _KEEP_OFF)
    return values[a] * to_a[:, None] + values[b] * to_b[:, None]


def unique_edges(tets: Int[Tensor, "T 4"]) -> tuple[Int[Tensor, "E 2"], Int[Tensor, "T 6"]]:
    """The edges of a tetrahedral grid, lower index first, and which six belong to each tetrahedron. Build it once per
    grid: it costs far more than one extraction."""
    pairs = tets[:, torch.as_tensor(_TET_EDGES, device=tets.device)].sort(dim=2).values
    scale = int(tets.max()) + 1
    keys, inverse = torch.unique(pairs[..., 0] * scale + pairs[..., 1], return_inverse=True)
    return torch.stack([keys // scale, keys % scale], 1), inverse.reshape(-1, 6)


def marching_tetrahedra(
    vertices: Float[Tensor, "*B V 3"],
    sdf: Float[Tensor, "*B V"],
    tets: Int[Tensor, "T 4"],
    edges: tuple[Int[Tensor, "E 2"], Int[Tensor, "T 6"]] | None = None,
) -> tuple[Float[Tensor, "M 3"], Int[Tensor, "F 3"]] | list[tuple[Float[Tensor, "M 3"], Int[Tensor, "F 3"]]]:
    """The zero surface of a field given at the vertices of a tetrahedral grid; a list of surfaces for a batch.

    Differentiable with respect to `vertices` and `sdf`. Negative is inside; zero counts as outside. Faces are
    counter-clockwise from outside whatever the orientation of a tetrahedron. Vertices come in the order of the grid's
    edges, faces in that of the tetrahedra; the surface is closed where it does not leave the grid. `edges`: what
    `unique_edges(tets)` returns, if at hand.
    """
    if sdf.ndim == 1:
        return marching_tetrahedra(vertices[None], sdf[None], tets, edges)[0]
    negative = sdf.detach() < 0
    if edges is None:
        corners = negative[:, tets]
        tets = tets[(corners.any(2) & ~corners.all(2)).any(0)]
        if len(tets) == 0:
            return [(v[:0], tets.new_zeros(0, 3)) for v in vertices.expand(len(sdf), -1, -1)]
        edges = unique_edges(tets)
    pairs, tet_edges = edges
    triangles = torch.as_tensor(_TRIANGLES, device=tets.device)
    bits = torch.tensor([1, 2, 4, 8], device=tets.device)
    surfaces = []
    for points, field, inside in zip(vertices.expand(len(sdf), -1, -1), sdf, negative):
        crossing = inside[pairs[:, 0]] != inside[pairs[:, 1]]
        number = crossing.cumsum(0) - 1
        case = (inside[tets] * bits).sum(1)
        cut = ((case > 0) & (case < 15)).nonzero()[:, 0]
        case, corners = case[cut], points.detach()[tets[cut]]
        flipped = torch.linalg.det(corners[:, 1:] - corners[:, :1]) < 0
        faces = number[tet_edges[cut]].gather(1, triangles[case].flatten(1)).unflatten(1, (2, 3))
        faces = torch.where(flipped[:, None, None], faces.flip(2), faces)
        used = torch.arange(2, device=tets.device) < torch.as_tensor(_TRIANGLE_COUNT, device=tets.device)[case, None]
        surfaces.append((interpolate(points, field, pairs[crossing]), faces[used]))
    return surfaces


@dataclass(frozen=True)
class Lattice:
    """The cubic lattice through the origin that covers a box: nodes of index `low` to `high`, both included. The
    outermost nodes lie on the box, so nobody is asked about points beyond it."""

    spacing: float  # metres
    low: Int[np.ndarray, " 3"]
    high: Int[np.ndarray, " 3"]
    box: Float[np.ndarray, "2 3"]

    @classmethod
    def of(cls, bounds: Float[Tensor, "2 3"], grid_resolution: int) -> Lattice:
        """`grid_resolution` cells along the longest side of the box."""
        box = bounds.detach().float().cpu().numpy()
        spacing = float((box[1] - box[0]).max() / grid_resolution)
        index = box / np.float32(spacing)  # nodes less than a thousandth of a cell beyond are left out
        return cls(spacing, np.floor(index[0] + 1e-3).astype(int), np.ceil(index[1] - 1e-3).astype(int), box)

    @property
    def cells(self) -> Int[np.ndarray, " 3"]:
        return self.high - self.low

    def points(self, index: Int[np.ndarray, "N 3"], device: torch.device) -> Float[Tensor, "N 3"]:
        """Places of nodes, counted from `low`; what lies beyond the box is moved onto it."""
        places = (index + self.low).astype(np.float32) * np.float32(self.spacing)
        return torch.from_numpy(places.clip(*self.box)).to(device)

    def on_border(self, index: Int[np.ndarray, "N 3"]) -> np.ndarray:
        return ((index <= 0) | (index >= self.cells)).any(1)

    def dense(self, device: torch.device) -> tuple[Float[Tensor, "V 3"], Int[Tensor, "T 4"]]:
        """All nodes in lexicographic order and all tetrahedra: for training and as a slow twin, on small lattices."""
        cells, nodes = self.cells, self.cells + 1
        index = np.stack(np.meshgrid(*(np.arange(n) for n in nodes), indexing="ij"), -1).reshape(-1, 3)
        cubes = index[(index < cells).all(1)]
        strides = np.array([nodes[1] * nodes[2], nodes[2], 1])
        corners = cubes @ strides
        parity = (cubes + self.low).sum(1) % 2
        tets = corners[:, None, None] + (_CORNERS @ strides)[_CUBE_TETS[parity]]
        return self.points(index, device), torch.from_numpy(tets.reshape(-1, 4)).to(device)


@torch.no_grad()
def extract_surface(field: HumanField, grid_resolution: int, step: Step = no_step) -> TriMesh:
    """The zero surface of `field` on a lattice with `grid_resolution` cells along the longest side of its bounds.

    The field is asked at the nodes of a coarse lattice, then only where the surface may be: at a node where |sdf| is
    more than the farthest point of the next cell away there is none. At the last level the surface is followed from
    cell to cell, so that it is closed even where the field is steeper than a distance. The cost grows with the
    surface, and the mesh is the one that asking everywhere would give. One call of `field.sdf` per level (a few more
    where the surface had to be followed), one of `field.offset`.

    Raises `empty_surface` if there is no surface, if it leaves the box or if the field is not finite.
    """
    device = field.bounds.device
    lattice = Lattice.of(field.bounds, grid_resolution)
    levels = max(0, round(np.log2(grid_resolution / _COARSEST)))
    asked = 0

    def ask(index: Int[np.ndarray, "N 3"]) -> Float[np.ndarray, " N"]:
        nonlocal asked
        asked += len(index)
        sdf = field.sdf(lattice.points(index, device)).float().cpu().numpy()
        if not np.isfinite(sdf).all():
            raise PopulaceError(
                "empty_surface", f"The field is not a number at {np.count_nonzero(~np.isfinite(sdf))} of {len(sdf)} "
                "points.", "Try another seed; if it happens again, verify the weights."
            )  # fmt: skip
        if (lattice.on_border(index) & (sdf < 0)).any():
            size = " x ".join(f"{side:.2f}" for side in (field.bounds[1] - field.bounds[0]).tolist())
            raise PopulaceError(
                "empty_surface", f"The surface of {field.name!r} leaves its box of {size} m.",
                "Try another seed or less variation."
            )  # fmt: skip
        return sdf

    stride = 1 << levels
    cells = np.indices(-(-lattice.cells // stride)).reshape(3, -1).T.astype(np.int32)
    corners, nodes = _number(cells)
    step("surface", 0.0)
    sdf = ask(nodes * stride)
    while stride > 1:
        step("surface", 0.9 * 0.25 ** np.log2(stride))  # each level has about four times the points of the last
        limit = _LIPSCHITZ * np.sqrt(3) / 2 * stride * lattice.spacing
        stride //= 2
        # only the last level is trimmed by interpolation: it has most points, and what it loses is followed
        margin = _MARGIN * lattice.spacing if stride == 1 else np.inf
        cells, octant, known = _split(cells, corners, sdf, limit, margin, -(-lattice.cells // stride))
        corners, nodes = _number(cells)
        sdf = np.full(len(nodes), np.nan, np.float32)
        sdf[corners[np.arange(len(cells)), octant]] = known
        new = np.isnan(sdf)
        sdf[new] = ask(nodes[new] * stride)
    while len(missing := _missing_neighbours(cells, corners, sdf)):
        cells = np.concatenate([cells, missing])
        corners, nodes = _number(cells)
        sdf = np.concatenate([sdf, ask(nodes[len(sdf) :])])
    edges, faces = _march(
        corners, (cells + lattice.low).sum(1) % 2, sdf, _EDGES, _KEPT, _CUBE_TRIANGLES, _CUBE_COUNT
    )  # fmt: skip
    if len(faces) == 0:
        raise PopulaceError(
            "empty_surface", f"The field of {field.name!r} has no inside: no surface in {len(nodes)} lattice points.",
            "Try another seed, or a finer grid if the shape is thin."
        )  # fmt: skip
    step("surface", 0.95)
    log.info("surface: %d faces from %d field evaluations of %d nodes", len(faces), asked, (lattice.cells + 1).prod())
    used, edges = np.unique(edges, return_inverse=True)
    points = lattice.points(nodes[used], device)
    pairs = torch.from_numpy(edges.reshape(-1, 2)).to(device)
    at_nodes = torch.cat([points, points + field.offset(points)], 1)
    both = interpolate(at_nodes, torch.from_numpy(sdf[used]).to(device), pairs)
    if not torch.isfinite(both).all():
        raise PopulaceError("empty_surface", f"The offsets of {field.name!r} are not finite.", "Try another seed.")
    return TriMesh(both[:, 3:].contiguous(), torch.from_numpy(faces).to(device), both[:, :3].contiguous())


def _number(cells: Int[np.ndarray, "C 3"]) -> tuple[Int[np.ndarray, "C 8"], Int[np.ndarray, "N 3"]]:
    """Number the nodes of the cells in order of appearance: corners of each cell, coordinates of each node."""
    capacity = 1 << max(6, (len(cells) // 8).bit_length())
    while True:
        corners, nodes = _number_into(cells, capacity)
        if len(corners) or not len(cells):
            return corners, nodes
        capacity *= 2


@numba.njit(cache=True, nogil=True)
def _number_into(cells, capacity):
    """Nodes by way of blocks of 4 x 4 x 4, which are found by open addressing in a table of `capacity` (a power of
    two): a block stays in the cache as long as its cells come one after the other. Empty arrays if 70 % of the table
    are in use."""
    full = capacity * 7 // 10
    keys = np.full(capacity, -1, np.int64)
    ids = np.full((capacity, 64), -1, np.int32)
    corners = np.empty((len(cells), 8), np.int32)
    nodes = np.empty((8 * len(cells), 3), np.int32)
    count, blocks = 0, 0
    for cell in range(len(cells)):
        if blocks > full - 8:
            return np.empty((0, 8), np.int32), np.empty((0, 3), np.int32)
        last, slot = np.int64(-1), np.int64(0)
        for c in range(8):
            x = np.int64(cells[cell, 0] + (c >> 2 & 1))
            y = np.int64(cells[cell, 1] + (c >> 1 & 1))
            z = np.int64(cells[cell, 2] + (c & 1))
            key = (x >> 2) << 40 | (y >> 2) << 20 | z >> 2
            if key != last:
                last = key
                slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)) & (capacity - 1)
                while keys[slot] != key and keys[slot] >= 0:
                    slot = (slot + 1) & (capacity - 1)
                if keys[slot] < 0:
                    keys[slot] = key
                    blocks += 1
            place = (x & 3) << 4 | (y & 3) << 2 | z & 3
            if ids[slot, place] < 0:
                ids[slot, place] = count
                nodes[count, 0], nodes[count, 1], nodes[count, 2] = x, y, z
                count += 1
            corners[cell, c] = ids[slot, place]
    return corners, nodes[:count].copy()


@numba.njit(cache=True, nogil=True)
def _split(cells, corners, sdf, limit, margin, size):
    """The children that may hold the surface: each is judged by the corner that it shares with its parent, `limit`
    being its diagonal, and by its other corners interpolated from the parent's, give or take `margin`. A parent with
    both signs keeps at least the child at its smallest value, from where the surface can be followed. Returns cells,
    which corner of each is known, and the value there."""
    children = np.empty((8 * len(cells), 3), np.int32)
    octant = np.empty(8 * len(cells), np.int64)
    known = np.empty(8 * len(cells), np.float32)
    grid = np.empty((3, 3, 3), np.float32)  # the parent's corners, and between them the middles
    count = 0
    for cell in range(len(cells)):
        inside, best = 0, 0
        for c in range(8):
            value = sdf[corners[cell, c]]
            inside += value < 0
            if abs(value) < abs(sdf[corners[cell, best]]):
                best = c
        if abs(sdf[corners[cell, best]]) > limit and inside in (0, 8):
            continue
        for c in range(8):
            grid[c >> 1 & 2, c & 2, 2 * (c & 1)] = sdf[corners[cell, c]]
        for x in range(0, 3, 2):
            for y in range(0, 3, 2):
                grid[x, y, 1] = (grid[x, y, 0] + grid[x, y, 2]) / 2
            for z in range(3):
                grid[x, 1, z] = (grid[x, 0, z] + grid[x, 2, z]) / 2
        for y in range(3):
            for z in range(3):
                grid[1, y, z] = (grid[0, y, z] + grid[2, y, z]) / 2
        for c in range(8):
            x, y, z = c >> 2 & 1, c >> 1 & 1, c & 1
            value = sdf[corners[cell, c]]
            keep = abs(value) <= limit
            if keep:
                near = grid[x : x + 2, y : y + 2, z : z + 2]
                keep = near.min() <= margin and near.max() >= -margin
            if keep or (0 < inside < 8 and c == best):
                x, y, z = 2 * cells[cell, 0] + x, 2 * cells[cell, 1] + y, 2 * cells[cell, 2] + z
                if x < size[0] and y < size[1] and z < size[2]:
                    children[count, 0], children[count, 1], children[count, 2] = x, y, z
                    octant[count], known[count] = c, value
                    count += 1
    return children[:count].copy(), octant[:count].copy(), known[:count].copy()


@numba.njit(cache=True, nogil=True)
def _missing_neighbours(cells, corners, sdf):
    """Cells beyond a face that the surface crosses and that only one of `cells` has; each once."""
    owners = np.zeros((len(sdf), 3), np.uint8)
    crossed = np.zeros((len(cells), 6), np.bool_)
    for cell in range(len(cells)):
        code = 0
        for c in range(8):
            code |= (sdf[corners[cell, c]] < 0) << c
        if code in (0, 255):
            continue
        for axis in range(3):
            bit = 4 >> axis
            for side in range(2):
                inside = 0
                for c in range(8):
                    if (c & bit != 0) == side:
                        inside += code >> c & 1
                if 0 < inside < 4:
                    crossed[cell, 2 * axis + side] = True
                    owners[corners[cell, bit * side], axis] += 1
    found = set()
    for cell in range(len(cells)):
        for axis in range(3):
            for side in range(2):
                if crossed[cell, 2 * axis + side] and owners[corners[cell, (4 >> axis) * side], axis] == 1:
                    step = 2 * side - 1
                    x = np.int64(cells[cell, 0]) + (step if axis == 0 else 0)
                    y = np.int64(cells[cell, 1]) + (step if axis == 1 else 0)
                    z = np.int64(cells[cell, 2]) + (step if axis == 2 else 0)
                    found.add(x << 42 | y << 21 | z)
    keys = np.empty(len(found), np.int64)
    for i, key in enumerate(found):
        keys[i] = key
    keys.sort()
    missing = np.empty((len(keys), 3), np.int32)
    for i in range(len(keys)):
        for axis in range(3):
            missing[i, axis] = keys[i] >> (42 - 21 * axis) & 0x1FFFFF
    return missing


@numba.njit(cache=True, nogil=True)
def _march(corners, parity, sdf, edges, kept, triangles, count):
    """Triangles of all cells: the crossed lattice edges [M, 2] (nodes) and faces [F, 3] between them."""
    number = np.full((len(sdf), 6), -1, np.int32)
    code = np.zeros(len(corners), np.uint8)
    total, crossed = 0, 0
    for cell in range(len(corners)):
        for c in range(8):
            code[cell] |= (sdf[corners[cell, c]] < 0) << c
        n = count[parity[cell], code[cell]]
        total += n
        for i in range(n):
            for j in range(3):
                edge = triangles[parity[cell], code[cell], i, j]
                node, slot = corners[cell, kept[edge, 0]], kept[edge, 1]
                if number[node, slot] < 0:
                    number[node, slot] = crossed
                    crossed += 1
    ends = np.empty((crossed, 2), np.int64)
    faces = np.empty((total, 3), np.int64)
    face = 0
    for cell in range(len(corners)):
        for i in range(count[parity[cell], code[cell]]):
            for j in range(3):
                edge = triangles[parity[cell], code[cell], i, j]
                vertex = number[corners[cell, kept[edge, 0]], kept[edge, 1]]
                ends[vertex, 0], ends[vertex, 1] = corners[cell, edges[edge, 0]], corners[cell, edges[edge, 1]]
                faces[face, j] = vertex
            face += 1
    return ends, faces
