# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from backend.families.capsule.model import STRIPE_M
from backend.geometry.bake import bake
from backend.geometry.clean import clean
from backend.geometry.mesh import TriMesh, vertex_normals
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface
from backend.geometry.unwrap import unwrap
from backend.protocol import PopulaceError
from tests.backend.geometry_fields import Shape, ball, bumpy, capsule


def road(field, resolution, faces, size):
    fine = clean(extract_surface(field, resolution))
    coarse = simplify(fine, faces)
    coarse = unwrap(coarse, field.region(coarse.points), size)
    return fine, coarse, bake(field, fine, coarse, size)


def samples(mesh, size, count=20000, seed=0):
    """Random places on the mesh: face, barycentric coordinates, and the texel (row from the top, column) there."""
    rng = np.random.default_rng(seed)
    corners = mesh.vertices.double().numpy()[mesh.faces.numpy()]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    face = rng.choice(len(area), count, p=area / area.sum())
    weight = rng.dirichlet((1, 1, 1), count)
    uv = np.einsum("nk,nki->ni", weight, mesh.uvs.double().numpy()[mesh.face_uvs_idx.numpy()[face]])
    column, row = np.floor(uv * size).astype(int).T
    return face, weight, size - 1 - row, column


def decode_normals(mesh, face, weight, colour):
    """Read a tangent-space normal map as glTF and Blender do, with tangents found by another road than the bake's:
    per face from the uv gradient, averaged by angle over the faces around each uv vertex, in a plain loop."""
    vertices, faces = mesh.vertices.double().numpy(), mesh.faces.numpy()
    uvs, corners = mesh.uvs.double().numpy(), mesh.face_uvs_idx.numpy()
    normals = vertex_normals(mesh.vertices.double(), mesh.faces).numpy()
    tangents = np.zeros((len(uvs), 3))
    for f in range(len(faces)):
        edges = np.stack([vertices[faces[f, 1]] - vertices[faces[f, 0]], vertices[faces[f, 2]] - vertices[faces[f, 0]]])
        flat = np.stack([uvs[corners[f, 1]] - uvs[corners[f, 0]], uvs[corners[f, 2]] - uvs[corners[f, 0]]])
        along = np.linalg.solve(flat, edges)[0]  # dp/du
        for i in range(3):
            n = normals[faces[f, i]]

            def flattened(v, n=n):
                v = v - v @ n * n
                return v / np.linalg.norm(v)

            a = flattened(vertices[faces[f, (i + 1) % 3]] - vertices[faces[f, i]])
            b = flattened(vertices[faces[f, (i + 2) % 3]] - vertices[faces[f, i]])
            tangents[corners[f, i]] += np.arccos(np.clip(a @ b, -1, 1)) * flattened(along)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    n = np.einsum("nk,nki->ni", weight, normals[faces[face]])
    t = np.einsum("nk,nki->ni", weight, tangents[corners[face]])
    x, y, z = (colour.astype(float) / 255 * 2 - 1).T[..., None]
    mapped = x * t + y * np.cross(n, t) + z * n
    return n / np.linalg.norm(n, axis=1, keepdims=True), mapped / np.linalg.norm(mapped, axis=1, keepdims=True)


@pytest.mark.parametrize("field", [capsule(1), capsule(6, single=True)], ids=["person", "single"])
def test_colours_are_the_fields(field):
    size = 1024
    _, mesh, textures = road(field, 96, 4000, size)
    assert textures.base_color.shape == textures.normal.shape == (size, size, 3)
    assert textures.base_color.dtype == torch.uint8
    face, weight, row, column = samples(mesh, size)
    place = np.einsum("nk,nki->ni", weight, mesh.points.double().numpy()[mesh.faces.numpy()[face]])
    place = torch.from_numpy(place).float()
    near = torch.cat([field.color(place + d) for d in 0.008 * torch.cat([torch.eye(3), -torch.eye(3)])[:, None]])
    near = near.reshape(6, -1, 3)
    plain = ((near - near[0]).abs().amax((0, 2)) == 0).numpy()
    plain &= (field.sdf(place).abs() < 2e-3).numpy()  # a few texels off the stripes' borders; not across a crease
    assert plain.mean() > 0.7
    baked = textures.base_color.numpy()[row, column].astype(float)
    assert np.abs(baked - 255 * near[0].double().numpy())[plain].max() <= 2
    assert STRIPE_M > 0.05


