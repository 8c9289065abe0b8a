# SPDX-License-Identifier: GPL-3.0-or-later
"""FlexiCubes: the authors' numbers, a slow float64 twin that walks each cube's loops, closed surfaces, gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.geometry import flexicubes, reference
from backend.geometry.flexicubes import CORNERS, EDGES, Dual, dual, find
from backend.geometry.mesh import signed_volume
from backend.pipeline import mesh_facts
from backend.protocol import PopulaceError
from tests.backend.geometry_fields import Shape, ball
from tests.backend.geometry_fields import torus as ring
from tests.backend.golden_numbers import Golden, normal

F64 = torch.float64
Triangle = tuple[int, int, int]


def nodes(cells: int, dtype: torch.dtype = F64) -> Tensor:
    axis = torch.linspace(-0.5, 0.5, cells + 1, dtype=dtype)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def torus(points: Tensor, large: float = 0.26, small: float = 0.11) -> Tensor:
    return torch.hypot(torch.hypot(points[..., 0], points[..., 2]) - large, points[..., 1]) - small


def surface(points: Tensor, values: Tensor, weights: Tensor | None = None, training: bool = False) -> Dual:
    """From everything at all nodes [X, Y, Z, ...] and all cubes [X - 1, Y - 1, Z - 1, 21]."""
    crossed = find(values)
    at = tuple(crossed.nodes.T)
    return dual(crossed, points[at], values[at], None if weights is None else weights[tuple(crossed.cubes.T)], training)


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """How far and which."""
    found = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return found.values, found.indices


def triangles(faces: Tensor | np.ndarray) -> set[Triangle]:
    """Corners from the least on."""
    return {tuple(face[(k := face.index(min(face))) :] + face[:k]) for face in faces.tolist()}  # pyright: ignore


def test_surfaces_and_regulariser_are_the_authors() -> None:
    golden = Golden("flexicubes")
    cells = golden.facts["grid"]["res"]
    points = nodes(cells, torch.float32).mul(1e5).round().div(1e5)  # theirs has five digits
    values = torus(points) + 0.01 * normal("fc_noise", *points.shape[:3])
    moved = points + torch.tanh(normal("fc_def", *points.shape)) / (2 * cells)
    weights = 0.5 * normal("fc_w", cells, cells, cells, 21)
    for name, training in (("eval", False), ("train", True)):
        found = surface(moved, values, weights, training)
        theirs, faces = (torch.from_numpy(golden.arrays[f"{name}_{k}"]) for k in "vf")
        distance, match = nearest(found.vertices.double(), theirs.double())
        assert len(found.vertices) == len(theirs) == len(match.unique())
        assert float(distance.max()) < 1e-6
        assert triangles(match[found.faces]) == triangles(faces)
        volumes = [signed_volume(v, f.long()) for v, f in ((found.vertices, found.faces), (theirs, faces))]
        assert volumes[0] == pytest.approx(volumes[1], abs=1e-8)
        apart = np.sort(found.deviation.numpy()) - np.sort(golden.arrays[f"{name}_reg"])
        assert np.abs(apart).max() < 1e-6


def partner(inside: list[bool], edge: int, axis: int, side: int, by_inside: bool) -> int | None:
    """The crossed edge that a line of the surface on this face joins with `edge`."""
    on = [e for e, (a, b) in enumerate(EDGES) if inside[a] != inside[b] and (CORNERS[[a, b], axis] == side).all()]
    if edge not in on:
        return None
    if len(on) == 2:
        return on[on[0] == edge]
    shared = next(int(c) for c in EDGES[edge] if inside[c] == by_inside)
    return next(e for e in on if e != edge and shared in EDGES[e])


def loops(inside: list[bool], flipped: tuple[int, int] | None = None) -> list[list[int]]:
    """The closed lines that the surface draws on a cube, as lists of crossed edges."""
    left = {e for e, (a, b) in enumerate(EDGES) if inside[a] != inside[b]}
    found = []
    while left:
        edge, loop, came = min(left), [], None
        while edge in left:
            left.remove(edge)
            loop.append(edge)
            for face in itertools.product(range(3), range(2)):
                to = partner(inside, edge, *face, by_inside=face != flipped)
                if to is not None and face != came:
                    edge, came = to, face
                    break
        found.append(loop)
    return found


def twist(inside: list[bool]) -> tuple[int, int] | None:
    """The only face with four crossings, if all four are on one loop."""
    four = []
    for axis, side in itertools.product(range(3), range(2)):
        on = [e for e, (a, b) in enumerate(EDGES) if inside[a] != inside[b] and (CORNERS[[a, b], axis] == side).all()]
        if len(on) == 4:
            four.append(((axis, side), on))
    if len(four) != 1:
        return None
    face, on = four[0]
    return face if any(set(on) <= set(loop) for loop in loops(inside)) else None


def slow(
    points: np.ndarray, values: np.ndarray, weights: np.ndarray, training: bool
) -> tuple[np.ndarray, set[Triangle]]:
    """Cube by cube as the paper says it."""
    cells = [n - 1 for n in values.shape]
    inside = {cube: [bool(values[tuple(np.add(cube, c))] < 0) for c in CORNERS] for cube in np.ndindex(*cells)}
    twisted = {cube: twist(signs) for cube, signs in inside.items()}
    vertices: list[np.ndarray] = []
    gammas: list[float] = []
    around: dict[tuple[tuple[int, ...], int], dict[tuple[int, ...], int]] = {}
    for cube, signs in inside.items():
        flipped = twisted[cube]
        if flipped is not None:
            beyond = tuple(np.add(cube, [(2 * flipped[1] - 1) * (axis == flipped[0]) for axis in range(3)]))
            flipped = flipped if twisted.get(beyond) == (flipped[0], 1 - flipped[1]) else None
        beta, alpha = 1 + 0.5 * np.tanh(weights[cube][:12]), 1 + 0.5 * np.tanh(weights[cube][12:20])
        for loop in loops(signs, flipped):
            total, sum_of_weights = np.zeros(3), 0.0
            for e in loop:
                a, b = (tuple(np.add(cube, CORNERS[c])) for c in EDGES[e])
                s_a, s_b = values[a] * alpha[EDGES[e][0]], values[b] * alpha[EDGES[e][1]]
                total += beta[e] * (s_b * points[a] - s_a * points[b]) / (s_b - s_a)
                sum_of_weights += beta[e]
                low, axis = min(a, b), int(np.argmax(np.abs(np.subtract(a, b))))
                around.setdefault((low, axis), {})[cube] = len(vertices)
            vertices.append(total / sum_of_weights)
            gammas.append(0.5 / (1 + math.exp(-weights[cube][20])) + 0.25)
    faces: set[Triangle] = set()
    centres: list[np.ndarray] = []
    for (low, axis), cubes in around.items():
        if len(cubes) < 4:
            continue
        u, v = (axis + 1) % 3, (axis + 2) % 3
        ring = []  # counter-clockwise about the axis
        for du, dv in ((1, 1), (0, 1), (0, 0), (1, 0)):
            cube = list(low)
            cube[u] -= du
            cube[v] -= dv
            ring.append(cubes[tuple(cube)])
        if values[low] >= 0:
            ring = ring[::-1]
        g = [gammas[i] for i in ring]
        a, b, c, d = ring
        if training:
            p = np.array([vertices[i] for i in ring])
            one, two = g[0] * g[2], g[1] * g[3]
            centres.append((one * (p[0] + p[2]) / 2 + two * (p[1] + p[3]) / 2) / (one + two))
            middle = len(vertices) + len(centres) - 1
            new = [(a, b, middle), (b, c, middle), (c, d, middle), (d, a, middle)]
        else:
            new = [(a, b, c), (a, c, d)] if g[0] * g[2] > g[1] * g[3] else [(a, b, d), (b, c, d)]
        faces |= triangles(np.array(new))
    return np.array(vertices + centres), faces


@pytest.mark.parametrize("training", [False, True])
def test_the_fast_surface_is_the_slow_one(training: bool) -> None:
    cells = 7
    points = nodes(cells) + 0.03 * noise(cells + 1, cells + 1, cells + 1, 3)
    values, weights = noise(cells + 1, cells + 1, cells + 1, seed=1), noise(cells, cells, cells, 21, seed=2)
    found = surface(points, values, weights, training)
    expected, faces = slow(points.numpy(), values.numpy(), weights.numpy(), training)
    distance, match = nearest(found.vertices, torch.from_numpy(expected))
    assert len(match.unique()) == len(expected) > 300
    assert float(distance.max()) < 1e-12
    assert triangles(match[found.faces]) == faces


def test_every_case_of_a_cube_has_the_sheets_of_its_loops() -> None:
    for case in range(256):
        inside = [bool(case >> c & 1) for c in range(8)]
        expected = {frozenset(loop) for loop in loops(inside)}
        sheets = flexicubes.SHEET[case]
        assert {frozenset(np.flatnonzero(sheets == k).tolist()) for k in range(flexicubes.SHEETS[case])} == expected
        face = twist(inside)
        towards = flexicubes.TWISTED[case].tolist()
        assert towards == [0 if face is None or axis != face[0] else 2 * face[1] - 1 for axis in range(3)]
    assert np.bincount(flexicubes.SHEETS).tolist()[4:] == [2]  # four sheets: corners of one parity
    assert (flexicubes.TWISTED != 0).any(1).sum() == 36  # 12 of C16 and 24 of C19


@pytest.mark.parametrize("seed", range(5))
def test_surfaces_of_noise_are_closed_manifolds(seed: int) -> None:
    """Every directed edge once, with its reverse: noise has all cases side by side."""
    cells = 16
    values = noise(cells + 1, cells + 1, cells + 1, seed=seed)
    for axis in range(3):
        values.select(axis, 0).abs_()
        values.select(axis, cells).abs_()
    found = surface(nodes(cells), values)
    facts = mesh_facts(found.faces.numpy(), len(found.vertices))
    assert facts["closed"]
    assert facts["faces"] > 5000
    assert signed_volume(found.vertices, found.faces) > 0


def test_known_shapes_have_their_volume_and_handles() -> None:
    points = nodes(32)
    for values, euler, volume in ((points.norm(dim=3) - 0.35, 2, 4 / 3 * math.pi * 0.35**3),
                                  (torus(points), 0, 2 * math.pi**2 * 0.26 * 0.11**2)):  # fmt: skip
        found = surface(points, values)
        assert len(found.vertices) - len(found.faces) // 2 == euler
        assert signed_volume(found.vertices, found.faces) == pytest.approx(
            volume, rel=0.04
        )  # means of crossings lie inside
        assert float(found.deviation.mean()) < 0.1 / 32


def test_gradients_reach_places_values_and_weights() -> None:
    cells = 3
    points, values = nodes(cells), nodes(cells).norm(dim=3) - 0.4 + 0.01 * noise(4, 4, 4)
    weights = noise(cells, cells, cells, 21, seed=1)
    crossed = find(values)
    at = tuple(crossed.nodes.T)
    inputs = [x.clone().requires_grad_() for x in (points[at], values[at], weights[tuple(crossed.cubes.T)])]

    def of(*x: Tensor) -> tuple[Tensor, Tensor]:
        made = dual(crossed, *x, training=True)
        return made.vertices, made.deviation

    assert torch.autograd.gradcheck(of, inputs, fast_mode=True)
    made = dual(crossed, *inputs, training=True)
    for gradient in torch.autograd.grad(made.vertices.square().sum(), inputs):
        assert (gradient != 0).any()
    (by_weights,) = torch.autograd.grad(dual(crossed, *inputs, training=True).vertices.sum(), inputs[2])
    assert (by_weights[:, 20] != 0).any()  # gamma moves the middles


def test_fitting_weights_finds_a_sharp_edge() -> None:
    """What FlexiCubes is for: learned weights put vertices on a cube's edges, which zero crossings alone round off."""
    cells = 8
    points = nodes(cells, torch.float32)
    turn = torch.linalg.qr(noise(3, 3))[0].float()
    side = 0.23

    def distance(x: Tensor) -> Tensor:
        q = (x @ turn).abs() - side
        return q.clamp(min=0).square().sum(-1).clamp_min(1e-12).sqrt() + q.amax(-1).clamp(max=0)

    crossed = find(distance(points))
    at = tuple(crossed.nodes.T)
    values = distance(points)[at]
    corner = torch.tensor(list(itertools.product((-side, side), repeat=3))) @ turn.T
    weights = torch.zeros(len(crossed.cubes), 21, requires_grad=True)
    offset = torch.zeros(len(values), 3, requires_grad=True)
    optimiser = torch.optim.Adam([weights, offset], 0.05)

    def loss() -> Tensor:
        made = dual(crossed, points[at] + torch.tanh(offset) / (2 * cells), values, weights, training=True)
        near = torch.cdist(corner, made.vertices).min(1).values
        return distance(made.vertices).abs().mean() + near.mean() + 0.05 * made.deviation.mean()

    first = float(loss().detach())
    for _ in range(80):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
    assert float(value.detach()) < 0.25 * first


def test_a_field_is_extracted_as_the_plain_way_has_it() -> None:
    for field in (Shape(ball(0.3)), Shape(ring(), offset=lambda p: 0.01 * torch.sin(20 * p))):
        fast, plain = flexicubes.extract_surface(field, 24), reference.extract_dual_dense(field, 24)
        assert len(fast.faces) == len(plain.faces)
        assert mesh_facts(fast.faces.numpy(), len(fast.vertices))["closed"]
        assert float(nearest(fast.vertices, plain.vertices)[0].max()) < 1e-5
        assert signed_volume(fast.vertices, fast.faces) == pytest.approx(
            signed_volume(plain.vertices, plain.faces), rel=1e-4)  # fmt: skip


def test_fields_without_a_surface_are_a_sentence() -> None:
    for radius, says in ((0.7, "leaves its box"), (-0.1, "has no inside"), (math.nan, "not a number")):
        with pytest.raises(PopulaceError, match=says):
            flexicubes.extract_surface(Shape(ball(radius)), 8)
