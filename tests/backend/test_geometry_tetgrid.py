# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.geometry import marching
from backend.geometry.clean import euler_number, is_closed, is_manifold
from backend.geometry.focus import Focus
from backend.geometry.marching import marching_tetrahedra, unique_edges
from backend.geometry.mesh import TriMesh, signed_volume
from backend.geometry.reference import extract_dense
from backend.geometry.tetgrid import Lattice, extract_surface
from backend.protocol import PopulaceError
from tests.backend.geometry_fields import Shape, ball, block, bumpy, capsule, torus


def lattice(resolution, dtype=torch.float32):
    nodes, tets = Lattice.of(Shape(ball()).bounds, resolution).dense(torch.device("cpu"))
    return nodes.to(dtype), tets


def as_mesh(vertices, faces):
    return TriMesh(vertices, faces, vertices)


def least_area(mesh):
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    return float(torch.linalg.cross(b - a, c - a).norm(dim=1).min()) / 2


def sorted_faces(mesh):
    """The surface as a set: each triangle by the coordinates of its corners from the smallest one on, sorted."""
    corners = torch.cat([mesh.vertices, mesh.points], 1).numpy()[mesh.faces.numpy()]  # [F, 3, 6]
    order = np.lexsort(corners.reshape(-1, 6).T[::-1])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    rank = rank.reshape(-1, 3)
    turned = corners[np.arange(len(corners))[:, None], (rank.argmin(1)[:, None] + np.arange(3)) % 3].reshape(-1, 18)
    return turned[np.lexsort(turned.T[::-1])]


def test_the_lattice_is_a_partition_of_its_box_into_positive_tetrahedra():
    nodes, tets = lattice(6, torch.float64)
    volume = torch.linalg.det(nodes[tets][:, 1:] - nodes[tets][:, :1]) / 6
    assert (volume > 0).all()
    assert float(volume.sum()) == pytest.approx(float((nodes.amax(0) - nodes.amin(0)).prod()), rel=1e-6)
    triangles = tets[:, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]].reshape(-1, 3).sort(dim=1).values
    _, count = torch.unique(triangles, dim=0, return_counts=True)
    cells = 12 * 6 * 6  # two triangles on each square of the border have one tetrahedron, all others two
    assert int((count == 1).sum()) == cells
    assert int(count.max()) == 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_any_values_give_a_closed_manifold_without_degenerate_faces(seed, with_zeros):
    nodes, tets = lattice(5)
    rng = np.random.default_rng(seed)
    sdf = torch.from_numpy(rng.normal(size=len(nodes)).astype(np.float32))
    if with_zeros:
        sdf = sdf.round()  # many exact zeros, of both signs
    sdf[(nodes.abs() > 0.55).any(1)] = 1.0
    tets = torch.where(torch.from_numpy(rng.random(len(tets)) < 0.5)[:, None], tets, tets[:, [1, 0, 2, 3]])
    mesh = as_mesh(*marching_tetrahedra(nodes, sdf, tets))
    assert is_manifold(mesh)
    assert len(torch.unique(mesh.faces)) == len(mesh.vertices)
    assert least_area(mesh) > 0
    assert signed_volume(mesh.vertices, mesh.faces) > 0


def test_vertices_are_the_zeros_along_the_edges():
    nodes, tets = lattice(9)
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.7, 0.5]), dim=0)
    vertices, faces = marching_tetrahedra(nodes, nodes @ normal - 0.123, tets)
    assert float((vertices @ normal - 0.123).abs().max()) < 1.001e-3 * 1.2 / 9 * math.sqrt(2)  # kept off the nodes
    assert float((vertices @ normal - 0.123).abs().median()) < 1e-7
    a, b, c = vertices[faces].unbind(1)
    assert (torch.linalg.cross(b - a, c - a) @ normal > 0).all()  # outward is where the field grows


@pytest.mark.parametrize("single", [True, False])
def test_volume_of_the_capsule_converges_from_below(single):
    field = capsule(2, single=True) if single else Shape(ball(), (0.5, 0.5, 0.5))
    if single:
        radius, length = float(field.radii[0, 0]), float(field.ends[0, 1, 1] - field.ends[0, 0, 1])
    else:
        radius, length = 0.4, 0.0
    exact = math.pi * radius**2 * length + 4 / 3 * math.pi * radius**3
    errors = []
    for resolution in (32, 64, 128):
        mesh = extract_surface(field, resolution)
        errors.append(1 - signed_volume(mesh.vertices, mesh.faces) / exact)
        assert is_manifold(mesh)
        assert euler_number(mesh) == 2
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[1] < 0.01
    assert errors[2] < errors[0] / 10  # second order


