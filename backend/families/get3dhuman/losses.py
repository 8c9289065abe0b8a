# SPDX-License-Identifier: GPL-3.0-or-later
"""What Get3DHuman learns from (sec. 3.3 of the paper): the volumes of a teacher, the surface and the colours that they
decode to, and two pictures hidden in F_s.

Weights, rates and duration were not published. `Weights` are such that at the start, at the size "small", the latent
prior gives about half of the sum of the terms' gradient norms in either branch: 9.9 beside 7.0 (sdf), 1.1 (normal),
2.2 (depth) and 0.7 (adversarial) of a shape, 12.6 beside 11.0 (color) and 0.9 (adversarial) of a texture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from backend.families.get3dhuman.config import INVERSE

NORMAL, DEPTH = slice(0, 3), slice(3, 4)  # channels of F_s that show the teacher's normals and depth; our choice
BACKGROUND = 0.8  # depth from which on a pixel is no surface
DISPLACED_CM = 3.0  # standard deviation of the surface points, per axis
SPAN_CM = 215.579  # width of the picture


@dataclass(frozen=True)
class Weights:
    """How much each term counts."""

    latent: float = 15.0
    adversarial: float = 0.5
    sdf: float = 2.0
    normal: float = 1.0
    depth: float = 1.0
    color: float = 25.0
    r1_gamma: float = 10.0


def latent_prior(student: Float[Tensor, "B C H W"], teacher: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """L1 between the volume of a code and the teacher's volume of the picture of the same code."""
    return (student - teacher).abs().mean()


def adversarial(fake_scores: Float[Tensor, "B 1"]) -> Float[Tensor, ""]:
    """Non-saturating: the generator's side."""
    return functional.softplus(-fake_scores).mean()


def discrimination(real_scores: Float[Tensor, "B 1"], fake_scores: Float[Tensor, "B 1"]) -> Float[Tensor, ""]:
    """The discriminator's side; real are the teacher's volumes."""
    return functional.softplus(-real_scores).mean() + functional.softplus(fake_scores).mean()


def r1(real_scores: Float[Tensor, "B 1"], real: Float[Tensor, "B C H W"], gamma: float = 10.0) -> Float[Tensor, ""]:
    """gamma / 2 of the mean squared norm of the gradient; `real` needs one."""
    (gradient,) = torch.autograd.grad(real_scores.sum(), real, create_graph=True)
    return gamma / 2 * gradient.square().flatten(1).sum(1).mean()


def agreement(student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
    """L1 and L2 between decoded values (occupancies: the SDF loss) or colours at the same points."""
    difference = student - teacher
    return difference.abs().mean() + difference.square().mean()


def depth_loss(student: Float[Tensor, "B 1 H W"], teacher: Float[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
    return (student - teacher).abs().mean()


def normal_loss(
    student: Float[Tensor, "B 3 H W"], teacher: Float[Tensor, "B 3 H W"], foreground: Bool[Tensor, "B 1 H W"]
) -> Float[Tensor, ""]:
    """Mean angle over the foreground, by the series of arccos: smooth where arccos itself has no slope."""
    cosine = (functional.normalize(student, dim=1) * functional.normalize(teacher, dim=1)).sum(1, keepdim=True)
    return arccos_series(cosine)[foreground].mean() if foreground.any() else cosine.sum() * 0


def arccos_series(c: Tensor) -> Tensor:
    """pi/2 - (c + c^3/6 + 3c^5/40 + 5c^7/112 + 35c^9/1152)."""
    return math.pi / 2 - (c + c**3 / 6 + 3 * c**5 / 40 + 5 * c**7 / 112 + 35 * c**9 / 1152)


def normals_of_depth(depth: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Unit normals (x right, y up, z to the viewer) of a depth picture in -1..1, by central differences in cm."""
    framed = functional.pad(depth * SPAN_CM, (1, 1, 1, 1), mode="replicate")
    pitch = SPAN_CM / (depth.shape[-1] / 2)  # twice a pixel, as depth -1..1 spans twice what it is multiplied by
    across = (framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2]) / (2 * pitch)
    down = (framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]) / (2 * pitch)
    return functional.normalize(torch.cat([across, -down, torch.ones_like(across)], 1), dim=1)


def surface_points(
    depth: Float[Tensor, "H W"], count: int, generator: torch.Generator, displaced_cm: float = DISPLACED_CM
) -> Float[Tensor, "N 3"]:
    """Random pixels nearer than `BACKGROUND`, brought back to ndc and displaced: where the SDF loss asks.

    `depth` is -1..1, increasing away from the viewer: z_ndc = -depth.
    """
    height, width = depth.shape
    rows, columns = (depth < BACKGROUND).nonzero(as_tuple=True)
    if not len(rows):
        return depth.new_zeros(0, 3)
    chosen = torch.randint(len(rows), (count,), generator=generator, device=generator.device).to(depth.device)
    rows, columns = rows[chosen], columns[chosen]
    x, y = 2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1
    points = torch.stack([x.to(depth), y.to(depth), -depth[rows, columns]], 1)
    noise = torch.randn(count, 3, generator=generator, device=generator.device).to(points)
    return points + noise * (displaced_cm / INVERSE)
