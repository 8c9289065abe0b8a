# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from backend.geometry.clean import clean, euler_number, is_closed, is_manifold
from backend.geometry.mesh import TriMesh, signed_volume, vertex_normals
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface
from backend.protocol import PopulaceError
from tests.backend.geometry_fields import Shape, ball, bumpy, capsule, torus

TETRAHEDRON = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
CORNERS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


def mesh_of(vertices, faces):
    vertices = torch.as_tensor(vertices, dtype=torch.float32)
    return TriMesh(vertices, torch.as_tensor(faces, dtype=torch.int64), vertices + 10)


def joined(*meshes):
    shift = np.cumsum([0] + [len(m.vertices) for m in meshes])
    return mesh_of(
        torch.cat([m.vertices for m in meshes]), torch.cat([m.faces + int(s) for m, s in zip(meshes, shift)])
    )


def cube(corner):
    square = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [t for a, b, c, d in square for t in ((a, b, c), (a, c, d))]
    return mesh_of([[corner[0] + (i >> 2), corner[1] + (i >> 1 & 1), corner[2] + (i & 1)] for i in range(8)], faces)


def moved(mesh, by):
    return dataclasses.replace(mesh, vertices=mesh.vertices + torch.tensor(by))


def inside_out(mesh):
    return dataclasses.replace(mesh, faces=mesh.faces.flip(1))


def test_predicates_on_shapes_known_by_heart():
    solid = mesh_of(CORNERS, TETRAHEDRON)
    assert is_closed(solid)
    assert is_manifold(solid)
    assert euler_number(solid) == 2
    assert signed_volume(solid.vertices, solid.faces) == pytest.approx(1 / 6)
    assert signed_volume(cube((5, 5, 5)).vertices, cube((5, 5, 5)).faces) == pytest.approx(1)
    opened = mesh_of(CORNERS, TETRAHEDRON[:3])
    assert not is_closed(opened)
    assert not is_manifold(opened)
    half_flipped = mesh_of(CORNERS, torch.cat([TETRAHEDRON[:1].flip(1), TETRAHEDRON[1:]]))
    assert not is_closed(half_flipped)
    bow_tie = mesh_of(torch.cat([CORNERS, -CORNERS[1:]]), torch.cat([TETRAHEDRON, inside_out(
        mesh_of(CORNERS, torch.where(TETRAHEDRON > 0, TETRAHEDRON + 3, 0))).faces]))  # fmt: skip
    assert is_closed(bow_tie)
    assert not is_manifold(bow_tie)  # two solids that touch in a vertex
    empty = mesh_of(CORNERS[:0], TETRAHEDRON[:0])
    assert not is_closed(empty)
    assert not is_manifold(empty)


def test_floaters_and_inner_shells_go_and_the_rest_stays_bit_equal():
    body, small = extract_surface(Shape(ball()), 24), extract_surface(Shape(ball(0.1)), 24)
    crowd = joined(small, moved(small, (1.0, 0, 0)), body, inside_out(small), moved(body, (0.1, 0, 0)).__class__(
        small.vertices * 0.3, small.faces, small.points))  # fmt: skip
    kept = clean(crowd)
    assert torch.equal(kept.vertices, body.vertices)
    assert torch.equal(kept.faces, body.faces)
    torch.testing.assert_close(kept.points, kept.vertices + 10)
    again = clean(kept)
    assert torch.equal(again.faces, kept.faces)


def test_hollow_ball_becomes_solid():
    shell = extract_surface(Shape(lambda p: (p.norm(dim=1) - 0.35).abs() - 0.06), 48)
    assert euler_number(shell) == 4
    solid = clean(shell)
    assert euler_number(solid) == 2
    assert signed_volume(solid.vertices, solid.faces) == pytest.approx(4 / 3 * np.pi * 0.41**3, rel=0.01)


def test_split_vertices_duplicates_and_degenerate_faces_are_mended():
    body = extract_surface(Shape(torus()), 24)
    soup = mesh_of(body.vertices[body.faces.flatten()], torch.arange(3 * len(body.faces)).reshape(-1, 3))
    extra = torch.cat([soup.faces, soup.faces[:5], soup.faces[7:8], soup.faces[-1:].flip(1), soup.faces[-1:],
                       torch.tensor([[0, 0, 1], [2, 2, 2], [3, 4, 3]])])  # fmt: skip
    mended = clean(mesh_of(soup.vertices, extra))
    assert is_manifold(mended)
    assert len(mended.faces) == len(body.faces)
    assert euler_number(mended) == 0
    assert signed_volume(mended.vertices, mended.faces) == pytest.approx(signed_volume(body.vertices, body.faces))