def test_a_normal_map_makes_a_coarse_mesh_look_like_the_fine_one():
    field = Shape(bumpy(0.004, 60.0), color=lambda p: torch.ones_like(p))
    size = 512
    _, mesh, textures = road(field, 160, 2500, size)
    face, weight, row, column = samples(mesh, size, 8000)
    smooth, mapped = decode_normals(mesh, face, weight, textures.normal.numpy()[row, column])
    place = np.einsum("nk,nki->ni", weight, mesh.points.double().numpy()[mesh.faces.numpy()[face]])
    place = torch.from_numpy(place).requires_grad_()
    (gradient,) = torch.autograd.grad(field._sdf(place).sum(), place)
    true = torch.nn.functional.normalize(gradient, dim=1).numpy()

    def error(normals):
        return np.degrees(np.arccos(np.clip((normals * true).sum(1), -1, 1))).mean()

    assert error(smooth) > 3
    assert error(mapped) < error(smooth) / 3
    assert abs(np.linalg.norm(textures.normal.numpy() / 127.5 - 1, axis=2) - 1).max() < 0.02


def test_where_the_mesh_is_the_fine_surface_the_map_is_flat():
    field = Shape(ball(), color=lambda p: torch.ones_like(p))
    fine = clean(extract_surface(field, 32))
    mesh = unwrap(fine, torch.zeros(len(fine.vertices), dtype=torch.int64), 512)
    textures = bake(field, fine, mesh, 512)
    assert np.abs(textures.normal.numpy().astype(int) - [128, 128, 255]).max() < 12  # area and angle weights differ
    assert (textures.base_color == 255).all()


def test_colour_comes_from_the_own_side_of_a_thin_sheet():
    """A plate 12 mm thick, red above and blue below: a coarse mesh pushed inwards must not pick up the other side."""

    def sdf(p):
        q = torch.stack([(p[:, [0, 2]].norm(dim=1) - 0.4), p[:, 1].abs() - 0.004], 1)
        return q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0) - 0.002

    red, blue = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    field = Shape(sdf, (0.45, 0.05, 0.45), color=lambda p: torch.where(p[:, 1:2] > 0, red, blue))
    fine = clean(extract_surface(field, 160))
    mesh = simplify(fine, 3000)
    mesh = unwrap(mesh, torch.zeros(len(mesh.vertices), dtype=torch.int64), 512)
    pushed = dataclasses.replace(mesh, vertices=mesh.vertices * torch.tensor([1.0, 0.2, 1.0]))
    textures = bake(field, fine, pushed, 512)
    face, _, row, column = samples(mesh, 512)
    height = mesh.points[mesh.faces].double().numpy()[face][..., 1]
    baked = textures.base_color.numpy()[row, column]
    for side, colour in ((height.min(1) > 0.003, (255, 0, 0)), (height.max(1) < -0.003, (0, 0, 255))):
        assert side.sum() > 5000
        assert (baked[side] == colour).all()


def test_the_field_is_asked_once_on_its_own_surface():
    asked = []

    def color(points):
        asked.append(points)
        return torch.zeros_like(points)

    shift = torch.tensor([0.0, 5.0, 0.0])
    field = Shape(ball(), color=color, offset=lambda p: shift.expand_as(p))
    road(field, 96, 1000, 512)
    assert max(len(chunk) for chunk in asked) <= 1 << 15
    points = torch.cat(asked)
    assert float(ball()(points).abs().max()) < 5e-4  # field space, and the fine surface rather than the coarse one
    assert 0.3 * 512**2 < len(points) < 512**2


