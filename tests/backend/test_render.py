# SPDX-License-Identifier: GPL-3.0-or-later
"""The renderer against analytic answers, against its reference twin, and its gradients against finite differences."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from backend.render.camera import Camera, look_at, orthographic, perspective, to_clip, turntable
from backend.render.rasterize import interpolate, rasterize, texture
from backend.render.shade import BACKGROUND, Maps, render_mesh, render_sheet, to_linear, to_srgb
from backend.render.silhouette import antialias, edge_topology
from backend.render.visibility import visible_numba, visible_torch

F64 = torch.float64


def flat(points: list[list[float]], z: float = 0.0) -> Tensor:
    """Clip positions [1, V, 4] of x, y in -1..1 at one depth."""
    xy = torch.tensor(points, dtype=F64)
    return torch.cat([xy, torch.full((len(xy), 1), z, dtype=F64), torch.ones(len(xy), 1, dtype=F64)], dim=1)[None]


def grid(size: int, half: float) -> tuple[Tensor, Tensor]:
    """A square of size x size quads in x, y within -half..half: points [V, 2] and faces [F, 3]."""
    line = torch.linspace(-half, half, size + 1, dtype=F64)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(-1, 2)
    start = torch.arange(size)[:, None] * (size + 1) + torch.arange(size)
    a, b, c, d = (start.flatten() + offset for offset in (0, 1, size + 1, size + 2))
    return points, torch.cat([torch.stack([a, b, d], dim=1), torch.stack([a, d, c], dim=1)])


def sphere(subdivisions: int, radius: float = 1.0) -> tuple[Tensor, Tensor]:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return torch.tensor(np.array(mesh.vertices)), torch.tensor(np.array(mesh.faces)).long()


def rays(camera: Camera, resolution: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Origin [3] and directions [H, W, 3] through the pixel centres of one camera, by inverting its matrix."""
    height, width = resolution
    y, x = torch.meshgrid(torch.arange(height, dtype=F64), torch.arange(width, dtype=F64), indexing="ij")
    ndc = torch.stack([(x + 0.5) / width * 2 - 1, 1 - (y + 0.5) / height * 2], dim=-1)
    far = torch.cat([ndc, torch.ones(height, width, 2, dtype=F64)], dim=-1) @ torch.linalg.inv(camera.mvp.double()).T
    origin = camera.c2w[:3, 3].double()
    return origin, far[..., :3] / far[..., 3:] - origin


def camera_at(eye: list[float], target: list[float], fov: float = 50.0, near: float = 0.1, far: float = 20.0) -> Camera:
    c2w = look_at(torch.tensor(eye, dtype=F64), torch.tensor(target, dtype=F64))
    return Camera(c2w, perspective(math.radians(fov), 1.0, near, far).double())


# --- camera ----------------------------------------------------------------------------------------------------------


