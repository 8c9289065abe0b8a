# SPDX-License-Identifier: GPL-3.0-or-later
"""What the photo did not show: bake round trip, an editor that changes nothing, and a fill that does no harm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.geometry.mesh import TriMesh
from backend.photo import refine
from backend.photo.refine import Identity, Painted, Views
from backend.photo.symmetric_fill import Rules, SymmetricFill

ROWS, COLUMNS, TEXELS = 24, 48, 128


def figure(shift: float = 0.0, height: float = 1.6, radius: float = 0.25) -> TriMesh:
    """A smooth upright egg about x = 0 with one seam at the back, laid out as a map of longitude and latitude."""
    v, u = np.mgrid[0 : ROWS + 1, 0 : COLUMNS + 1]
    angle, slope = (u / COLUMNS - 0.5) * 2 * math.pi, (v / ROWS) * math.pi
    around = radius * np.sin(slope)
    points = np.stack([around * np.sin(angle) + shift, height / 2 * (1 - np.cos(slope)), around * np.cos(angle)], -1)
    index = np.arange(points[..., 0].size).reshape(v.shape)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    uvs = np.stack([0.02 + 0.96 * u / COLUMNS, 0.02 + 0.96 * v / ROWS], -1).reshape(-1, 2)
    vertices = torch.from_numpy(points.reshape(-1, 3)).float()
    indices = torch.from_numpy(faces).long()
    return TriMesh(vertices, indices, vertices, torch.from_numpy(uvs).float(), indices)


MESH = figure()
CHART = refine.chart(MESH, (TEXELS, TEXELS))


def smooth(seed: int, symmetric: bool = False, waves: float = 8.0) -> Tensor:
    """Colours that are a smooth function of the place; of |x| if symmetric."""
    generator = torch.Generator().manual_seed(seed)
    places = CHART.points.clone()
    if symmetric:
        places[..., 0] = places[..., 0].abs()
    waves_of = waves * torch.randn(3, 3, generator=generator)
    return 0.5 + 0.4 * torch.sin(places @ waves_of + 6 * torch.rand(3, generator=generator))


def half_seen(truth: Tensor, base: Tensor, edge: float = 0.02, axis: int = 2) -> Painted:
    """A photo from the front (axis 2) or from one side (axis 0), feathered."""
    seen = (CHART.normals[..., axis] / 0.3 + 0.5).clamp(0, 1) * CHART.covered
    color = base + seen[..., None] * (truth - base)
    return Painted(MESH, color, seen, base)


def error(found: Tensor, truth: Tensor, where: Tensor | None = None) -> float:
    at = CHART.covered if where is None else CHART.covered & where
    return float((found - truth)[at].square().mean().sqrt())


class Paints:
    """Renders of another texture as the edit."""

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def edit(self, views: Views, step: Any = None) -> Tensor:
        part = Painted(MESH, self.other, torch.zeros(TEXELS, TEXELS), self.other)
        return refine.render(refine._Scene.of([part]), views.cameras, views.rgb.shape[1])[0].rgb


def test_what_is_rendered_comes_back_into_the_texels_within_two_steps() -> None:
    truth, start = smooth(1), torch.full((TEXELS, TEXELS, 3), 0.5)
    unseen = Painted(MESH, start, torch.zeros(TEXELS, TEXELS), start)
    (found,) = refine.refine([unseen], Paints(truth), size=384)
    away = (CHART.points[..., 1] > 0.1) & (CHART.points[..., 1] < 1.5)  # the poles are a point, many texels wide
    assert away.sum() > 5000
    assert (found - truth)[CHART.covered & away].abs().max() < 2 / 255
    scene = [refine._Scene.of([replace(unseen, color=image)]) for image in (found, truth)]
    cameras = refine.choose_cameras(scene[1])
    assert cameras is not None
    again, wanted = (refine.render(s, cameras, 256)[0] for s in scene)
    at = wanted.mask & (wanted.points[..., 1] > 0.1) & (wanted.points[..., 1] < 1.5)
    at = at & ((wanted.points[..., 2] > 0) | (wanted.points[..., 0].abs() > 0.03))  # the seam shows the gutter
    assert (again.rgb - wanted.rgb)[at].abs().max() < 2 / 255


def test_an_editor_that_changes_nothing_leaves_the_texture_bit_for_bit() -> None:
    part = half_seen(smooth(1), smooth(2))
    (found,) = refine.refine([part], Identity(), size=128)
    assert torch.equal(found, part.color)


def test_the_photos_texels_stay_whatever_the_editor_paints() -> None:
    part = half_seen(smooth(1), smooth(1))
    (found,) = refine.refine([part], Paints(part.color * 0.8), size=192)
    assert torch.equal(found[part.seen == 1], part.color[part.seen == 1])
    left = (found / part.color)[..., 0]
    assert left[(part.seen == 0) & CHART.covered].mean() == pytest.approx(0.8, abs=0.01)
    assert left[(part.seen > 0.45) & (part.seen < 0.55)].mean() == pytest.approx(0.9, abs=0.03)


def test_a_texture_that_was_wholly_seen_is_left_alone() -> None:
    part = replace(half_seen(smooth(1), smooth(2)), seen=torch.ones(TEXELS, TEXELS))
    assert torch.equal(refine.refine([part], Paints(smooth(3)), size=64)[0], part.color)


def test_views_look_at_what_the_photo_did_not_see() -> None:
    cameras = refine.choose_cameras(refine._Scene.of([half_seen(smooth(1), smooth(2))]))
    assert cameras is not None
    assert cameras.c2w[0, 2, 3] < -0.5  # the first one is behind
    assert (cameras.c2w[:, 2, 3] < 0.5).all()
    assert 2 <= len(cameras.c2w) <= refine.MOST_VIEWS


def test_an_object_hides_another_and_each_keeps_its_texture() -> None:
    inner, outer = figure(radius=0.15, height=1.4), figure()
    base = torch.full((64, 64, 3), 0.2)
    parts = [Painted(mesh, base + 0.1 * i, torch.zeros(64, 64), base) for i, mesh in enumerate((inner, outer))]
    seen_parts = []

    class Brighter:
        def edit(self, views: Views, step: Any = None) -> Tensor:
            seen_parts.extend(views.part[views.mask].unique().tolist())
            return views.rgb + 0.3

    inside, outside = refine.refine(parts, Brighter(), size=96)
    assert set(seen_parts) == {1}
    assert torch.equal(inside, parts[0].color)
    torch.testing.assert_close(outside[32, 32], torch.full((3,), 0.6), atol=2e-3, rtol=0)


def test_texels_no_view_shows_go_on_as_their_neighbours() -> None:
    base = torch.full((TEXELS, TEXELS, 3), 0.4)
    part = Painted(MESH, base, torch.zeros(TEXELS, TEXELS), base)
    (found,) = refine.refine([part], Paints(base + 0.2), size=192)
    assert (found - 0.6).abs().max() < 0.02  # poles, seams and what lies beyond the chart too


# ------------------------------------------------------------------------------------------------------ symmetric fill


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "gain"), [("symmetric", 0.5), ("tint", 0.6), ("unrelated", 1.02), ("right", 1.02), ("half", 1.0)]
)
def test_the_fill_is_never_worse_than_leaving_it_out(kind: str, gain: float, seed: int) -> None:
    """Seen from one side. `gain`: how much of the hidden side's error may be left."""
    base = smooth(10 + seed, symmetric=True)
    truth = {
        "symmetric": smooth(seed, symmetric=True),  # the model guessed wrongly, but left is as right
        "tint": (base + torch.tensor([0.12, -0.08, 0.05])),  # it had the pattern, and not the hue
        "unrelated": smooth(seed, waves=60.0),  # nothing seen says anything of the hidden side
        "right": base,  # nothing to improve
        "half": 0.5 * base + 0.5 * smooth(seed, symmetric=True),
    }[kind]
    axis = 2 if kind == "unrelated" else 0
    part = half_seen(truth, base, axis=axis)
    (found,) = refine.refine([part], SymmetricFill(), size=256)
    hidden = part.seen < 0.5
    before, after = error(part.color, truth, hidden), error(found, truth, hidden)
    assert after <= gain * before + 2e-3


def test_a_photo_from_the_front_tells_how_symmetric_a_person_is() -> None:
    base = torch.full((TEXELS, TEXELS, 3), 0.5)
    for truth, low, high in ((smooth(3, symmetric=True), 0.9, 1.0), (smooth(3, waves=40.0), 0.0, 0.5)):
        part = half_seen(truth, base)
        known = refine._examples(refine._Scene.of([part]))
        assert low <= Rules.learn(known).mirror <= high


def test_differences_fade_with_the_distance_as_far_as_they_did_in_the_photo() -> None:
    base = torch.full((TEXELS, TEXELS, 3), 0.5)
    constant = Rules.learn(refine._examples(refine._Scene.of([half_seen(base + 0.1, base)])))
    assert constant.fading.min() > 0.95
    speckled = base + 0.1 * torch.randn(TEXELS, TEXELS, 3, generator=torch.Generator().manual_seed(0))
    noise = Rules.learn(refine._examples(refine._Scene.of([half_seen(speckled, base)])))
    assert noise.fading[2:].max() < 0.2
    assert (np.diff(noise.fading) <= 0).all()
