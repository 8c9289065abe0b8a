# SPDX-License-Identifier: GPL-3.0-or-later
"""Volume rendering against closed forms and quadrature; guided sampling against the full march."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from backend.families.capsule.model import load
from backend.render.camera import Camera, look_at, orbit, orthographic
from backend.render.volume import (
    Rays,
    camera_rays,
    guide_from,
    march,
    mean_sigmoid,
    optical_depths,
    render_guided,
    render_uniform,
    subdivide,
)

F64 = torch.float64


class Balls:
    """Balls in one colour each; distances are exact."""

    def __init__(self, centres: list[list[float]], radii: list[float], colors: Tensor | None = None) -> None:
        self.centres, self.radii = torch.tensor(centres, dtype=F64), torch.tensor(radii, dtype=F64)
        self.parts = tuple(f"ball{i}" for i in range(len(radii)))
        self.bounds = torch.tensor([[-0.5] * 3, [0.5] * 3], dtype=F64)
        self.colors = torch.eye(3, dtype=F64)[: len(radii)] if colors is None else colors
        self.log: list[tuple[int, int]] = []  # points, generators

    def distances(self, points: Tensor, asked: Tensor | None = None) -> Tensor:
        s = (points[:, None] - self.centres.to(points)).norm(dim=2) - self.radii.to(points)
        self.log.append((len(points), len(self.parts) if asked is None else int(asked.sum())))
        return s if asked is None else torch.where(asked, s, 1.0)

    def color(self, part: int, points: Tensor) -> Tensor:
        return self.colors[part].to(points).expand(len(points), 3)


def ray(x: float, y: float = 0.0) -> Rays:
    """One ray down -z from z = 0.5, through the box of `Balls`."""
    return Rays(torch.tensor([[x, y, 0.5]], dtype=F64), torch.tensor([[0.0, 0.0, -1.0]], dtype=F64),
                torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))  # fmt: skip


def single(camera: Camera) -> Camera:
    return Camera(camera.c2w[0], camera.projection[0])


# --- one stretch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(-3.0, 5.0), (5.0, -3.0), (40.0, 90.0), (-90.0, -60.0), (0.3, 0.3 + 1e-9),
                                      (2.0, 2.5), (-200.0, 300.0), (1.0, 1.0)])  # fmt: skip
def test_the_mean_of_the_sigmoid(a: float, b: float) -> None:
    exact = np.mean(1 / (1 + np.exp(-np.array([a])))) if a == b else quad(
        lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0, a, b, points=[0.0] if a * b < 0 else None, limit=400
    )[0] / (b - a)  # fmt: skip
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 2e-6)):
        found = mean_sigmoid(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
        assert float(found) == pytest.approx(exact, rel=tolerance, abs=1e-20)


def test_the_mean_of_the_sigmoid_has_a_gradient_everywhere() -> None:
    a = torch.tensor([-3.0, 40.0, 0.3, 2.0, -90.0, 5.0], dtype=F64, requires_grad=True)
    b = torch.tensor([5.0, 90.0, 0.3001, 2.5, -60.0, 5.9], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(mean_sigmoid, (a, b))


def test_subdividing_a_parabola_is_exact() -> None:
    t = torch.tensor([[0.0, 0.1, 0.25, 0.3, 0.6]], dtype=F64)
    s = (0.5 * (t - 0.3) ** 2 - 0.01)[..., None]
    fine_t, fine_s = subdivide(t, s, 5)
    assert fine_t.shape == (1, 21)
    assert torch.allclose(fine_s[..., 0], 0.5 * (fine_t - 0.3) ** 2 - 0.01, atol=1e-12)


# --- analytic transmittance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [3, 17])
@pytest.mark.parametrize(("half", "beta"), [(0.02, 0.01), (0.1, 0.003), (0.001, 0.05)])
def test_a_slab_lets_through_what_the_closed_form_says(half: float, beta: float, samples: int) -> None:
    """Distance |x| - h along x is linear on either side: any samples that include x = 0 are exact."""
    x = torch.linspace(-1, 1, samples, dtype=F64)[None]
    total = optical_depths(x + 1, (x.abs() - half)[..., None], beta).sum()
    soft = np.logaddexp(0, half / beta) - np.logaddexp(0, (half - 1) / beta)
    assert float(total) == pytest.approx(2 * soft, rel=1e-10)
    weights = march(x + 1, (x.abs() - half)[..., None], beta)
    assert float(weights.sum()) == pytest.approx(1 - math.exp(-2 * soft), rel=1e-10)


def test_a_wall_is_seen_where_it_stands() -> None:
    """T = sigmoid(s / beta) in front of a half space, so the mean depth is the surface's, whatever beta."""
    for beta in (0.002, 0.01):
        t = torch.linspace(0, 1, 401, dtype=F64)[None]
        weights = march(t, (0.37 - t)[..., None], beta)[0, :, 0]
        passed = 1 - weights.cumsum(0)
        assert torch.allclose(passed, torch.sigmoid((0.37 - t[0, 1:]) / beta), atol=1e-12)
        mean = (weights * (t[0, 1:] + t[0, :-1]) / 2).sum()
        assert float(mean) == pytest.approx(0.37, abs=1e-6)