def test_look_at_puts_the_target_on_the_axis_with_y_up():
    camera = camera_at([1.0, 2.0, 3.0], [0.0, 1.0, -1.0])
    seen = to_clip(torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.5, -1.0]], dtype=F64), camera.view)
    assert torch.allclose(seen[0, :2], torch.zeros(2, dtype=F64), atol=1e-12)
    assert seen[0, 2] == pytest.approx(-math.sqrt(18))
    assert seen[1, 0] == pytest.approx(0, abs=1e-12)
    assert seen[1, 1] > 0
    assert torch.allclose(camera.view @ camera.c2w, torch.eye(4, dtype=F64), atol=1e-12)
    assert torch.linalg.det(camera.c2w[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("matrix", [perspective(0.8, 1.5, 0.25, 8.0), orthographic(0.7, 1.5, 0.25, 8.0)])
def test_projection_maps_near_to_minus_one_and_far_to_one(matrix: Tensor):
    clip = to_clip(torch.tensor([[0.0, 0.0, -0.25], [0.0, 0.0, -8.0]]), matrix)
    assert (clip[:, 2] / clip[:, 3]).tolist() == pytest.approx([-1, 1], abs=1e-6)


def test_intrinsics_project_like_the_matrix():
    camera = camera_at([0.3, 1.0, 2.0], [0.0, 0.9, 0.0])
    camera.projection[0, 2], camera.projection[1, 2] = 0.1, -0.2  # principal point off the centre
    points = torch.randn(50, 3, dtype=F64, generator=torch.Generator().manual_seed(1)) * 0.3
    clip = to_clip(points, camera.mvp)
    ndc = clip[:, :2] / clip[:, 3:]
    expected = torch.stack([(ndc[:, 0] + 1) / 2 * 320, (1 - ndc[:, 1]) / 2 * 240], dim=1)
    x, y, z = to_clip(points, camera.view)[:, :3].unbind(1)
    pixel = torch.stack([x, -y, -z], dim=1) @ camera.intrinsics((240, 320)).T
    assert torch.allclose(pixel[:, :2] / pixel[:, 2:], expected, atol=1e-9)


@pytest.mark.parametrize("fov", [None, math.radians(30)])
def test_turntable_frames_the_box_from_every_side(fov: float | None):
    bounds = torch.tensor([[-0.4, 0.0, -0.2], [0.4, 1.8, 0.2]])
    cameras = turntable(bounds, 8, elevation=0.3, fov_y=fov, aspect=0.5)
    corners = torch.cartesian_prod(*bounds.T)
    clip = to_clip(corners, cameras.mvp)
    ndc = clip[..., :3] / clip[..., 3:]
    assert (ndc.abs() < 1).all()
    assert ndc[..., :2].abs().amax() > 0.8
    assert cameras.c2w[0, 2, 3] > 0.5  # in front
    assert cameras.c2w[2, 0, 3] > 0.5  # from +X


# --- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [0.0, 0.02])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_every_pixel_centre_of_a_tessellated_plane_is_covered_exactly_once(jitter: float, backend: str):
    points, faces = grid(8, 33 / 32)  # without jitter every other corner lies exactly on a pixel centre
    points = points + jitter * torch.randn(points.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    clip = flat(points.tolist())
    clip = clip * (1 + 0.3 * torch.rand(1, len(points), 1, dtype=F64, generator=torch.Generator().manual_seed(3)))
    count = sum(rasterize(clip, face[None], (64, 64), backend).mask[0].long() for face in faces)
    inner = slice(4, -4) if jitter else slice(None)
    assert (count[inner, inner] == 1).all()


def test_a_plane_that_reaches_behind_the_camera_is_covered_exactly_once():
    camera = camera_at([0.1, 1.0, 0.2], [0.0, 0.4, -1.0])
    points, faces = grid(6, 15.0)
    ground = torch.stack([points[:, 0], torch.zeros(len(points), dtype=F64), points[:, 1]], dim=1)
    clip = to_clip(ground, camera.mvp)[None]
    assert (clip[..., 3] < 0).any()
    count = sum(rasterize(clip, face[None], (48, 48)).mask[0].long() for face in faces)
    origin, directions = rays(camera, (48, 48))
    reach = -origin[1] / directions[..., 1]  # in units of the far plane
    expected = (directions[..., 1] < 0) & (reach < 1)
    hit = origin + reach[..., None] * directions
    expected &= (hit[..., [0, 2]].abs() < 15).all(dim=-1)
    assert (count[expected] == 1).all()
    assert (count[~expected] == 0).all()
    raster = rasterize(clip, faces, (48, 48))
    seen = interpolate(ground, raster, faces)[0]
    assert torch.allclose(seen[expected], hit[expected], atol=2e-3)
    assert expected.sum() > 500


def soup(seed: int) -> tuple[Tensor, Tensor]:
    """Nasty triangles: tiny, huge, degenerate, behind the camera, across every plane, doubled, not finite."""
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randn(240, 4, dtype=F64, generator=generator)
    clip[:, 3] = clip[:, 3] + 0.7
    clip[:60] *= torch.logspace(-6, 6, 60, dtype=F64)[:, None]
    clip[60:80, :2] = torch.round(clip[60:80, :2] * 16) / 16
    clip[60:80, 3] = 1
    clip[80:84] = torch.tensor([[math.nan, 0, 0, 1], [math.inf, 0, 0, 1], [0, 0, 0, 0], [0.3, 0.1, 0, 1e-300]])
    faces = torch.randint(0, 240, (150, 3), generator=generator)
    faces[120:] = faces[:30]
    return clip, faces


@pytest.mark.parametrize("seed", range(6))
def test_compiled_and_reference_visibility_are_identical(seed: int):
    clip, faces = soup(seed)
    fast, slow = visible_numba(clip, faces, (61, 83)), visible_torch(clip, faces, (61, 83))
    assert torch.equal(fast, slow)
    assert len(torch.unique(fast)) > 10
    assert (fast < 120).all()  # of doubled faces the lower index wins


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_of_equally_near_faces_the_first_is_seen_even_if_it_had_to_be_clipped(backend: str):
    clip = flat([[-500, -500], [500, -500], [0, 500], [-0.5, -0.5], [0.5, -0.5], [0, 0.5]])
    for faces in (torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[3, 4, 5], [0, 1, 2], [3, 4, 5]])):
        seen = rasterize(clip, faces, (32, 32), backend).face_id
        assert (seen >= 0).all()
        assert seen[0, 18, 16] == 0
        assert (seen < 2).all()


def test_reference_visibility_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch):
    clip, faces = soup(9)
    whole = visible_torch(clip, faces, (40, 40))
    monkeypatch.setattr("backend.render.visibility.FRAGMENTS", 700)
    assert torch.equal(visible_torch(clip, faces, (40, 40)), whole)


