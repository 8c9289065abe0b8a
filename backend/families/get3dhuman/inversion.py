# SPDX-License-Identifier: GPL-3.0-or-later
"""From a picture back to codes: first w_s by mask, depth and normals, then w_t by colours, through the tracer.

Tracing has no gradient; the estimate at the kept points has. A ray that meets the surface at depth t does so where
q(t; w) = 0, hence dt/dw = -(dq/dw) / (dq/dt); a ray that misses is judged by its smallest estimate. The person stands
as in training: orthographic, the picture's centre 95 cm above the floor, about 180 cm tall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from backend.families.base import Step, no_step
from backend.families.get3dhuman.config import CENTRE, SCALE
from backend.families.get3dhuman.losses import normal_loss
from backend.families.get3dhuman.networks import Get3DHuman, decode_shape, decode_texture
from backend.families.get3dhuman.tracer import View, estimate, rays, trace_quickly
from backend.protocol import PopulaceError

SOFTNESS = 0.02  # ndc over which the silhouette fades
PITCH = 1 / 128  # ndc between the samples of normals and of the slope along a ray
MEAN_OF = 1000  # codes that the mean w is taken from

Perceptual = Callable[[Float[Tensor, "1 3 N N"], Float[Tensor, "1 3 N N"]], Float[Tensor, ""]]


@dataclass(frozen=True)
class Target:
    """What a view should show; square pictures, rows from the top."""

    mask: Bool[Tensor, "N N"]
    color: Float[Tensor, "N N 3"] | None = None  # sRGB 0..1
    depth: Float[Tensor, "N N"] | None = None  # as `tracer.View` has it, read within the mask
    normal: Float[Tensor, "N N 3"] | None = None  # y up, of unit length, read within the mask
    angle: float = 0.0


@dataclass(frozen=True)
class Rates:
    """How much each term counts, and how fast the codes go."""

    mask: float = 1.0
    depth: float = 5.0
    normal: float = 0.2
    color: float = 1.0
    perceptual: float = 1.0
    near_mean: float = 1e-4  # pulls w to the mean, where people look like people
    learning: float = 0.05


def place(picture: Float[Tensor, "4 H W"], size: int = 128, height_cm: float = 180.0) -> Target:
    """A picture with alpha as training has its people: feet at 0, upright, `height_cm` tall, in the middle; sRGB."""
    rows, columns = (picture[3] > 0.5).nonzero(as_tuple=True)
    if not len(rows):
        raise PopulaceError("invalid_request", "The picture shows nobody: its alpha is empty.",
                            "Cut the person out and save it with transparency.")  # fmt: skip
    top, bottom = float(rows.min()), float(rows.max()) + 1  # edges of pixels
    middle = (float(columns.min()) + float(columns.max()) + 1) / 2
    per_ndc = (bottom - top) / (height_cm * SCALE)  # pixels of the picture
    line = torch.linspace(-1, 1, size, device=picture.device)
    y, x = torch.meshgrid(bottom + (line - CENTRE) * per_ndc, middle + line * per_ndc, indexing="ij")
    height, width = picture.shape[1:]
    at = torch.stack([2 * x / width - 1, 2 * y / height - 1], -1)[None]
    color, alpha = functional.grid_sample(picture[None], at, align_corners=False)[0].movedim(0, 2).split([3, 1], 2)
    return Target(alpha[..., 0] > 0.5, color)


def mean_code(networks: Get3DHuman, branch: str) -> Float[Tensor, "1 W"]:
    """Mean w of a fixed set of codes: the stored one belongs to training and may never have been moved."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(MEAN_OF, networks.config.z_dim, generator=generator)
    mapping = networks.get_submodule(f"backbone_{branch}").mapping
    with torch.no_grad():
        return mapping(z.to(mapping.fc0.weight.device))[:, 0].mean(0, keepdim=True)


def fit_shape(
    networks: Get3DHuman,
    target: Target,
    start: Float[Tensor, "L W"] | None = None,
    steps: int = 200,
    rates: Rates = Rates(),
    step: Step = no_step,
) -> tuple[Float[Tensor, "L W"], list[float]]:
    """w_s of the shape that shows the target's mask, depth and normals, and the loss at every step."""
    mean = mean_code(networks, "shape")
    w = (mean if start is None else start).detach().clone().requires_grad_(True)

    def loss() -> Float[Tensor, ""]:
        volume = networks.shape_features(_rows(networks, w))[1]
        return shape_loss(networks, volume, target, rates) + rates.near_mean * (w - mean).square().sum()

    return _descend(w, loss, steps, rates, step, "shape")


def fit_texture(
    networks: Get3DHuman,
    w_shape: Float[Tensor, "L W"],
    target: Target,
    start: Float[Tensor, "L W"] | None = None,
    steps: int = 200,
    rates: Rates = Rates(),
    step: Step = no_step,
    perceptual: Perceptual | None = None,
) -> tuple[Float[Tensor, "L W"], list[float]]:
    """w_t of the colours that the target shows on this shape: L1, and a perceptual distance if one is given."""
    assert target.color is not None, "a target without colours has no texture"
    mean = mean_code(networks, "texture")
    w = (mean if start is None else start).detach().clone().requires_grad_(True)
    with torch.no_grad():
        picture, shape = networks.shape_features(_rows(networks, w_shape))
        view = _trace(networks, shape, target)
    both = view.mask & target.mask
    shown = both if both.any() else target.mask  # a shape that was not found is coloured where it should be
    ndc, wanted = view.ndc[shown], target.color[shown]

    def loss() -> Float[Tensor, ""]:
        texture = networks.texture_features(_rows(networks, w), picture)[1]
        color = decode_texture(networks.mlp_texture, shape, texture, ndc[None])[0]
        total = rates.color * (color - wanted).abs().mean() + rates.near_mean * (w - mean).square().sum()
        if perceptual is not None:
            ours, theirs = (_picture(c, shown) for c in (color, wanted))
            total = total + rates.perceptual * perceptual(ours, theirs)
        return total

    return _descend(w, loss, steps, rates, step, "texture")