@pytest.mark.parametrize("x", [0.0, 0.1, 0.19, 0.199, 0.203, 0.21])
def test_a_ball_lets_through_what_quadrature_says(x: float) -> None:
    beta, scene = 0.004, Balls([[0.0, 0.0, 0.0]], [0.2])

    def density(z: float) -> float:
        return float(1 / (1 + np.exp(np.clip((math.hypot(x, z) - 0.2) / beta, -600, 600))) / beta)

    exact = 1 - math.exp(-2 * quad(density, 0, 0.5, points=[math.sqrt(max(0.04 - x * x, 0))], limit=500)[0])
    assert float(render_uniform(scene, ray(x), 432, beta).mask) == pytest.approx(exact, abs=2e-4)
    assert float(render_uniform(scene, ray(x), 48, beta).mask) == pytest.approx(exact, abs=2e-3)
    if x == 0:
        out = render_uniform(scene, ray(x), 432, beta, normals=True)
        assert float(out.depth) == pytest.approx(0.3, abs=1e-4)
        assert torch.allclose(out.normal, torch.tensor([[0.0, 0.0, 1.0]], dtype=F64), atol=1e-4)


def test_densities_add_and_colours_mix_by_density() -> None:
    """Two equal balls in one place are one of twice the density, in the mean of their colours."""
    beta, one, two = 0.02, Balls([[0.0] * 3], [0.1]), Balls([[0.0] * 3] * 2, [0.1, 0.1])
    first, both = render_uniform(one, ray(0.09), 200, beta), render_uniform(two, ray(0.09), 200, beta)
    assert float(1 - both.mask) == pytest.approx(float((1 - first.mask) ** 2), rel=1e-9)
    assert torch.allclose(both.label, both.mask / 2 * torch.ones(1, 2, dtype=F64))
    assert torch.allclose(both.rgb, both.mask / 2 * torch.tensor([[1.0, 1.0, 0.0]], dtype=F64), atol=1e-9)


def test_gradients_are_those_of_finite_differences() -> None:
    beta, scene = 0.03, Balls([[0.0, 0.0, 0.0], [0.1, 0.0, 0.1]], [0.2, 0.15])
    scene.radii.requires_grad_()
    scene.colors.requires_grad_()

    def picture(radii: Tensor, colors: Tensor) -> tuple[Tensor, ...]:
        scene.radii, scene.colors = radii, colors
        out = render_uniform(scene, ray(0.12), 24, beta)
        return out.rgb, out.mask, out.depth, out.label

    assert torch.autograd.gradcheck(picture, (scene.radii, scene.colors), atol=1e-5)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_rays_go_through_pixel_centres() -> None:
    bounds = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]], dtype=F64)
    c2w = look_at(torch.tensor([0.0, 0.0, 3.0], dtype=F64), torch.zeros(3, dtype=F64))
    rays = camera_rays(Camera(c2w, orthographic(1.0, 1.0, 0.5, 6.0).double()), (4, 4), bounds)
    assert torch.allclose(rays.origin[0], torch.tensor([-0.75, 0.75, 2.5], dtype=F64), atol=1e-6)
    assert torch.allclose(rays.direction[5], torch.tensor([0.0, 0.0, -1.0], dtype=F64), atol=1e-9)
    assert torch.allclose(rays.near, torch.full((16,), 1.5, dtype=F64), atol=1e-6)
    assert torch.allclose(rays.far, torch.full((16,), 3.5, dtype=F64), atol=1e-6)
    camera = single(orbit(bounds, [0.6], 0.2))
    rays = camera_rays(camera, (9, 7), bounds)
    clip = torch.cat([rays.at(torch.full((63, 1), 2.0, dtype=F64))[:, 0], torch.ones(63, 1, dtype=F64)], 1)
    clip = clip @ camera.mvp.T
    pixel = (clip[:, :2] / clip[:, 3:] * torch.tensor([1.0, -1.0], dtype=F64) + 1) / 2 * torch.tensor([7.0, 9.0])
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    assert torch.allclose(pixel, torch.stack([columns, rows], 2).reshape(-1, 2).double() + 0.5, atol=1e-5)


