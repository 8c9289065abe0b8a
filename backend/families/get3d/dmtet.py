# SPDX-License-Identifier: GPL-3.0-or-later
"""From values at grid vertices to a mesh as GET3D does it: DMTet (Shen et al. 2021) on a fixed tetrahedral grid.

Positive is inside. Vertices and faces are numbered as in the authors' code, so that a published mesh can be made again
vertex for vertex and face for face (but for the corner that a face begins with) from its grid file.
The product does not come here: it extracts on a lattice of any size (`geometry.tetgrid`). Training does.
"""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.geometry.marching import TET_EDGES, TRIANGLE_COUNT, TRIANGLES
from backend.geometry.tetgrid import Lattice
from backend.protocol import PopulaceError


def _published_table() -> Int[np.ndarray, "16 2 3"]:
    """`TRIANGLES` with the authors' diagonals: a quad is cut from edge (0, 2) to (1, 3) where it has them, else from
    (0, 3) to (1, 2); where corner 3 is inside, the other way round."""
    table = TRIANGLES.copy()
    for case in np.flatnonzero(TRIANGLE_COUNT == 2):
        quad = [*table[case, 0], table[case, 1, 2]]
        ends = (1, 4) if 1 in quad else (2, 3)
        first = quad.index(ends[case >> 3])
        a, b, c, d = quad[first:] + quad[:first]
        table[case] = (a, b, c), (a, c, d)
    return table


PUBLISHED_TRIANGLES = _published_table()


