# SPDX-License-Identifier: GPL-3.0-or-later
"""The game between a generator and its critics, whatever is drawn: losses, phases, averages, state.

Critics judge colour with silhouette, the silhouette alone (GET3D) and small volumes of distance and colour
(Get3DHuman). One set of fakes serves both sides of a step: the generator moves first, then the critics see the same
pictures without gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.training import checkpoint
from backend.training.discriminators import (
    KINDS,
    Discriminator,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    view_code,
)
from backend.training.loop import Phase


@dataclass(frozen=True)
class Settings:
    """Of the game, whatever is drawn."""

    batch: int = 4
    base: int = 16  # channels of the critics at full size, and the most
    limit: int = 64
    rate_critic: float = 2e-3
    gamma: float = 1.0  # of R1
    r1_every: int = 16
    weight_mask: float = 0.5
    weight_volume: float = 0.1
    augment: float = 0.3  # probability of a shift and of a cut-out
    half_life: float = 2000.0  # of the moving average, in samples
    clip: float = 10.0
    warm_up: int = 100  # steps in which only the critics learn: fresh ones would lead good weights astray


@dataclass(frozen=True)
class Fakes:
    """What the generator made of one step's samples; V framings of each, all of the first framing first."""

    pictures: Float[Tensor, "VN 4 H W"]  # colour on white and silhouette, -1..1
    views: Float[Tensor, "VN 3"]  # see `views`
    volumes: Float[Tensor, "N 4 R R R"]
    boxes: Float[Tensor, "N K"]  # which box each volume is of, one-hot
    anchors: Mapping[str, tuple[float, Tensor]] = field(default_factory=dict)  # weight and value of further losses