def test_solids_that_touch_in_an_edge_are_taken_apart():
    left, right = cube((0, 0, 0)), cube((1, 1, 0))
    welded = joined(left, right)
    _, number = torch.unique(welded.vertices, dim=0, return_inverse=True)
    touching = mesh_of(torch.unique(welded.vertices, dim=0), number[welded.faces])
    assert is_closed(touching)
    assert not is_manifold(touching)
    one = clean(touching)
    assert is_manifold(one)
    assert len(one.faces) == 12
    assert signed_volume(one.vertices, one.faces) == pytest.approx(1)
    assert set((one.vertices.amax(0) - one.vertices.amin(0)).tolist()) == {1.0}


@pytest.mark.parametrize("faces", [TETRAHEDRON[:0], TETRAHEDRON[:1], TETRAHEDRON[:3], TETRAHEDRON.flip(1)])
def test_nothing_closed_is_an_error(faces):
    with pytest.raises(PopulaceError) as caught:
        clean(mesh_of(CORNERS, faces))
    assert caught.value.code == "empty_surface"


FINE = {
    "person": extract_surface(capsule(1), 96),
    "torus": extract_surface(Shape(torus()), 64),
    "bumpy": extract_surface(Shape(bumpy()), 64),
}


@pytest.mark.parametrize("budget", [500, 1001, 4000, 9999])
@pytest.mark.parametrize("name", FINE)
def test_face_budget_topology_and_place_are_kept(name, budget):
    fine = clean(FINE[name])
    fine = dataclasses.replace(fine, points=torch.arange(len(fine.vertices))[:, None].expand(-1, 3).float())
    coarse = simplify(fine, budget)
    assert budget - 1 <= len(coarse.faces) <= budget
    assert is_manifold(coarse)
    assert euler_number(coarse) == euler_number(fine)
    assert torch.equal(coarse.vertices, fine.vertices[coarse.points[:, 0].long()])
    tolerance = {500: 0.1, 1001: 0.05, 4000: 0.015, 9999: 0.006}[budget]  # vertices stay on the round surface
    assert signed_volume(coarse.vertices, coarse.faces) == pytest.approx(
        signed_volume(fine.vertices, fine.faces), rel=tolerance
    )
    again = simplify(fine, budget)
    assert torch.equal(again.faces, coarse.faces)


def test_a_budget_that_suffices_changes_nothing_and_too_small_ones_stop_at_the_topology():
    ring = FINE["torus"]
    for budget in (len(ring.faces), 2_000_000):
        assert simplify(ring, budget) is ring
    for budget in (0, 1, 4, 14):
        least = simplify(ring, budget)
        assert 14 <= len(least.faces) < 60  # a torus has 14 faces at least
        assert is_manifold(least)
        assert euler_number(least) == 0
    ball_of_four = simplify(extract_surface(Shape(ball()), 16), 0)
    assert len(ball_of_four.faces) == 4
    assert is_manifold(ball_of_four)


def test_importance_makes_faces_denser():
    fine = FINE["bumpy"]
    upper = torch.where(fine.points[:, 1] > 0, 3.0, 1.0)
    coarse = simplify(fine, 3000, upper)
    height = coarse.points[coarse.faces].mean(1)[:, 1]
    ratio = float((height > 0.02).sum() / (height < -0.02).sum())
    assert 2 < ratio < 4.5
    assert is_manifold(coarse)


def test_vertex_normals_of_a_ball_are_its_radii():
    mesh = extract_surface(Shape(ball()), 64)
    normals = vertex_normals(mesh.vertices.double(), mesh.faces)
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(normals), dtype=torch.float64))
    cosine = (normals * torch.nn.functional.normalize(mesh.vertices.double(), dim=1)).sum(1)
    assert float(cosine.min()) > np.cos(np.radians(5))
    box = cube((0, 0, 0))  # angles as weights: a corner's normal is the diagonal however its squares are cut
    torch.testing.assert_close(
        vertex_normals(box.vertices, box.faces), torch.nn.functional.normalize(box.vertices - 0.5, dim=1)
    )


def test_a_pair_is_two_pieces_and_crumbs_still_go():
    pair = joined(cube((0, 0, 0)), moved(cube((0, 0, 0)), (3.0, 0, 0)))
    crumb = cube((0, 3, 0))
    crumb = dataclasses.replace(crumb, vertices=crumb.vertices * torch.tensor([0.5, 1.0, 1.0]))
    mesh = joined(pair, dataclasses.replace(crumb, vertices=crumb.vertices * 0.5))
    assert len(clean(mesh).faces) == 12
    assert len(clean(mesh, 0.4).faces) == 24
    assert len(clean(mesh, 0.01).faces) == 36
