# SPDX-License-Identifier: GPL-3.0-or-later
"""Distillation at the smallest size: the branch learns what the teacher shows it, and nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch

from backend.families.get3dhuman import losses
from backend.families.get3dhuman.config import Config
from backend.families.get3dhuman.networks import Get3DHuman
from backend.families.get3dhuman.teacher import Teacher
from backend.families.get3dhuman.training import Batch, Branch, Distiller

SIZE = Config(z_dim=8, w_dim=8, resolution=32, channel_base=128, channel_max=8, feature_channels=4, stem=8, volume=8,
              groups=2, shape_widths=(8, 6, 5), texture_widths=(8, 8, 6, 5), refine_width=2,
              discriminator_max=8)  # fmt: skip


def people(teacher: Teacher, count: int, seed: int) -> Batch:
    """Codes and pictures that go with them: an upright body whose width and colour the code says."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, SIZE.z_dim, generator=generator)
    line = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    width = 0.3 + 0.1 * torch.tanh(z[:, 0])
    mask = ((x / width[:, None, None]) ** 2 + (y / 0.8) ** 2 < 1)[:, None]
    picture = torch.where(mask, torch.tanh(z[:, 1:4])[:, :, None, None], 0.0)
    with torch.no_grad():
        prior = teacher(picture, mask)
    points = torch.stack([losses.surface_points(depth[0], 64, generator) for depth in prior.depth])
    return Batch(z, z.flip(1), prior, points)


@pytest.mark.parametrize("branch", ["shape", "texture"])
def test_a_branch_learns_from_the_teacher(branch: Branch) -> None:
    torch.manual_seed(0)
    teacher = Teacher(SIZE, residues=1).eval().requires_grad_(False)
    student = Get3DHuman(SIZE, discriminators=True)
    distiller = Distiller(student, teacher, branch)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    told = [distiller.step(people(teacher, 4, seed)) for seed in range(30)]
    first, last = told[0]["latent"], sum(step["latent"] for step in told[-5:]) / 5
    assert last < 0.6 * first
    assert all(math.isfinite(value) for step in told for value in step.values())
    names = {"shape": {"latent", "sdf", "normal", "depth"}, "texture": {"latent", "color"}}[branch]
    assert told[0].keys() == names | {"adversarial", "critic", "path"}
    assert told[1].keys() == names | {"adversarial", "critic"}
    moved = {name.partition(".")[0] for name, tensor in student.state_dict().items()
             if not torch.equal(tensor, before[name])}  # fmt: skip
    assert moved == {f"backbone_{branch}", f"filter_{branch}", f"Dis_{branch}"}
    assert not torch.equal(student.state_dict()[f"backbone_{branch}.mapping.w_avg"],
                           before[f"backbone_{branch}.mapping.w_avg"])  # fmt: skip