def test_visibility_against_ray_casting():
    camera = camera_at([0.4, 0.5, 3.0], [0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(5)
    vertices = torch.rand(90, 3, dtype=F64, generator=generator) * 2 - 1
    faces = torch.arange(90).view(30, 3)
    raster = rasterize(to_clip(vertices, camera.mvp)[None], faces, (64, 64))
    origin, directions = rays(camera, (64, 64))
    a, b, c = vertices[faces].unbind(1)
    volume = torch.stack([-directions[..., None, :].expand(64, 64, 30, 3), (b - a).expand(64, 64, 30, 3),
                          (c - a).expand(64, 64, 30, 3)], dim=-1)  # fmt: skip
    solved = torch.linalg.solve(volume, (origin - a).expand(64, 64, 30, 3))
    t, u, v = solved.unbind(-1)
    inside = torch.stack([u, v, 1 - u - v]).amin(dim=0)
    t = torch.where(inside > 0, t, torch.inf)
    nearest, face = t.min(dim=-1)
    face = torch.where(torch.isinf(nearest), -1, face)
    certain = inside.abs().amin(dim=-1) > 0.01  # pixel centres within the snapping distance of an edge are left out
    assert certain.float().mean() > 0.7
    assert torch.equal(raster.face_id[0][certain], face[certain])
    found = certain & (face >= 0)
    uv = solved[..., 1:].gather(2, face.clamp(min=0)[..., None, None].expand(64, 64, 1, 2)).squeeze(2)
    assert torch.allclose(raster.barycentrics[0, ..., 1:][found], uv[found], atol=1e-9)
    expected = to_clip(origin + nearest[found][:, None] * directions[found], camera.mvp)
    assert torch.allclose(raster.depth[0][found], expected[:, 2] / expected[:, 3], atol=1e-9)


def test_faces_beyond_the_far_plane_are_cut_at_it():
    camera = camera_at([0, 0, 0], [0, 0, -1], near=0.5, far=4.0)
    vertices = torch.tensor([[-9, -1, -1], [9, -1, -1], [9, -1, -9], [-9, -1, -9]], dtype=F64)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    raster = rasterize(to_clip(vertices, camera.mvp)[None], faces, (128, 128))
    depth = -to_clip(interpolate(vertices, raster, faces)[raster.mask], camera.view)[:, 2]
    assert depth.max() < 4
    assert depth.max() > 3.8


def test_batches_and_threads_change_nothing():
    vertices, faces = sphere(3, 0.8)
    cameras = turntable(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]), 4)
    clip = to_clip(vertices.float(), cameras.mvp)
    together = rasterize(clip, faces, (70, 90))
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda one: rasterize(one[None], faces, (70, 90)), clip))
    assert torch.equal(together.face_id, torch.cat([one.face_id for one in alone]))
    assert torch.equal(together.barycentrics, torch.cat([one.barycentrics for one in alone]))
    per_image = interpolate(clip, together, faces)
    assert torch.equal(per_image[2], interpolate(clip[2], alone[2], faces)[0])