class Game(ABC):
    """A `loop.Stage` of generator against critics."""

    name: str

    def __init__(
        self,
        settings: Settings,
        learned: Sequence[tuple[Mapping[str, nn.Parameter], float]],
        size: tuple[int, int],
        volume: tuple[int, int],
        device: torch.device,
        seed: int,
    ) -> None:
        """`learned` are the generator's parameters by name with their learning rates; `size` is (height, width) of the
        pictures, `volume` (cells along the side, boxes)."""
        self.game, self.size, self.device, self.seed = settings, size, device, seed
        self.batch = settings.batch
        self.learned = {k: v for group, _ in learned for k, v in group.items()}
        for name, parameter in self.learned.items():
            parameter.requires_grad_(True)
            if parameter.ndim > 2 and "shape" not in name:
                parameter.register_hook(spread)
        self.average = checkpoint.MovingAverage(self.learned, settings.half_life)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            common = {"base": settings.base, "limit": settings.limit, "group": 2}
            self.critics = nn.ModuleDict({
                "picture": Discriminator(4, size, condition=14, **common),
                "mask": Discriminator(1, size, condition=14, **common),
                "volume": Discriminator(4, (volume[0],) * 3, condition=volume[1], **common),
            }).to(device)  # fmt: skip
        self.generator_optimiser = torch.optim.Adam(
            [{"params": list(group.values()), "lr": rate} for group, rate in learned if group], betas=(0.0, 0.99)
        )
        self.critic_optimiser = torch.optim.Adam(self.critics.parameters(), settings.rate_critic, betas=(0.0, 0.99))

    @abstractmethod
    def fakes(self, step: int, samples: range, anchored: bool = True) -> Fakes:
        """The generator's answer to the samples of a step; without `anchored` only what critics see."""

    @abstractmethod
    def reals(self, step: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        """Real pictures and views as in `Fakes`, and real volumes in the boxes of the step's fakes."""

    @abstractmethod
    def sheet(self) -> np.ndarray | None: ...

    def before(self) -> dict[str, float]:
        return {}

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        kept: list[Fakes] = []

        def generator() -> tuple[Tensor, dict[str, float]]:
            s = self.game
            fakes = self.fakes(step, samples)
            kept.append(fakes)
            shown, angles = augment(fakes.pictures, fakes.views, self._keys(step, samples, 4), s.augment)
            code = view_code(angles)
            loss = (
                generator_loss(self._score("picture", shown, code))
                + s.weight_mask * generator_loss(self._score("mask", shown[:, 3:], code))
                + s.weight_volume * generator_loss(self._score("volume", fakes.volumes, fakes.boxes))
            )
            figures = {"fool": float(loss.detach())}
            for name, (weight, value) in fakes.anchors.items():
                loss = loss + weight * value
                figures[name] = float(value.detach())
            return loss, figures

        def critic() -> tuple[Tensor, dict[str, float]]:
            s = self.game
            lazily = step % s.r1_every == 0
            (fakes,) = kept
            reals, real_views, real_volumes = self.reals(step, samples)
            shown, angles = augment(fakes.pictures.detach(), fakes.views, self._keys(step, samples, 6), s.augment)
            true, true_angles = augment(reals, real_views, self._keys(step, samples, 7), s.augment)
            codes = view_code(angles), view_code(true_angles)
            loss, figures = torch.zeros((), device=self.device), {}
            for name, fake, real, (fake_code, real_code) in (
                ("picture", shown, true, codes),
                ("mask", shown[:, 3:], true[:, 3:], codes),
                ("volume", fakes.volumes.detach(), real_volumes, (fakes.boxes, fakes.boxes)),
            ):
                real = real.detach().requires_grad_(lazily)
                scores = self._score(name, real, real_code, exact=lazily)
                of_fakes = self._score(name, fake, fake_code)
                loss = loss + discriminator_loss(scores, of_fakes)
                if lazily:
                    penalty = r1_penalty(scores, real)
                    loss = loss + s.gamma / 2 * s.r1_every * penalty
                    figures[f"{name}_r1"] = float(penalty.detach())
                figures[f"{name}_real"], figures[f"{name}_fake"] = (
                    float(scores.detach().mean()),
                    float(of_fakes.detach().mean()),
                )
            return loss, figures

        if step < self.game.warm_up:
            with torch.no_grad():
                kept.append(self.fakes(step, samples, anchored=False))
        else:
            self.critics.requires_grad_(False)
            yield Phase("generator", self.generator_optimiser, generator, self.game.clip)
        self.critics.requires_grad_(True)
        yield Phase("critic", self.critic_optimiser, critic, self.game.clip)

    def _keys(self, step: int, samples: range, purpose: int) -> list[list[int]]:
        return [[self.seed, step, i, purpose, k] for k in range(len(KINDS)) for i in samples]

    def _score(self, name: str, x: Tensor, condition: Tensor, exact: bool = False) -> Tensor:
        """bf16 on CUDA, unless a gradient of the gradient is wanted."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and not exact):
            return self.critics[name](x, condition).float()

    def after(self, step: int) -> dict[str, float]:
        self.average.update(self.batch, (step + 1) * self.batch)
        return {}

    def state(self) -> dict[str, Tensor]:
        return (
            checkpoint.with_prefix("generator", self.learned)
            | checkpoint.with_prefix("average", self.average.values)
            | checkpoint.with_prefix("critics", self.critics.state_dict())
            | checkpoint.with_prefix("generator_adam", checkpoint.pack_optimiser(self.generator_optimiser))
            | checkpoint.with_prefix("critic_adam", checkpoint.pack_optimiser(self.critic_optimiser))
        )

    def restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in checkpoint.under_prefix("generator", state).items():
                self.learned[name].copy_(value)
        self.average.load(checkpoint.under_prefix("average", state))
        self.critics.load_state_dict(checkpoint.under_prefix("critics", state))
        checkpoint.unpack_optimiser(self.generator_optimiser, checkpoint.under_prefix("generator_adam", state))
        checkpoint.unpack_optimiser(self.critic_optimiser, checkpoint.under_prefix("critic_adam", state))

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averages in place."""
        for name, parameter in self.learned.items():
            parameter.copy_(self.average.values[name])
            parameter.requires_grad_(False)


def spread(gradient: Float[Tensor, "... H W"]) -> Float[Tensor, "... H W"]:
    """The gradient of planes, plus what it sums to in blocks of 4 and 16 texels, divided by their side.

    A ray of a small picture touches one texel of the many in its pixel; the steps of Adam, alike for large and small
    gradients, would sow noise. So every texel also moves with its neighbourhood: where texels agree the blocks' sums
    rule, where they do not the sums cancel. (A smoothed gradient has the same minima: Nicolet et al. 2021.)
    """
    height, width = gradient.shape[-2:]
    flat = gradient.reshape(-1, 1, height, width)
    used = flat.abs().amax((1, 2, 3)).nonzero().squeeze(1)  # a person wears one of many shirts
    some = flat[used]
    total = some
    for side in (4, 16):
        if side <= min(height, width) and len(used):
            padded = functional.pad(some, (0, -width % side, 0, -height % side))
            sums = functional.avg_pool2d(padded, side) * side
            total = total + functional.interpolate(sums, padded.shape[-2:], mode="bilinear")[:, :, :height, :width]
    return flat.index_copy(0, used, total).reshape(gradient.shape)


def augment(pictures: Tensor, views: Tensor, keys: Sequence[Sequence[int]], p: float) -> tuple[Tensor, Tensor]:
    """Mirrored people seen from the mirrored side (half of them), shifts by up to an eighth and cut-outs of a third
    with probability p: DiffAugment (Zhao et al. 2020). White comes in from outside. Differentiable."""
    height, width = pictures.shape[2:]
    out, angles = [], views.clone()
    for i, (picture, key) in enumerate(zip(pictures, keys, strict=True)):
        rng = np.random.default_rng(key)
        flip, shift, cut = rng.random(3) < (0.5, p, p)
        dy, dx = (int(rng.integers(-(s // 8), s // 8 + 1)) for s in (height, width))
        top, left = int(rng.integers(height - height // 3 + 1)), int(rng.integers(width - width // 3 + 1))
        if flip:
            picture = picture.flip(2)
            angles[i, 0] = -angles[i, 0]
        if shift:
            empty = picture.new_tensor([1.0, 1.0, 1.0, -1.0])[:, None, None]
            pad = functional.pad(picture - empty, (width // 8,) * 2 + (height // 8,) * 2) + empty
            picture = pad[:, height // 8 + dy : height // 8 + dy + height, width // 8 + dx : width // 8 + dx + width]
        if cut:
            keep = torch.ones(height, width, device=picture.device)
            keep[top : top + height // 3, left : left + width // 3] = 0
            picture = picture * keep
        out.append(picture)
    return torch.stack(out), angles
