# SPDX-License-Identifier: GPL-3.0-or-later
"""Fits by gradients: a pose is recovered from its pictures, a surface bends to the normals that it is shown."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from backend import poses
from backend.families.sifu.fit import BodyFit, ClothFit, fit_body, fit_cloth, rotation_of, six_of
from backend.families.sifu.pose import by_outline
from backend.families.sifu.prior import Placed, rest_placed
from backend.families.sifu.views import normal_views
from tests.backend.sifu_bodies import FRAME, capsule_body
from tests.backend.test_geometry_body import ball


def turned(axis: str, degrees: float) -> Tensor:
    quaternion = np.zeros((1, 4))
    quaternion[0, 0] = math.cos(math.radians(degrees) / 2)
    quaternion[0, 1 + "xyz".index(axis)] = math.sin(math.radians(degrees) / 2)
    return torch.from_numpy(poses.to_matrices(quaternion)[0]).float()


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between directions."""
    return torch.rad2deg(torch.acos(torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)))


def test_six_numbers_are_a_rotation() -> None:
    turns = torch.stack([turned("x", 33), turned("y", -120) @ turned("z", 70)])
    assert torch.allclose(rotation_of(six_of(turns)), turns, atol=1e-6)
    rough = rotation_of(six_of(turns) * 1.7 + 0.1)
    assert torch.allclose(rough @ rough.transpose(1, 2), torch.eye(3).expand(2, 3, 3), atol=1e-6)


def test_a_pose_is_recovered_within_two_degrees() -> None:
    """What the photo shows is another pose than the regressor said: limbs 10 to 15 degrees off, the whole body 8."""
    body = capsule_body(2000)
    start = rest_placed(body)
    rotations = start.rotations.clone()
    off = {"pelvis": ("y", 8.0), "upper_arm.L": ("z", 15.0), "upper_arm.R": ("z", -10.0), "forearm.L": ("x", -12.0),
           "thigh.L": ("x", -12.0), "thigh.R": ("z", -8.0), "shin.L": ("x", 12.0)}  # fmt: skip
    for bone, (axis, degrees) in off.items():
        rotations[body.bones.index(bone)] = turned(axis, degrees)
    truth = Placed(start.shape, rotations, start.scale * 1.01, start.shift + torch.tensor([0.01, -0.015, 0.0]))
    settings = BodyFit(steps=120, rate=1e-2, size=128, patience=10)
    views = normal_views(truth.vertices(body), body.faces, settings.size, ("F", "B"))
    asked = []

    def predict(seen):
        asked.append(seen)
        return views["F"][:3], views["B"][:3]

    found, figures = fit_body(body, start, views["F"][3], predict, settings)
    assert len(asked) == 25  # every fifth step
    rig = body.rig(start.shape)

    def directions(placed: Placed) -> Tensor:
        turns = body.matrices(placed.shape, placed.rotations)[:, :, :3]
        return (turns @ (rig.tails - rig.heads)[:, :, None])[:, :, 0]

    posed = [body.bones.index(bone) for bone in off]
    before = angle(directions(start)[posed], directions(truth)[posed])
    after = angle(directions(found)[posed], directions(truth)[posed])
    assert before.max() > 10
    assert after.max() < 2, dict(zip(off, after.tolist()))
    pelvis = body.bones.index("pelvis")
    facing = [p.rotations[pelvis][:, 2][None] for p in (found, truth)]
    assert angle(*facing).item() < 2
    assert figures["front"] < 0.02


def test_the_silhouette_alone_finds_place_and_size() -> None:
    body = capsule_body(2000)
    start = rest_placed(body)
    truth = Placed(start.shape, start.rotations, start.scale * 0.97, start.shift + torch.tensor([0.03, 0.02, 0.0]))
    settings = BodyFit(steps=40, rate=4e-3, size=96)
    mask = normal_views(truth.vertices(body), body.faces, settings.size, ("F",))["F"][3]
    _, before = fit_body(body, start, mask, None, replace(settings, steps=0))
    found, after = fit_body(body, start, mask, None, settings)
    assert after["silhouette"] < 0.4 * before["silhouette"]
    off = [(p.vertices(body) - truth.vertices(body))[:, :2].norm(dim=1).mean() for p in (start, found)]
    assert off[1] < 0.4 * off[0]


def test_legs_are_kept_straight_if_asked() -> None:
    body = replace(capsule_body(2000), bones=tuple(
        {"shin.L": "calf_l", "shin.R": "calf_r"}.get(name, name) for name in capsule_body(2000).bones))  # fmt: skip
    start = rest_placed(body)
    knee = body.bones.index("calf_l")
    bent = start.rotations.clone()
    bent[knee] = turned("x", 20)
    mask = normal_views(start.vertices(body), body.faces, 64, ("F",))["F"][3]
    begin = Placed(start.shape, bent, start.scale, start.shift)

    def bend(pull: float) -> float:
        found, _ = fit_body(body, begin, mask, None, BodyFit(steps=40, rate=1e-2, size=64, straight_legs=pull))
        return float(angle(found.rotations[knee][:, 1][None], torch.tensor([[0.0, 1, 0]])))

    assert bend(1.0) < 5 < bend(0.0)


def test_the_best_pose_of_the_library_is_found_by_its_outline() -> None:
    body = capsule_body(2000)
    rig = body.rig(torch.zeros(2))
    turns = torch.from_numpy(poses.to_matrices(poses.pose("t_pose", rig)[0])).float()
    from backend.families.sifu.prior import framed

    truth = framed(body, torch.zeros(2), turns, 0.8)
    view = normal_views(truth.vertices(body), body.faces, 128, ("F",))["F"][3]
    found = by_outline(body, view)
    assert float((found.vertices(body) - truth.vertices(body))[:, :2].norm(dim=1).mean()) < 0.05
    with pytest.raises(IndexError):
        by_outline(body, torch.zeros(128, 128))


def test_a_surface_bends_to_the_normals_it_is_shown() -> None:
    """A smooth ball is shown the normals of one with waves: the error falls, volumes of the maps stay within 5 %."""
    vertices, faces = ball(40, 0.6, (0.0, 0.0, 0.0))
    smooth = vertices * FRAME
    wavy = smooth * (1 + 0.012 * torch.sin(14 * smooth[:, 1:2]))
    views = normal_views(wavy, faces, 96, ("F", "B"))
    settings = ClothFit(steps=60, rate=1e-3)
    moved, maps, errors = fit_cloth(smooth, faces, views["F"][:3], views["B"][:3], settings)
    assert errors[-1] < 0.75 * errors[0]
    assert (torch.linalg.det(maps[:, :, :3]) - 1).abs().max() < 0.05
    assert (moved - smooth).norm(dim=1).max() < 0.05
    radius = moved.norm(dim=1)
    assert np.corrcoef(radius, wavy.norm(dim=1))[0, 1] > 0.5  # towards where the waves are