def test_gradients():
    nodes, tets = lattice(2, torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(4, len(nodes), generator=generator, dtype=torch.float64)
    sdf = (nodes.norm(dim=1) - 0.3 + noise[0]).requires_grad_()
    nodes = (nodes + noise[1:].T).requires_grad_()
    assert len(marching_tetrahedra(nodes, sdf, tets)[0]) > 10
    assert torch.autograd.gradcheck(lambda n, s: marching_tetrahedra(n, s, tets)[0], (nodes, sdf))


def test_a_batch_equals_its_members():
    nodes, tets = lattice(12)
    sdf = torch.stack([nodes.norm(dim=1) - 0.4, torus()(nodes), torch.ones(len(nodes))])
    deformed = nodes + 0.01 * torch.sin(20 * nodes + torch.arange(3.0)[:, None, None])
    for edges in (None, unique_edges(tets)):
        for vertices in (nodes.expand(3, -1, -1), deformed):
            for (v, f), points, values in zip(marching_tetrahedra(vertices, sdf, tets, edges), vertices, sdf):
                one_v, one_f = marching_tetrahedra(points, values, tets)
                assert torch.equal(v, one_v)
                assert torch.equal(f, one_f)
    assert [len(f) > 0 for _, f in marching_tetrahedra(deformed, sdf, tets)] == [True, True, False]


def _shear(points):
    return 0.1 * torch.sin(3 * points[:, [1, 2, 0]])


@pytest.mark.parametrize(
    "field",
    [
        capsule(1),
        capsule(4, single=True),
        Shape(ball()),
        Shape(torus(), offset=_shear),
        Shape(block((0.3, 0.15, 0.45))),  # zeros at lattice nodes
        Shape(bumpy()),
        Shape(lambda p: torus()(p).clamp(-0.03, 0.03)),  # truncated
        Shape(lambda p: torus()(p) * 6),  # far steeper than a distance: found by following the surface
        Shape(lambda p: torch.tanh(40 * ball()(p))),
        Shape(lambda p: torch.minimum(ball(0.2)(p - 0.3), ball(0.2)(p + 0.3))),  # two pieces
    ],
    ids=["person", "capsule", "ball", "torus", "block", "bumpy", "truncated", "steep", "occupancy", "pieces"],
)
def test_asking_near_the_surface_gives_the_surface_of_asking_everywhere(field):
    near, everywhere = extract_surface(field, 64), extract_dense(field, 64)
    assert np.array_equal(sorted_faces(near), sorted_faces(everywhere))
    assert is_manifold(near)
    assert near.faces.dtype == torch.int64
    assert least_area(near) > 0


def focused(sdf, factor=2.0):
    """A field whose lattice is finer above y = 0.1."""
    field = Shape(sdf)
    field.focus = Focus(-0.1, 0.1, factor, (0.0, 0.1), torch.tensor([[-0.5, 0.0, -0.5], [0.5, 0.6, 0.5]]))
    return field


def test_a_focus_makes_triangles_small_where_it_is_and_nothing_else():
    plain, fine = extract_surface(Shape(ball()), 64), extract_surface(focused(ball()), 64)
    assert np.array_equal(sorted_faces(fine), sorted_faces(extract_dense(focused(ball()), 64)))
    assert is_manifold(fine)
    assert is_closed(fine)
    error = [(m.vertices.norm(dim=1) - 0.4).abs().max() for m in (plain, fine)]
    assert float(error[1]) < 1.5 * float(error[0])
    edge = {}
    for name, mesh in (("plain", plain), ("fine", fine)):
        corners = mesh.vertices[mesh.faces]
        length, height = (corners[:, 0] - corners[:, 1]).norm(dim=1), corners[:, :, 1].mean(1)
        edge[name] = float(length[height > 0.15].mean()), float(length[height < -0.15].mean())
    assert edge["fine"][0] == pytest.approx(edge["plain"][0] / 2, rel=0.1)
    assert edge["fine"][1] == pytest.approx(edge["plain"][1], rel=0.05)


def test_a_focus_keeps_what_it_is_told_to_hold():
    focus = focused(ball()).focus
    box = focus.lattice_box(torch.tensor([[-0.6, -0.6, -0.6], [0.6, 0.6, 0.6]]))
    top = focus.to_field(box[1][None])[0]
    assert float(top[1]) == pytest.approx(0.6, abs=1e-5)
    assert float(top[0]) >= 0.5
    assert float(top[2]) >= 0.5
    y = torch.linspace(-0.6, float(box[1, 1]), 500)
    places = focus.to_field(torch.stack([torch.full_like(y, 0.2), y, torch.full_like(y, 0.2)], 1))
    step = places[1:, 1] - places[:-1, 1]
    assert (step > 0).all()
    assert float(step[0] / step[-1]) == pytest.approx(2, rel=1e-2)


def test_the_cost_grows_with_the_surface_not_with_the_volume():
    points = []
    for resolution in (64, 128, 256):
        field = Shape(ball(0.25))
        extract_surface(field, resolution)
        points.append(sum(field.asked))
        assert max(field.asked) <= 1 << 15
    assert points[2] < 4.5 * points[1] < 4.5**2 * points[0]
    assert points[2] < 0.03 * 257**3


def test_a_mirrored_body_gives_a_mirrored_mesh():
    mesh = extract_surface(Shape(torus()), 48)
    for axis in range(3):
        flipped = mesh.vertices.clone()
        flipped[:, axis] *= -1
        assert np.array_equal(np.unique(flipped.numpy() + 0.0, axis=0), np.unique(mesh.vertices.numpy() + 0.0, axis=0))


def test_offsets_deform_the_lattice_and_points_stay():
    plain, moved = extract_surface(Shape(ball()), 40), extract_surface(Shape(ball(), offset=_shear), 40)
    assert torch.equal(plain.points, moved.points)
    torch.testing.assert_close(moved.vertices, moved.points + _shear(moved.points), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("sdf", "says"),
    [
        (lambda p: torch.ones(len(p)), "no inside"),
        (lambda p: -torch.ones(len(p)), "leaves its box"),
        (lambda p: p[:, 0] - 0.5, "leaves its box"),
        (lambda p: p.norm(dim=1) - 0.7, "leaves its box"),
        (lambda p: torch.where(p[:, 0] > 0.3, torch.nan, ball()(p)), "not a number"),
        (lambda p: torch.full((len(p),), torch.inf), "not a number"),
        (lambda p: ball(1e-3)(p - 0.111), "no inside"),
    ],
)
@pytest.mark.parametrize("resolution", [16, 50, 128])
def test_no_surface_is_an_error_that_says_why(sdf, says, resolution):
    with pytest.raises(PopulaceError, match=says) as caught:
        extract_surface(Shape(sdf), resolution)
    assert caught.value.code == "empty_surface"
    assert caught.value.hint


def test_nan_at_a_single_node_and_in_the_offsets_is_an_error():
    def sdf(p):
        values = ball()(p)
        values[(p - torch.tensor([0.4, 0.0, 0.0])).norm(dim=1).argmin()] = torch.nan
        return values

    for field in (Shape(sdf), Shape(ball(), offset=lambda p: torch.full_like(p, torch.nan))):
        with pytest.raises(PopulaceError) as caught:
            extract_surface(field, 64)
        assert caught.value.code == "empty_surface"


def test_progress_ascends_and_a_cancel_stops_at_once():
    seen = []
    extract_surface(Shape(ball()), 128, lambda stage, fraction: seen.append((stage, fraction)))
    assert [stage for stage, _ in seen] == ["surface"] * len(seen)
    assert [f for _, f in seen] == sorted(f for _, f in seen)

    class Stop(Exception):
        pass

    def stop(stage, fraction):
        if fraction > 0:
            raise Stop

    field = Shape(ball())
    with pytest.raises(Stop):
        extract_surface(field, 128, stop)
    assert len(field.asked) == 1


def test_tables_cover_all_cases():
    assert marching.TRIANGLE_COUNT.tolist() == [0, 1, 1, 2, 1, 2, 2, 1, 1, 2, 2, 1, 2, 1, 1, 0]
    assert (marching.CUBE_COUNT[:, [0, 255]] == 0).all()
    assert (marching.CUBE_COUNT[:, 1:255] > 0).all()
    assert is_closed(extract_surface(Shape(ball(0.05)), 16))
