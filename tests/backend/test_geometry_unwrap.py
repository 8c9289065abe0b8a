# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.sparse import coo_array, csgraph

from backend.geometry.clean import clean, is_manifold
from backend.geometry.mesh import TriMesh
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface
from backend.geometry.unwrap import gap, unwrap
from backend.protocol import PopulaceError
from tests.backend.geometry_fields import Shape, ball, bumpy, capsule, torus


def spiral():
    """A ramp of square cross-section that winds up three times: seen from above, its top is connected and overlaps."""
    turn = np.linspace(0, 6 * np.pi, 120)
    centre = np.stack([0.3 * np.cos(turn), 0.03 * turn, 0.3 * np.sin(turn)], 1)
    outward = np.stack([np.cos(turn), 0 * turn, np.sin(turn)], 1) * 0.05
    up = np.array([0, 0.04, 0])
    rings = np.stack([centre - outward, centre + outward, centre + outward + up, centre - outward + up], 1)
    n = len(turn)
    faces = []
    for i in range(n - 1):
        for k in range(4):
            a, b, c, d = 4 * i + k, 4 * i + (k + 1) % 4, 4 * i + 4 + (k + 1) % 4, 4 * i + 4 + k
            faces += [(a, b, c), (a, c, d)]
    faces += [(0, 2, 1), (0, 3, 2), (4 * n - 4, 4 * n - 3, 4 * n - 2), (4 * n - 4, 4 * n - 2, 4 * n - 1)]
    vertices = torch.tensor(rings.reshape(-1, 3), dtype=torch.float32)
    mesh = TriMesh(vertices, torch.tensor(faces), vertices)
    assert is_manifold(mesh)
    return clean(mesh)


PERSON = capsule(1)


def person():
    mesh = simplify(clean(extract_surface(PERSON, 96)), 6000)
    return mesh, PERSON.region(mesh.points)


def no_region(mesh):
    return mesh, torch.zeros(len(mesh.vertices), dtype=torch.int64)


SHAPES = {
    "person": person,
    "ball": lambda: no_region(extract_surface(Shape(ball()), 24)),
    "torus": lambda: no_region(extract_surface(Shape(torus()), 32)),
    "bumpy": lambda: no_region(extract_surface(Shape(bumpy(0.05, 25.0)), 40)),
    "spiral": lambda: no_region(spiral()),
}


def chart_of_faces(mesh):
    """Faces are in one chart if uv vertices join them."""
    corners = mesh.face_uvs_idx.numpy()
    pairs = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]]])
    joined = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(mesh.uvs),) * 2)
    return csgraph.connected_components(joined, False)[1][corners[:, 0]]


def raster(mesh, size):
    """How many faces strictly cover each texel centre, and the chart seen there (-1: none)."""
    triangles = mesh.uvs.double().numpy()[mesh.face_uvs_idx.numpy()] * size
    charts = chart_of_faces(mesh)
    count, seen = np.zeros((size, size), int), np.full((size, size), -1)
    for triangle, chart in zip(triangles, charts):
        (x0, y0), (x1, y1) = np.floor(triangle.min(0)).astype(int), np.ceil(triangle.max(0)).astype(int)
        x, y = np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5)
        inside = np.ones(x.shape, bool)
        for (ax, ay), (bx, by) in zip(triangle, np.roll(triangle, -1, 0)):
            inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 1e-3
        count[y0:y1, x0:x1] += inside
        seen[y0:y1, x0:x1][inside] = chart
    return count, seen


@pytest.mark.parametrize(("name", "method", "size"), [
    *((name, "atlas", 512) for name in SHAPES), ("person", "atlas", 1024), ("person", "atlas", 2048),
    ("spiral", "xatlas", 512)])  # fmt: skip
def test_charts_do_not_overlap_and_keep_their_distance(name, method, size):
    mesh, region = SHAPES[name]()
    unwrapped = unwrap(mesh, region, size, method)
    assert unwrapped.face_uvs_idx.shape == mesh.faces.shape
    assert torch.equal(unwrapped.faces, mesh.faces)
    assert float(unwrapped.uvs.min()) >= 1 / size
    assert float(unwrapped.uvs.max()) <= 1 - 1 / size
    assert len(torch.unique(unwrapped.face_uvs_idx)) == len(unwrapped.uvs)
    count, seen = raster(unwrapped, size)
    assert count.max() == 1
    assert (count > 0).mean() > (0.15 if name == "spiral" else 0.3)
    window = gap(size)  # texels less than `gap` apart are of one chart
    lowest = ndimage.minimum_filter(np.where(seen < 0, 1 << 30, seen), window)
    highest = ndimage.maximum_filter(seen, window)
    assert (lowest[highest >= 0] == highest[highest >= 0]).all()


@pytest.mark.parametrize("name", SHAPES)
def test_atlas_mirrors_nothing_and_keeps_regions_and_scale(name):
    mesh, region = SHAPES[name]()
    unwrapped = unwrap(mesh, region, 1024)
    flat = unwrapped.uvs.double()[unwrapped.face_uvs_idx]
    first, second = (flat[:, 1:] - flat[:, :1]).unbind(1)
    area = (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    assert (area > 0).all()
    corners = mesh.vertices.double()[mesh.faces]
    solid = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1) / 2
    shrunk = area / solid
    assert float((solid * (shrunk / shrunk.max() < 0.3)).sum() / solid.sum()) < 0.02  # stretched by more than 3
    charts = chart_of_faces(unwrapped)
    face_region = region[mesh.faces].median(dim=1).values.numpy()
    for chart in np.unique(charts):
        values, counts = np.unique(face_region[charts == chart], return_counts=True)
        assert counts.max() >= 0.9 * counts.sum() or len(values) == 1
    assert len(np.unique(charts)) < {"person": 60, "ball": 7, "torus": 20, "bumpy": 130, "spiral": 40}[name]
    again = unwrap(mesh, region, 1024)
    assert torch.equal(again.uvs, unwrapped.uvs)
    assert torch.equal(again.face_uvs_idx, unwrapped.face_uvs_idx)


def test_regions_get_the_texels_that_they_ask_for():
    mesh, region = person()
    density = torch.tensor([2.5, 1.0, 1.0, 1.0, 0.5, 0.5])
    unwrapped = unwrap(mesh, region, 1024, density=density)
    flat = unwrapped.uvs.double()[unwrapped.face_uvs_idx]
    first, second = (flat[:, 1:] - flat[:, :1]).unbind(1)
    area = (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]).abs()
    corners = mesh.vertices.double()[mesh.faces]
    solid = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1)
    label = region[mesh.faces].median(dim=1).values
    per_area = torch.stack([(area[label == r].sum() / solid[label == r].sum()) for r in range(6)])
    torch.testing.assert_close(per_area / per_area[1], density.double(), rtol=0.3, atol=0)


def test_missing_xatlas_and_charts_that_do_not_fit_are_said_clearly(monkeypatch):
    mesh, region = no_region(spiral())
    monkeypatch.setitem(sys.modules, "xatlas", None)
    with pytest.raises(PopulaceError, match="xatlas") as caught:
        unwrap(mesh, region, 512, "xatlas")
    assert "pip install xatlas" in caught.value.hint
    pieces = torch.arange(len(mesh.faces) * 3).reshape(-1, 3)
    loose = TriMesh(mesh.vertices[mesh.faces.flatten()], pieces, mesh.points[mesh.faces.flatten()])
    with pytest.raises(PopulaceError, match="do not fit a texture of 64"):
        unwrap(loose, torch.zeros(len(loose.vertices), dtype=torch.int64), 64)
