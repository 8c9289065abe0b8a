# SPDX-License-Identifier: GPL-3.0-or-later
"""Distillation: the generators learn to make from codes what the teacher makes of the pictures of those codes; what
they make of random codes, which nobody has a picture of, has to pass for a teacher's volumes before a critic.

The shape's branch comes first, then the texture's with the shape's frozen. The point decoders are the teacher's and
stay as they are. Not published, hence our choice: `losses.Weights`, Adam at 0.002 with betas (0, 0.99), and how often
the regularisers run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.get3dhuman import losses
from backend.families.get3dhuman.networks import Backbone, Get3DHuman, decode_shape, decode_texture
from backend.families.get3dhuman.teacher import Prior, Teacher

MIXED = 0.9  # share of batches of random codes whose rows come of two
RANDOM = 0.5  # random codes to every known one
PATH_WEIGHT, PATH_DECAY = 2.0, 0.01
MEAN_DECAY = 0.998  # of the mean w
R1_EVERY, PATH_EVERY = 16, 4  # steps; the terms count that many times as much
RATE, BETAS = 0.002, (0.0, 0.99)
WEIGHTS = losses.Weights()

Branch = Literal["shape", "texture"]


@dataclass(frozen=True)
class Batch:
    """People whose pictures and codes are known, as the teacher sees them."""

    z_shape: Float[Tensor, "B Z"]
    z_texture: Float[Tensor, "B Z"]
    prior: Prior
    points: Float[Tensor, "B N 3"]  # ndc, see `losses.surface_points`


class Distiller:
    """Trains one branch of `student`, which has its discriminators, step by step."""

    def __init__(
        self, student: Get3DHuman, teacher: Teacher, branch: Branch, weights: losses.Weights = WEIGHTS, seed: int = 0
    ) -> None:  # fmt: skip
        teacher.hand_over(student)
        self.student, self.teacher, self.branch, self.weights = student, teacher, branch, weights
        self.backbone: Backbone = student.get_submodule(f"backbone_{branch}")
        self.critic = student.get_submodule(f"Dis_{branch}")
        trained = [self.backbone, student.get_submodule(f"filter_{branch}")]
        student.requires_grad_(False)
        for module in [*trained, self.critic]:
            module.requires_grad_(True)
        self.generator_step = _adam(trained, PATH_EVERY)
        self.critic_step = _adam([self.critic], R1_EVERY)
        self.random = torch.Generator().manual_seed(seed)
        self.path_mean = torch.zeros([])
        self.steps = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """One step of the generator and one of the critic; what each term was, unweighted."""
        loss, terms, fake = self.generator_loss(batch)
        _apply(self.generator_step, loss)
        if self.steps % PATH_EVERY == 0:
            penalty = self.path_loss(batch)
            _apply(self.generator_step, penalty)
            terms["path"] = penalty / (PATH_WEIGHT * PATH_EVERY)
        critic = self.critic_loss(batch.prior, fake, self.steps % R1_EVERY == 0)
        _apply(self.critic_step, critic)
        self.steps += 1
        return {name: float(term.detach()) for name, term in {**terms, "critic": critic}.items()}

    def generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Float[Tensor, "B C H W"]]:
        """The weighted sum, its terms, and what the critic is to judge."""
        terms, fake = self._terms(batch)
        total = sum(getattr(self.weights, name) * term for name, term in terms.items())
        assert isinstance(total, Tensor)
        return total, terms, fake

    def critic_loss(self, prior: Prior, fake: Float[Tensor, "B C H W"], lazily: bool) -> Tensor:
        """With `lazily` also R1, as often as it counts."""
        seen = self._real(prior).detach().requires_grad_(lazily)
        scores = self.critic(seen)
        loss = losses.discrimination(scores, self.critic(fake.detach()))
        return loss + R1_EVERY * losses.r1(scores, seen, self.weights.r1_gamma) if lazily else loss

    def _real(self, prior: Prior) -> Float[Tensor, "B C H W"]:
        """What the critic takes for true: a shape's volume, or shape and texture together."""
        if self.branch == "shape":
            return prior.shape_volume
        return torch.cat([prior.shape_volume, prior.texture_volume], 1)

    def _terms(self, batch: Batch) -> tuple[dict[str, Tensor], Float[Tensor, "B C H W"]]:
        student, teacher, prior, points = self.student, self.teacher, batch.prior, batch.points
        known = len(batch.z_shape)
        z_shape, z_texture = (torch.cat([z, self._random(z)]) for z in (batch.z_shape, batch.z_texture))
        if self.branch == "shape":
            pictures, volumes = student.shape_features(self._half_mixed(z_shape, known))
            picture, volume = pictures[:known], volumes[:known]
            shown = functional.interpolate(picture, prior.depth.shape[-2:], mode="bilinear", align_corners=False)
            with torch.no_grad():
                truth = decode_shape(teacher.mlp_shape, prior.shape_volume, points)
            found = decode_shape(student.mlp_shape, volume, points)
            terms = {
                "latent": losses.latent_prior(volume, prior.shape_volume), "sdf": losses.agreement(found, truth),
                "normal": losses.normal_loss(shown[:, losses.NORMAL], prior.normal, prior.mask),
                "depth": losses.depth_loss(shown[:, losses.DEPTH], prior.depth),
            }  # fmt: skip
            fake = volumes[known:]
        else:
            with torch.no_grad():
                pictures, shapes = student.shape_features(student.backbone_shape.mapping(z_shape))
                truth = decode_texture(teacher.mlp_texture, prior.shape_volume, prior.texture_volume, points)
            volumes = student.texture_features(self._half_mixed(z_texture, known), pictures)[1]
            volume = volumes[:known]
            found = decode_texture(student.mlp_texture, shapes[:known], volume, points)
            terms = {"latent": losses.latent_prior(volume, prior.texture_volume),
                     "color": losses.agreement(found, truth)}  # fmt: skip
            fake = torch.cat([shapes, volumes], 1)[known:]
        return {**terms, "adversarial": losses.adversarial(self.critic(fake))}, fake

    def _random(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "C Z"]:
        count = math.ceil(RANDOM * len(z))
        return torch.randn(count, z.shape[1], generator=self.random).to(z)

    def _half_mixed(self, z: Float[Tensor, "B Z"], known: int) -> Float[Tensor, "B R W"]:
        """Styles are mixed only where nobody compares the outcome with the picture of a code."""
        return torch.cat([self._rows(z[:known]), self._rows(z[known:], mixed=True)])

    def _rows(self, z: Float[Tensor, "B Z"], mixed: bool = False) -> Float[Tensor, "B R W"]:
        """Rows of w, with `mixed` most often of two codes each."""
        ws = self.backbone.mapping(z)
        with torch.no_grad():
            mapping = self.backbone.mapping
            mapping.w_avg.lerp_(ws[:, 0].mean(0), 1 - MEAN_DECAY)
        if not mixed or float(torch.rand((), generator=self.random)) > MIXED:
            return ws
        cut = int(torch.randint(1, ws.shape[1], (), generator=self.random))
        other = self.backbone.mapping(torch.randn(z.shape, generator=self.random).to(z))
        return torch.cat([ws[:, :cut], other[:, cut:]], 1)

    def path_loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Path length (Karras et al. 2020), weighted: a step in w shall move the picture alike everywhere. Half the
        batch."""
        z = batch.z_shape if self.branch == "shape" else batch.z_texture
        ws = self._rows(z[: math.ceil(len(z) / 2)], mixed=True)
        picture = self.backbone(ws)
        noise = torch.randn(picture.shape, generator=self.random).to(picture) / math.sqrt(picture[0, 0].numel())
        (slope,) = torch.autograd.grad((picture * noise).sum(), ws, create_graph=True)
        length = slope.square().sum(2).mean(1).sqrt()
        self.path_mean = self.path_mean.to(length).lerp(length.detach().mean(), PATH_DECAY)
        return (length - self.path_mean).square().mean() * (PATH_WEIGHT * PATH_EVERY)


def _adam(modules: Iterable[nn.Module], every: int) -> torch.optim.Adam:
    """With the correction for a regulariser that only runs now and then (StyleGAN2, appendix B)."""
    share = every / (every + 1)
    parameters = itertools.chain.from_iterable(module.parameters() for module in modules)
    return torch.optim.Adam(parameters, lr=RATE * share, betas=(BETAS[0] ** share, BETAS[1] ** share))


def _apply(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step. Gradients that are no numbers count nothing, infinite ones are large."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                torch.nan_to_num_(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5)
    optimizer.step()
