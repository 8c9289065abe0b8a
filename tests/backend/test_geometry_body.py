# SPDX-License-Identifier: GPL-3.0-or-later
"""The body mesh against closed answers: a ball, capsules, and slow twins that look at every triangle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.families.capsule.model import CapsuleModel
from backend.geometry.body import BodyMesh, plane_weights
from backend.geometry.mesh import TriMesh
from backend.geometry.tetgrid import extract_surface

MIRROR = torch.tensor([1.0, -1.0, 1.0])


def ball(rings: int = 48, radius: float = 0.5, centre: tuple[float, ...] = (0.1, -0.05, 0.2)) -> tuple[Tensor, Tensor]:
    """Latitudes and longitudes, counter-clockwise from outside, closed."""
    columns = 2 * rings
    theta = torch.linspace(0, math.pi, rings + 1, dtype=torch.float64)[1:-1]
    phi = torch.arange(columns, dtype=torch.float64) * (2 * math.pi / columns)
    ring = torch.stack([
        theta.sin()[:, None] * phi.sin(), theta.cos()[:, None].expand(-1, columns), theta.sin()[:, None] * phi.cos()
    ], 2).reshape(-1, 3)  # fmt: skip
    vertices = torch.cat([ring, torch.tensor([[0, 1, 0], [0, -1, 0]], dtype=torch.float64)])
    top, bottom = len(ring), len(ring) + 1
    faces = []
    for i in range(columns):
        j = (i + 1) % columns
        faces.append((top, i, j))
        faces.append((bottom, (rings - 2) * columns + j, (rings - 2) * columns + i))
        for r in range(rings - 2):
            a, b = r * columns + i, r * columns + j
            faces += [(a, a + columns, b + columns), (a, b + columns, b)]
    return (vertices * radius + torch.tensor(centre)).float(), torch.tensor(faces)


def body_of(vertices: Tensor, faces: Tensor) -> BodyMesh:
    low, high = vertices.amin(0), vertices.amax(0)
    return BodyMesh(vertices, faces, (vertices - low) / (high - low))


@pytest.fixture(scope="module")
def person() -> tuple[TriMesh, object]:
    model = CapsuleModel(torch.device("cpu"))
    field = model.decode(model.sample(5, 1.0, {}))[0]
    return extract_surface(field, 96), field


def points_near(body: BodyMesh, count: int, spread: float = 0.1) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    at = torch.randint(len(body.vertices), (count,), generator=rng)
    return body.vertices[at] + spread * torch.randn(count, 3, generator=rng)


def test_a_balls_distance_and_normal_are_the_balls() -> None:
    body = body_of(*ball())
    centre = torch.tensor([0.1, -0.05, 0.2])
    points = points_near(body, 3000, 0.3)
    exact = 0.5 - (points - centre).norm(dim=1)
    assert (body.signed_distance(points) - exact).abs().max() < 6e-4  # the mesh lies so far within the ball
    near = body.nearest(points)
    normals = torch.nn.functional.normalize(body.carry(body.winding_normals, near), dim=1)
    outward = torch.nn.functional.normalize(points - centre, dim=1)
    away = (points - centre).norm(dim=1) > 0.1
    assert (normals * outward).sum(1)[away].min() > 0.99


def test_the_nearest_triangle_is_that_of_a_search_of_all() -> None:
    body = body_of(*ball(12))
    points = points_near(body, 400, 0.4).double()
    corners = body.vertices.double()[body.faces]
    near = body.nearest(points)
    weights = plane_weights(points, corners[near.face])
    assert torch.allclose(near.weights, weights)
    foot = (weights[..., None] * corners[near.face]).sum(1)
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    off = ((points - foot)[:, None] * normal[near.face][:, None]).sum(2)[:, 0] / normal[near.face].norm(dim=1)
    assert torch.allclose(off.abs(), (points - foot).norm(dim=1), atol=1e-12)  # the foot is on the plane
    samples = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((4000,))
    inner = torch.einsum("kc,fcd->fkd", torch.cat([samples, torch.eye(3).double()]), corners).reshape(-1, 3)
    best = torch.stack([(inner - p).norm(dim=1).amin() for p in points[:60]])
    assert (near.distance[:60] <= best + 1e-9).all()
    assert (near.distance[:60] > best - 4e-3).all()


def test_weights_outside_of_a_triangle_are_not_clamped() -> None:
    triangle = torch.tensor([[[0.0, 0, 0], [2, 0, 0], [0, 1, 0]]])
    for b in ([0.2, 0.3, 0.5], [-0.5, 1.0, 0.5], [1.5, -0.25, -0.25]):
        point = (torch.tensor(b)[:, None] * triangle[0]).sum(0) + torch.tensor([0, 0, 3.0])
        assert torch.allclose(plane_weights(point[None], triangle)[0], torch.tensor(b), atol=1e-6)
    flat = torch.zeros(1, 3, 3)
    assert plane_weights(torch.ones(1, 3), flat).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_sign_is_that_of_a_person_of_capsules(person, mirrored: bool) -> None:
    mesh, field = person
    frame = MIRROR if mirrored else torch.ones(3)
    body = body_of(mesh.vertices * frame, mesh.faces)
    assert body.outward == (-1.0 if mirrored else 1.0)
    points = points_near(body, 20000, 0.08)
    exact = -field.sdf(points * frame)
    sure = exact.abs() > 0.01  # as far as the lattice of the mesh is fine
    assert (body.inside(points) == (exact > 0))[sure].all()
    outside = sure & (exact < 0)
    assert (body.signed_distance(points) - exact)[outside].abs().max() < 0.01


def test_where_limbs_overlap_it_is_inside() -> None:
    vertices, faces = ball(16, 0.4, (0, 0, 0))
    both = torch.cat([vertices, vertices + torch.tensor([0.3, 0, 0])])
    body = body_of(both, torch.cat([faces, faces + len(vertices)]))
    assert body.inside(torch.tensor([[0.15, 0, 0], [0.0, 0.0, 0.0], [0.3, 0, 0], [0.15, 0.39, 0]])).tolist() == [
        True, True, True, False]  # fmt: skip


def test_points_above_edges_and_vertices_get_a_sign() -> None:
    """A mesh whose vertices and edges lie exactly above and below the points asked: nothing counts twice or not."""
    vertices, faces = ball(16, 0.5, (0, 0, 0))
    body = body_of(vertices, faces)
    inner = vertices * torch.tensor([1.0, 1.0, 0.5])
    inner = inner[(inner[:, :2].norm(dim=1) < 0.48) & (inner[:, 2].abs() > 0.02)]
    assert len(inner) > 250
    assert body.inside(inner).all()
    assert not body.inside(vertices + torch.tensor([0, 0, 1.0])).any()
    assert not body.inside(vertices - torch.tensor([0, 0, 1.1])).any()


def test_the_viewer_sees_the_front_and_not_what_is_hidden() -> None:
    vertices, faces = ball(32, 0.3, (0, 0, 0.4))
    behind = vertices * torch.tensor([1.0, 1.0, 1.0]) * 0.8 - torch.tensor([0.0, 0.0, 0.8])
    body = body_of(torch.cat([vertices, behind]), torch.cat([faces, faces + len(vertices)]))
    seen = body.seen()
    n = len(vertices)
    front = (vertices[:, 2] - 0.4) / 0.3
    assert seen[:n][front > 0.15].all()
    assert not seen[:n][front < -0.1].any()
    assert not seen[n:].any()  # the smaller one is wholly behind the larger
    legacy = body.seen(legacy=True)
    assert legacy[n:].sum() > 100  # the released demo has it the other way round
    assert not legacy[:n][(front > 0.95)].any()
    mirrored = body_of(body.vertices * MIRROR, body.faces)
    assert (mirrored.seen() == seen).float().mean() > 0.999


def test_distances_have_gradients() -> None:
    body = body_of(*ball())
    points = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.2, 0.25]], requires_grad=True)
    body.signed_distance(points).sum().backward()
    assert points.grad is not None
    outward = torch.nn.functional.normalize(points.detach() - torch.tensor([0.1, -0.05, 0.2]), dim=1)
    assert np.allclose(points.grad, -outward, atol=0.05)