def test_nothing_to_see():
    clip, faces = flat([[2, 2], [3, 2], [2, 3]]), torch.tensor([[0, 1, 2]])
    for indices in (faces, faces[:0]):
        raster = rasterize(clip, indices, (8, 8))
        assert (raster.face_id == -1).all()
        image = interpolate(torch.ones(3, 2, dtype=F64), raster, indices)
        assert torch.equal(antialias(image, raster, clip, indices), torch.zeros(1, 8, 8, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"\[B, V, 4\]"):
        rasterize(clip[0], faces, (8, 8))


# --- analytic pictures -----------------------------------------------------------------------------------------------


def test_perspective_correct_interpolation_of_a_tilted_plane():
    camera = camera_at([0.2, 0.3, 2.0], [0.0, 0.0, 0.0])
    points, faces = grid(1, 3.0)
    vertices = torch.stack([points[:, 0], points[:, 1], 0.55 * points[:, 0] - 0.3 * points[:, 1]], dim=1).float()
    raster = rasterize(to_clip(vertices, camera.mvp)[None], faces, (96, 96))
    origin, directions = rays(camera, (96, 96))
    normal = torch.tensor([-0.55, 0.3, 1.0], dtype=F64)
    t = -(origin @ normal) / (directions @ normal)
    expected = origin + t[..., None] * directions
    assert raster.mask.all()
    assert torch.allclose(interpolate(vertices, raster, faces)[0].double(), expected, atol=1e-5)


def test_sphere_has_the_analytic_outline_and_depth():
    vertices, faces = sphere(5)
    camera = camera_at([0, 0, 3], [0, 0, 0])
    raster = rasterize(to_clip(vertices, camera.mvp)[None], faces, (200, 200))
    radius = math.tan(math.asin(1 / 3)) / math.tan(math.radians(25)) * 100  # of the cone that touches the sphere
    assert raster.mask.sum() == pytest.approx(math.pi * radius**2, rel=2e-3)
    origin, directions = rays(camera, (200, 200))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    along = directions @ origin
    inside = (along**2 - 8) > 0.05
    expected = origin + (-along - torch.sqrt((along**2 - 8).clamp(min=0)))[..., None] * directions
    assert torch.allclose(interpolate(vertices, raster, faces)[0][inside], expected[inside], atol=2e-3)


def test_texture_is_bilinear_with_its_origin_at_the_bottom_left():
    image = torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]])  # top row first
    uvs = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5], [0.0, 0.0], [0.25, 0.5], [1.0, 1.0]])
    found = texture(uvs.view(1, 2, 3, 2), image)
    assert found.shape == (1, 2, 3, 1)
    assert found.flatten().tolist() == pytest.approx([0, 3, 1.5, 2, 1, 1])


# --- gradients -------------------------------------------------------------------------------------------------------


def soft_area(clip: Tensor, faces: Tensor, size: int) -> Tensor:
    raster = rasterize(clip, faces, (size, size))
    return antialias(raster.mask[..., None].to(clip.dtype), raster, clip, faces).sum()


def test_gradient_of_a_triangles_area_is_that_of_the_shoelace_formula():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        points = torch.tensor([[-0.6, -0.7], [0.7, -0.4], [0.0, 0.65]], dtype=F64)
        points = (points + 0.2 * torch.rand(3, 2, dtype=F64, generator=generator)).requires_grad_()
        clip = torch.cat([points, torch.zeros(3, 1), torch.ones(3, 1)], dim=1)[None] * 1.7
        area = soft_area(clip, torch.tensor([[0, 1, 2]]), 200)
        (gradient,) = torch.autograd.grad(area, points)
        (ax, ay), (bx, by), (cx, cy) = points
        exact = ((bx - ax) * (cy - ay) - (by - ay) * (cx - ax)) / 2 * 100**2
        (expected,) = torch.autograd.grad(exact, points)
        assert area.item() == pytest.approx(exact.item(), rel=1e-3)
        assert (gradient - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("subdivisions", [2, 6])  # large faces, and faces smaller than a pixel
def test_gradient_of_a_spheres_silhouette(subdivisions: int):
    vertices, faces = sphere(subdivisions, 0.7)
    camera = camera_at([0.5, 0.8, 2.5], [0.0, 0.0, 0.0])
    topology = edge_topology(faces)
    assert len(topology) == len(faces) * 3 // 2
    assert (topology >= 0).all()

    def area(scale: Tensor) -> Tensor:
        clip = to_clip(vertices * scale, camera.mvp)[None]
        raster = rasterize(clip, faces, (96, 96))
        return antialias(raster.mask[..., None].double(), raster, clip, faces, topology).sum()

    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(area(scale), scale)
    with torch.no_grad():
        step = 0.02  # several crossings of pixel centres
        difference = (area(scale + step) - area(scale - step)) / (2 * step)
    assert float(gradient) == pytest.approx(float(difference), rel=0.02)


def two_squares(shift: Tensor | float, front: float) -> tuple[Tensor, Tensor, Tensor]:
    """A small square at depth `front`, moved right by `shift`, and a large one at depth 0: clip, faces, colours."""
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]], dtype=F64)
    small = corners * 0.4 + torch.stack([torch.as_tensor(shift, dtype=F64), torch.zeros((), dtype=F64)])
    depths = torch.tensor([front] * 4 + [0.0] * 4, dtype=F64)[:, None]
    clip = torch.cat([torch.cat([small, corners * 0.8]), depths, torch.ones(8, 1, dtype=F64)], dim=1)[None]
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    return clip, faces, torch.tensor([[0.9]] * 4 + [[0.3]] * 4, dtype=F64)