@dataclass(frozen=True)
class TetGrid:
    """Tetrahedra that fill the cube [-scale / 2, scale / 2]^3."""

    vertices: Float[Tensor, "V 3"]
    tets: Int[Tensor, "T 4"]

    @classmethod
    def of(cls, vertices: Float[Tensor, "V 3"], tets: Int[Tensor, "T 4"], scale: float) -> TetGrid:
        """Any grid, brought to its place: the middle of its box at the origin, its longest side `scale`."""
        low, high = vertices.amin(0), vertices.amax(0)
        return cls((vertices - (low + high) / 2) / (high - low).max() * scale, tets.long())

    @classmethod
    def cubic(cls, resolution: int, scale: float) -> TetGrid:
        """Our own: a cubic lattice of `resolution` cells along a side, five tetrahedra each."""
        half = scale / 2
        box = torch.tensor([[-half] * 3, [half] * 3])
        return cls.of(*Lattice.of(box, resolution).dense(torch.device("cpu")), scale)

    @classmethod
    def load(cls, path: Path, scale: float) -> TetGrid:
        """A grid file as the authors have them: .npz with `vertices` and `tets`. Raises `invalid_request`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                vertices, tets = file["vertices"], file["tets"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise PopulaceError(
                "invalid_request", f"{path.name} is no tetrahedral grid: {error}.",
                "Give an .npz file with the arrays vertices [V, 3] and tets [T, 4]."
            ) from None  # fmt: skip
        fits = vertices.ndim == tets.ndim == 2 and vertices.shape[1:] == (3,) and tets.shape[1:] == (4,)
        if not fits or not len(tets) or tets.min() < 0 or tets.max() >= len(vertices):
            raise PopulaceError("invalid_request", f"{path.name} is no tetrahedral grid: vertices "
                                f"{list(vertices.shape)}, tets {list(tets.shape)}.",
                                "vertices must be [V, 3], and tets [T, 4] indices of them.")  # fmt: skip
        return cls.of(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(tets.astype(np.int64)), scale)

    @functools.cached_property
    def edges(self) -> Int[Tensor, "E 2"]:
        """Every edge once, lower index first, in lexicographic order."""
        return _edges(self.tets, len(self.vertices))

    @functools.cached_property
    def centre(self) -> int:
        """The vertex nearest to the origin."""
        return int(self.vertices.square().sum(1).argmin())

    @functools.cached_property
    def border(self) -> Int[Tensor, " K"]:
        """Vertices with a coordinate that is the least or the greatest of all."""
        at = (self.vertices == self.vertices.max()) | (self.vertices == self.vertices.min())
        return at.any(1).nonzero()[:, 0]

    def to(self, device: torch.device) -> TetGrid:
        return TetGrid(self.vertices.to(device), self.tets.to(device))


def _edges(tets: Int[Tensor, "T 4"], vertices: int) -> Int[Tensor, "E 2"]:
    pairs = tets[:, torch.as_tensor(TET_EDGES, device=tets.device)].reshape(-1, 2).sort(dim=1).values
    keys = torch.unique(pairs[:, 0] * vertices + pairs[:, 1])
    return torch.stack([keys // vertices, keys % vertices], 1)


def repair(
    sdf: Float[Tensor, "B V"], centre: int | Tensor, border: Int[Tensor, " K"], interior: bool = False
) -> tuple[Float[Tensor, "B V"], Float[Tensor, " B"]]:
    """Give samples that are empty or full a surface: something inside at the centre, outside on the border.

    Returns the values and the loss that pushes such a sample towards a change of sign, mean |sdf|, 0 for the others.
    The repaired samples have no gradient: theirs comes by that loss. With `interior` (FlexiCubes) a change of sign
    counts only away from the border.
    """
    seen = sdf
    if interior:
        inner = torch.ones(sdf.shape[1], dtype=torch.bool, device=sdf.device).index_fill(0, border, False)
        seen = sdf[:, inner]
    broken = ~((seen > 0).any(1) & (seen < 0).any(1))
    loss = torch.where(broken, sdf.abs().mean(1), 0)
    fixed = sdf.detach().clone()
    fixed[:, centre] = 1 - sdf.detach().min()
    fixed[:, border] = -1 - sdf.detach().max()
    return torch.where(broken[:, None], fixed, sdf), loss


def march(
    vertices: Float[Tensor, "V 3"], sdf: Float[Tensor, " V"], tets: Int[Tensor, "T 4"]
) -> tuple[Float[Tensor, "M 3"], Int[Tensor, "F 3"]]:
    """Marching tetrahedra, differentiable in `vertices` and `sdf`. Faces are counter-clockwise from outside.

    A crossing edge (a, b), a < b, bears the vertex (v_a (-s_b) + v_b s_a) / (s_a - s_b). Vertices come in the
    lexicographic order of their edges; tetrahedra with one triangle before those with two, each in their own order.
    """
    inside = sdf.detach() > 0
    corners = inside[tets]
    number_inside = corners.sum(1)
    is_cut = (number_inside > 0) & (number_inside < 4)
    cut, corners = tets[is_cut], corners[is_cut]
    case = (corners * torch.tensor([1, 2, 4, 8], device=tets.device)).sum(1)
    pairs = cut[:, torch.as_tensor(TET_EDGES, device=tets.device)].sort(dim=2).values
    keys = pairs[..., 0] * len(vertices) + pairs[..., 1]
    crossing = inside[pairs[..., 0]] != inside[pairs[..., 1]]
    unique, inverse = torch.unique(keys[crossing], return_inverse=True)
    number = keys.new_full(keys.shape, -1)
    number[crossing] = inverse
    a, b = unique // len(vertices), unique % len(vertices)
    s_a, s_b = sdf[a, None], sdf[b, None]
    points = (vertices[a] * -s_b + vertices[b] * s_a) / (s_a - s_b)
    places = vertices.detach()[cut]
    flipped = torch.linalg.det(places[:, 1:] - places[:, :1]) < 0
    table = torch.as_tensor(PUBLISHED_TRIANGLES, device=tets.device)[case]
    faces = number.gather(1, table.flatten(1)).unflatten(1, (2, 3))
    faces = torch.where(flipped[:, None, None], faces[..., [0, 2, 1]], faces)
    count = torch.as_tensor(TRIANGLE_COUNT, device=tets.device)[case]
    return points, torch.cat([faces[count == 1, 0], faces[count == 2].flatten(0, 1)])


def sign_cross_entropy(sdf: Float[Tensor, " V"], edges: Int[Tensor, "E 2"]) -> Tensor:
    """Over the edges whose ends differ in sign, the mean cross entropy between the value at one end and the sign at the
    other, both ways: it has few sign changes, so it removes faces inside of shapes."""
    signs = sdf.detach().sign()[edges]
    a, b = sdf[edges[signs[:, 0] != signs[:, 1]]].unbind(1)
    entropy = functional.binary_cross_entropy_with_logits
    return entropy(a, (b > 0).to(b)) + entropy(b, (a > 0).to(a))
