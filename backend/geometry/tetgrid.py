# SPDX-License-Identifier: GPL-3.0-or-later
"""From a signed distance field to triangles: marching tetrahedra on a cubic lattice that is deformed by the field's
offsets (DMTet, Shen et al. 2021), evaluated only near the surface."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import HumanField, LatticeField, Step, no_step
from backend.geometry import marching
from backend.geometry.focus import Focus
from backend.geometry.mesh import TriMesh
from backend.protocol import PopulaceError

log = logging.getLogger(__name__)

# How much steeper than a true distance the field may be before cells are only found by following the surface.
_LIPSCHITZ = 1.2
# By how many cells the interpolated surface may be off before a cell is only found that way.
_MARGIN = 0.35
_COARSEST = 32  # cells along the longest side at the first level, about
_CHUNK = 1 << 15  # points for the field between two looks at whether to stop


@dataclass(frozen=True)
class Lattice:
    """The cubic lattice through the origin that covers a box: nodes of index `low` to `high`, both included. The
    outermost nodes lie on the box, so nobody is asked about points beyond it. A focus draws it together in places."""

    spacing: float  # metres
    low: Int[np.ndarray, " 3"]
    high: Int[np.ndarray, " 3"]
    box: Float[np.ndarray, "2 3"]
    focus: Focus | None = None

    @classmethod
    def of(cls, bounds: Float[Tensor, "2 3"], grid_resolution: int, focus: Focus | None = None) -> Lattice:
        """`grid_resolution` cells along the longest side of the box, where the focus does not reach."""
        bounds = bounds.detach().float()
        spacing = float((bounds[1] - bounds[0]).max() / grid_resolution)
        box = (focus.lattice_box(bounds) if focus else bounds).cpu().numpy()
        index = box / np.float32(spacing)  # nodes less than a thousandth of a cell beyond are left out
        low, high = np.floor(index[0] + 1e-3).astype(int), np.ceil(index[1] - 1e-3).astype(int)
        return cls(spacing, low, high, box, focus)

    @property
    def cells(self) -> Int[np.ndarray, " 3"]:
        return self.high - self.low

    def points(self, index: Int[np.ndarray, "N 3"], device: torch.device) -> Float[Tensor, "N 3"]:
        """Field-space places of nodes, counted from `low`; what lies beyond the box is moved onto it."""
        places = (index + self.low).astype(np.float32) * np.float32(self.spacing)
        found = torch.from_numpy(places.clip(*self.box)).to(device)
        return self.focus.to_field(found) if self.focus else found

    def axes(self, device: torch.device) -> list[Float[Tensor, " n"]]:
        """Coordinates of the nodes along each axis."""
        places = self.points(np.arange(self.cells.max() + 1)[:, None].clip(max=self.cells), device)
        return [places[: n + 1, axis].contiguous() for axis, n in enumerate(self.cells)]

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
        tets = corners[:, None, None] + (marching.CORNERS @ strides)[marching.CUBE_TETS[parity]]
        return self.points(index, device), torch.from_numpy(tets.reshape(-1, 4)).to(device)


@torch.no_grad()
def extract_surface(
    field: HumanField, grid_resolution: int, step: Step = no_step, displaced: bool = True
) -> TriMesh:  # fmt: skip
    """The zero surface of `field` on a lattice with `grid_resolution` cells along the longest side of its bounds.

    The field is asked at the nodes of a coarse lattice, then only where the surface may be: at a node where |sdf| is
    more than the farthest point of the next cell away there is none. At the last level the surface is followed from
    cell to cell, so that it is closed even where the field is steeper than a distance. The cost grows with the
    surface, and the mesh is the one that asking everywhere would give. A `LatticeField` is
    asked everywhere. `step` is called after every few thousand points; `field.offset` is asked once, at the nodes of
    the edges that the surface crosses; without `displaced` it is not, and vertices are where their points are.

    Raises `empty_surface` if there is no surface, if it leaves the box or if the field is not finite.
    """
    device = field.bounds.device
    lattice = Lattice.of(field.bounds, grid_resolution, field.focus)
    levels = max(0, round(np.log2(grid_resolution / _COARSEST)))
    asked, fraction = 0, 0.0

    def ask(index: Int[np.ndarray, "N 3"], until: float) -> Float[np.ndarray, " N"]:
        nonlocal asked, fraction
        values, since = [np.empty(0, np.float32)], fraction
        for chunk in lattice.points(index, device).split(_CHUNK) if len(index) else ():
            values.append(field.sdf(chunk).float().cpu().numpy())
            asked += len(chunk)
            fraction += (until - since) * len(chunk) / len(index)
            step("surface", fraction)
        return check(np.concatenate(values), index)

    def check(sdf: Float[np.ndarray, " N"], index: Int[np.ndarray, "N 3"]) -> Float[np.ndarray, " N"]:
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

    if isinstance(field, LatticeField):
        step("surface", 0.0)
        values = field.sdf_on_axes(lattice.axes(device))
        if len(bad := np.argwhere(~np.isfinite(values))):
            check(values[tuple(bad.T)], bad)
        cells = np.argwhere(_crossed(values < 0)).astype(np.int32)
        corners, nodes = _number(cells)
        sdf = check(values[tuple(nodes.T)], nodes)
        return _surface_of(field, lattice, cells, corners, nodes, sdf, values.size, step, displaced)
    stride = 1 << levels
    cells = np.indices(-(-lattice.cells // stride)).reshape(3, -1).T.astype(np.int32)
    corners, nodes = _number(cells)
    step("surface", 0.0)
    sdf = ask(nodes * stride, 0.9 * 0.4**levels)
    while stride > 1:
        limit = _LIPSCHITZ * np.sqrt(3) / 2 * stride * lattice.spacing
        stride //= 2
        # only the last level is trimmed by interpolation: it has most points, and what it loses is followed
        margin = _MARGIN * lattice.spacing if stride == 1 else np.inf
        cells, octant, known = _split(cells, corners, sdf, limit, margin, -(-lattice.cells // stride))
        corners, nodes = _number(cells)
        sdf = np.full(len(nodes), np.nan, np.float32)
        sdf[corners[np.arange(len(cells)), octant]] = known
        new = np.isnan(sdf)
        sdf[new] = ask(nodes[new] * stride, 0.9 * 0.4 ** np.log2(stride))
    while len(missing := _missing_neighbours(cells, corners, sdf)):
        cells = np.concatenate([cells, missing])
        corners, nodes = _number(cells)
        sdf = np.concatenate([sdf, ask(nodes[len(sdf) :], 0.9)])
    return _surface_of(field, lattice, cells, corners, nodes, sdf, asked, step, displaced)


def _crossed(inside: np.ndarray) -> np.ndarray:
    """The cells of which some corners are inside and some not; `inside` at all nodes of the lattice."""
    some, every = inside, inside
    for axis in range(3):
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        some, every = some[tuple(low)] | some[tuple(high)], every[tuple(low)] & every[tuple(high)]
    return some & ~every


def _surface_of(
    field: HumanField, lattice: Lattice, cells: np.ndarray, corners: np.ndarray, nodes: np.ndarray, sdf: np.ndarray,
    asked: int, step: Step, displaced: bool,
) -> TriMesh:  # fmt: skip
    """The triangles of the cells that the surface crosses."""
    device = field.bounds.device
    edges, faces = _march(
        corners, (cells + lattice.low).sum(1) % 2, sdf,
        marching.EDGES, marching.KEPT, marching.CUBE_TRIANGLES, marching.CUBE_COUNT,
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
    at_nodes = torch.cat([points, points + field.offset(points) if displaced else points], 1)
    both = marching.interpolate(at_nodes, torch.from_numpy(sdf[used]).to(device), pairs)
    if not torch.isfinite(both).all():
        raise PopulaceError("empty_surface", f"The offsets of {field.name!r} are not finite.", "Try another seed.")
    vertices = both[:, 3:].contiguous()
    points = vertices if getattr(field, "colors_vertices", False) else both[:, :3].contiguous()
    return TriMesh(vertices, torch.from_numpy(faces).to(device), points)


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