def test_outline_in_front_of_a_surface_moves_colour_and_a_hidden_one_nothing():
    for front, right_half in ((-0.5, 0.6), (0.5, 0.0)):
        shift = torch.tensor(0.0137, dtype=F64, requires_grad=True)
        clip, faces, colors = two_squares(shift, front)
        raster = rasterize(clip, faces, (50, 50))
        image = antialias(interpolate(colors, raster, faces), raster, clip, faces)
        (gradient,) = torch.autograd.grad(image[:, :, 25:].sum(), shift)
        rows = 0.8 * 25  # as many rows as the small square is high
        assert float(gradient) == pytest.approx(right_half * rows * 25, rel=1e-9)


def test_an_outline_behind_a_sloped_surface_changes_nothing():
    points, triangles = grid(40, 1.1)
    surface = torch.cat([points, 0.2 * points.sum(dim=1, keepdim=True), torch.ones(len(points), 1)], dim=1)
    hidden = flat([[-0.4, -0.5], [0.5, -0.4], [0.4, 0.5], [-0.5, 0.4]], z=0.9)[0]
    clip = torch.cat([surface, hidden])[None].requires_grad_()
    faces = torch.cat([triangles, torch.tensor([[0, 1, 2], [0, 2, 3]]) + len(points)])
    raster = rasterize(clip, faces, (50, 50))
    colors = torch.cat([points, points.new_ones(4, 2)])
    image = interpolate(colors, raster, faces).detach()
    smooth = antialias(image, raster, clip, faces)
    assert torch.equal(smooth, image)
    (gradient,) = torch.autograd.grad(smooth.sum(), clip)
    assert (gradient == 0).all()


def test_antialiased_square_covers_exact_fractions():
    square = flat([[-0.5, -0.53], [0.41, -0.53], [0.41, 0.5], [-0.5, 0.5]])
    smaller = square * torch.tensor([0.975, 0.98, 1, 1]) - torch.tensor([0.0, 0.0, 0.1, 0.0])  # in front of it
    clip, faces = torch.cat([smaller, square], dim=1), torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    raster = rasterize(clip, faces, (20, 20))
    mask = antialias(raster.mask[..., None].double(), raster, clip, faces)[0, ..., 0]
    assert mask[10, 14] == pytest.approx(0.1)  # the edge x = 0.41 lies a tenth into column 14
    assert mask[15, 10] == pytest.approx(0.3)  # y = -0.53: three tenths into row 15
    assert mask[10, 10] == 1
    assert mask[4, 10] == mask[10, 4] == 0