def test_material_is_baked_where_the_colour_is():
    """Roughness 0.2 above and 0.6 below, metal on one side: texel by texel with a colour that says the same."""

    def sides(points):
        return (points[:, :2] > 0).float()

    field = Shape(ball(), color=lambda p: torch.cat([sides(p), torch.zeros_like(p[:, :1])], 1))
    field.material = lambda p: torch.stack([0.2 + 0.4 * sides(p)[:, 1], sides(p)[:, 0]], 1)
    _, _, textures = road(field, 48, 800, 256)
    right, up = (textures.base_color.numpy()[..., c] > 0 for c in (0, 1))
    assert 0.2 < right.mean() < 0.8
    assert 0.2 < up.mean() < 0.8
    occlusion, roughness, metallic = np.moveaxis(textures.orm.numpy(), 2, 0)
    assert (occlusion == 255).all()
    assert np.array_equal(roughness, np.where(up, 153, 51))
    assert np.array_equal(metallic, np.where(right, 255, 0))


def test_one_material_everywhere_is_one_colour_and_colour_alone_leaves_the_rest_out():
    field = capsule(4, single=True)
    fine, mesh, textures = road(field, 48, 800, 256)
    assert (textures.orm == torch.tensor([255, 128, 0])).all()  # a single capsule is all head
    alone = bake(field, fine, mesh, 256, pbr=False)
    assert alone.normal is alone.orm is None
    assert torch.equal(alone.base_color, textures.base_color)


def test_texels_outside_the_charts_take_the_nearest_covered_one():
    corner = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
    flat = torch.tensor([[0.053, 0.047], [0.313, 0.111], [0.097, 0.317]])
    uvs = torch.cat([flat, flat + 0.6, flat + torch.tensor([0.6, 0.0]), flat + torch.tensor([0.1, 0.5])])
    mesh = TriMesh(corner, faces, corner, uvs, torch.arange(12).reshape(4, 3))
    field = Shape(ball(), color=lambda p: p)
    size = 128
    textures = bake(field, dataclasses.replace(mesh, uvs=None, face_uvs_idx=None), mesh, size)
    column, row = np.meshgrid(np.arange(size), np.arange(size))
    centres = np.stack([(column + 0.5) / size, 1 - (row + 0.5) / size], -1).reshape(-1, 2)
    covered = np.zeros(len(centres), bool)
    for a, b, c in uvs.double().numpy().reshape(4, 3, 2):
        weight = np.linalg.solve(np.stack([b - a, c - a], 1), (centres - a).T)
        covered |= (weight.min(0) > 1e-6) & (weight.sum(0) < 1 - 1e-6)
    pixels = textures.base_color.numpy().reshape(-1, 3)
    assert 0.05 < covered.mean() < 0.3
    distance, nearest = cKDTree(centres[covered]).query(centres)
    same = (pixels == pixels[covered][nearest]).all(1)
    close = distance < 9 / size
    ties = cKDTree(centres[covered]).query(centres, 2)[0]
    assert same[close & (ties[:, 1] - ties[:, 0] > 1e-6)].mean() > 0.995
    assert not (pixels == 0).all(1)[~covered].all()


def test_every_texel_centre_belongs_to_one_face_whatever_the_threads():
    field = capsule(3)
    fine = clean(extract_surface(field, 64))
    mesh = simplify(fine, 2000)
    mesh = unwrap(mesh, field.region(mesh.points), 512)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(bake(field, fine, mesh, 512))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].base_color, results[1].base_color)
    assert torch.equal(results[0].normal, results[1].normal)
    assert torch.equal(results[0].orm, results[1].orm)


def test_colours_that_are_not_numbers_are_an_error():
    with pytest.raises(PopulaceError, match="not finite"):
        road(Shape(ball(), color=lambda p: torch.full_like(p, torch.nan)), 32, 500, 512)