def shape_loss(
    networks: Get3DHuman, volume: Float[Tensor, "1 C H W"], target: Target, rates: Rates
) -> Float[Tensor, ""]:
    """How far this shape is from the target; differentiable in the volume."""
    view = _trace(networks, volume, target)

    def q(points: Float[Tensor, "M 3"]) -> Float[Tensor, " M"]:
        return estimate(lambda ndc: decode_shape(networks.mlp_shape, volume, ndc[None])[0], points)

    both = view.mask & target.mask
    wrong = view.mask != target.mask
    total = volume.sum() * 0
    if wrong.any():  # pixels on which both agree have nothing to learn from a silhouette
        inside = target.mask[wrong].to(volume)
        nearest = q(view.points[wrong]) / SOFTNESS
        total = total + rates.mask * functional.binary_cross_entropy_with_logits(
            -nearest, inside, reduction="sum"
        ) / wrong.numel()  # fmt: skip
    if both.any() and (target.depth is not None or target.normal is not None):
        points = view.points[both]
        here = q(points)
        if target.depth is not None:
            direction = rays(2, target.angle, volume)[1]
            with torch.no_grad():
                slope = (q(points + PITCH * direction) - q(points - PITCH * direction)) / (2 * PITCH)
                slope = slope.clamp(max=-0.1)  # rays enter; where they graze the depth would leap
            depth = view.depth[both] - (here - here.detach()) / slope
            total = total + rates.depth * (depth - target.depth[both]).abs().mean()
        if target.normal is not None:
            axes = PITCH * torch.eye(3, dtype=points.dtype, device=points.device)
            normal = torch.stack([q(points + axis) - q(points - axis) for axis in axes], 1)
            foreground = torch.ones(1, 1, len(points), 1, dtype=torch.bool, device=points.device)
            ours, theirs = (n.T[None, :, :, None] for n in (normal, target.normal[both]))
            total = total + rates.normal * normal_loss(ours, theirs, foreground)
    return total


def show(networks: Get3DHuman, w_shape: Tensor, w_texture: Tensor, size: int, angle: float = 0.0) -> Target:
    """What a view of these codes shows: a target whose answer is known."""
    with torch.no_grad():
        picture, shape = networks.shape_features(_rows(networks, w_shape))
        texture = networks.texture_features(_rows(networks, w_texture), picture)[1]
        empty = Target(torch.zeros(size, size, dtype=torch.bool, device=shape.device), angle=angle)
        view = _trace(networks, shape, empty)
        points = view.points.reshape(-1, 3)
        color = decode_texture(networks.mlp_texture, shape, texture, view.ndc.reshape(1, -1, 3))[0]

        def q(at: Tensor) -> Tensor:
            return estimate(lambda ndc: decode_shape(networks.mlp_shape, shape, ndc[None])[0], at)

        axes = PITCH * torch.eye(3, dtype=points.dtype, device=points.device)
        normal = functional.normalize(torch.stack([q(points + a) - q(points - a) for a in axes], 1), dim=1)
    return Target(view.mask, color.reshape(size, size, 3), view.depth, normal.reshape(size, size, 3), angle)


def _trace(networks: Get3DHuman, volume: Tensor, target: Target) -> View:
    fixed = volume.detach()
    size = len(target.mask)
    return trace_quickly(
        lambda ndc: decode_shape(networks.mlp_shape, fixed, ndc[None])[0], size, target.angle, fixed, coarse=1
    )


def _rows(networks: Get3DHuman, w: Float[Tensor, "L W"]) -> Float[Tensor, "1 R W"]:
    return w.expand(2 * networks.backbone_shape.blocks, -1)[None]


def _picture(colors: Float[Tensor, "M 3"], shown: Bool[Tensor, "N N"]) -> Float[Tensor, "1 3 N N"]:
    """On white."""
    white = torch.ones(*shown.shape, 3, dtype=colors.dtype, device=colors.device)
    return white.index_put((shown.nonzero(as_tuple=True)), colors).movedim(2, 0)[None]


def _descend(
    w: Tensor, loss: Callable[[], Tensor], steps: int, rates: Rates, step: Step, stage: str
) -> tuple[Tensor, list[float]]:
    """Adam with a rate that falls to nothing; the best codes met, and the losses."""
    optimizer = torch.optim.Adam([w], lr=rates.learning, betas=(0.9, 0.99))
    losses: list[float] = []
    best, least = w.detach().clone(), math.inf
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = rates.learning * 0.5 * (1 + math.cos(math.pi * i / steps))
        optimizer.zero_grad()
        value = loss()
        losses.append(float(value.detach()))
        if losses[-1] < least:
            best, least = w.detach().clone(), losses[-1]
        value.backward()
        optimizer.step()
        step(stage, (i + 1) / steps)
    return best, losses