def test_gradcheck():
    generator = torch.Generator().manual_seed(2)
    clip = flat([[-0.9, -0.8], [0.85, -0.7], [0.1, 0.9], [0.9, 0.8]])
    clip = clip * torch.tensor([1.0, 1.4, 0.8, 1.1], dtype=F64)[None, :, None]
    faces = torch.tensor([[0, 1, 2], [1, 3, 2]])
    attributes = torch.rand(4, 2, dtype=F64, generator=generator)
    colors = torch.rand(1, 7, 7, 2, dtype=F64, generator=generator)

    def inside(values: Tensor, positions: Tensor) -> Tensor:
        raster = rasterize(positions, faces, (7, 7))
        return torch.cat([interpolate(values, raster, faces), raster.depth[..., None]], dim=-1)

    def outline(image: Tensor, positions: Tensor) -> Tensor:
        return antialias(image, rasterize(positions, faces, (7, 7)), positions, faces)

    for function, first in ((inside, attributes), (outline, colors)):
        inputs = (first.clone().requires_grad_(), clip.clone().requires_grad_())
        assert torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-5)
    grid_uvs = (torch.rand(1, 3, 3, 2, dtype=F64, generator=generator) * 0.8 + 0.1).requires_grad_()
    image = torch.rand(5, 6, 2, dtype=F64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(texture, (grid_uvs, image), eps=1e-7, atol=1e-5)


# --- shading ---------------------------------------------------------------------------------------------------------


def quad() -> tuple[Tensor, Tensor, Camera]:
    """A square of 1 m that faces a camera 2 m in front of it and fills a quarter of its picture."""
    vertices = torch.tensor([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    c2w = look_at(torch.tensor([0.0, 0, 2]), torch.zeros(3))
    return vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), Camera(c2w, orthographic(1.0, 1.0, 0.1, 5.0))


def test_outputs_of_a_square():
    vertices, faces, camera = quad()
    colors = torch.tensor([[0.2, 0.5, 0.7]]).expand(4, 3)
    for indices in (faces, faces.flip(1)):  # a back side is drawn as a front
        images = render_mesh(vertices, indices, camera, (16, 16), colors)
        mask = images["mask"][0, ..., 0]
        assert mask.sum() == 64
        assert torch.allclose(images["flat"][0, 8, 8], colors[0], atol=1e-4)
        assert torch.allclose(images["flat"][0, 0, 0], torch.tensor(BACKGROUND), atol=1e-4)
        assert torch.allclose(images["depth"][0][mask == 1], torch.tensor(2.0), atol=1e-5)
        assert torch.allclose(images["normal"][0][mask == 1], torch.tensor([0.0, 0, 1]), atol=1e-5)
        assert (images["normal"][0][mask == 0] == 0).all()
        assert (images["shaded"][0][mask == 1] > 0.1).all()


def test_supersampling_gives_coverage():
    vertices, faces, camera = quad()
    mask = render_mesh(vertices + torch.tensor([0.0625, 0, 0]), faces, camera, (16, 16), supersample=2)["mask"]
    assert mask[0, 8, 4] == 0.5
    assert mask[0, 8, 12] == 0.5
    assert mask.sum() == 64


def test_normal_map_tilts_the_normal_along_its_tangent():
    vertices, faces, camera = quad()
    uvs = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    tilted = torch.nn.functional.normalize(torch.tensor([0.6, -0.2, 1.0]), dim=0)
    turns = {
        "upright": (uvs, tilted),
        "quarter turn": (uvs[[1, 2, 3, 0]], torch.stack([tilted[1], -tilted[0], tilted[2]])),
        "mirrored": (uvs * torch.tensor([-1.0, 1]) + torch.tensor([1.0, 0]), tilted * torch.tensor([-1.0, 1, 1])),
    }
    for name, (layout, expected) in turns.items():
        maps = Maps(layout, faces, torch.full((4, 4, 3), 0.5), (tilted * 0.5 + 0.5).expand(4, 4, 3))
        normal = render_mesh(vertices, faces, camera, (16, 16), maps=maps)["normal"]
        assert torch.allclose(normal[0, 8, 8], expected, atol=1e-5), name
    flat_map = Maps(uvs, faces, torch.full((4, 4, 3), 0.5), torch.tensor([0.5, 0.5, 1.0]).expand(4, 4, 3))
    plain = Maps(uvs, faces, torch.full((4, 4, 3), 0.5))
    with_map, without = (render_mesh(vertices, faces, camera, (16, 16), maps=m) for m in (flat_map, plain))
    assert torch.allclose(with_map["shaded"], without["shaded"], atol=1e-6)


def test_srgb_and_back():
    values = torch.linspace(0, 1, 256)
    assert torch.allclose(to_srgb(to_linear(values)), values, atol=1e-5)
    assert to_linear(torch.tensor(0.5)) == pytest.approx(0.21404, abs=1e-4)


def test_sheet_shows_each_person_in_every_view():
    vertices, faces = sphere(3)
    body = vertices.numpy() * [0.25, 0.85, 0.2] + [0, 0.85, 0]
    red = np.tile([0.8, 0.1, 0.1], (len(body), 1))
    sheet = render_sheet([(body, faces, red), (body, faces, None)], height=96, supersample=1)
    assert sheet.shape == (2 * 96, 3 * 64, 3)
    assert sheet.dtype == np.uint8
    background = np.round(np.array(BACKGROUND) * 255).astype(int)
    tiles = sheet.reshape(2, 96, 3, 64, 3).transpose(0, 2, 1, 3, 4).astype(int)
    shown = (np.abs(tiles - background) > 2).any(axis=-1).mean(axis=(2, 3))
    assert (shown > 0.15).all()
    assert (shown < 0.9).all()
    redness = tiles[..., 0] - tiles[..., 1]
    assert redness[0].max() > 80
    assert redness[1].max() < 20