class Person:
    parts = ("human",)

    def __init__(self, seed: int) -> None:
        model = load(torch.device("cpu"))
        self.field = model.decode(model.sample(seed, 0.7, {}))[0]
        self.bounds = self.field.bounds
        self.count = 0

    def distances(self, points: Tensor, asked: Tensor | None = None) -> Tensor:
        self.count += len(points)
        return self.field.sdf(points)[:, None]

    def color(self, part: int, points: Tensor) -> Tensor:
        return self.field.color(points)


@torch.no_grad()
def test_eleven_guided_samples_see_what_432_see() -> None:
    """A person of 256 pixels, guided by 64: 45 times fewer evaluations. Outlines are where the two may differ."""
    beta, size, low_size = 0.004, (256, 128), (64, 32)
    scene = Person(3)
    camera = single(orbit(scene.bounds, [0.4], 0.1, aspect=0.5))
    rays = camera_rays(camera, size, scene.bounds)
    full = render_uniform(scene, rays, 432, beta)
    assert full.asked == scene.count == 432 * full.rays
    scene.count = 0
    low = render_uniform(scene, camera_rays(camera, low_size, scene.bounds), 72, beta)
    guide = guide_from(low, low_size, size, reach=2 / 64)
    guided = render_guided(scene, rays, guide, beta)
    assert low.asked + guided.asked == scene.count
    assert guided.asked == 11 * guided.rays
    assert full.asked / (low.asked + guided.asked) > 40  # 45
    seen = full.mask > 1 / 255
    error = (full.mask - guided.mask).abs()
    assert float(error.mean()) < 1e-4
    assert float((error[seen] < 1 / 255).float().mean()) > 0.97
    assert float(error.max()) < 0.15
    solid = full.mask > 0.98
    assert float((full.depth - guided.depth).abs()[solid].max()) < 0.008
    assert float((full.rgb - guided.rgb).abs().amax(1)[seen].mean()) < 1.5 / 255  # stripes are hard edges


@torch.no_grad()
def test_only_parts_that_the_small_picture_saw_are_asked() -> None:
    """Three balls side by side: a ray is asked about one or two of them, and no other changes the picture."""
    scene = Balls([[-0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [0.3, 0.0, 0.0]], [0.12, 0.12, 0.12])
    camera = single(orbit(scene.bounds, [0.0], fov_y=None))
    rays = camera_rays(camera, (96, 96), scene.bounds)
    low = render_uniform(scene, camera_rays(camera, (48, 48), scene.bounds), 72, 0.004)
    guide = guide_from(low, (48, 48), (96, 96), reach=1.1 / 48)
    scene.log.clear()
    guided, full = render_guided(scene, rays, guide, 0.004), render_uniform(scene, rays, 432, 0.004)
    points, asked = scene.log[0]
    assert asked == guided.asked
    assert asked < 1.1 * points  # of three
    assert full.asked / guided.asked > 432 * 3 / 11
    assert float((guided.label - full.label).abs().max()) < 0.05
    assert float((guided.label - full.label).abs().mean()) < 1e-4
    assert (full.label[~guide.asked.any(1)].sum(1) < 1 / 255).all()


@torch.no_grad()
def test_rays_beside_the_box_cost_nothing_and_see_nothing() -> None:
    scene = Balls([[0.0, 0.0, 0.0]], [0.1])
    rays = Rays(torch.tensor([[2.0, 0.0, 0.5]]), torch.tensor([[0.0, 0.0, -1.0]]), torch.ones(1), torch.zeros(1))
    out = render_uniform(scene, rays, 32, 0.004, normals=True)
    assert (out.rays, out.asked, float(out.mask.sum()), float(out.rgb.sum())) == (0, 0, 0, 0)
