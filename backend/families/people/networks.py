# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks of the `people` family: a mapping per latent, a body decoder, and a local generator per part.

A local generator (SemanticHuman-HD's term) owns its volumes, reads tri-plane features there and answers, for one part,
how far its surface is and what colour it has. Everything is in canonical space: the mean body shared by all persons.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backend.families.people.config import SHAPE_DIM, TEX_DIM, PartConfig
from backend.networks.triplane import PlaneBank, gather

FAR = 0.06  # metres: the distance a part reports where none of its volumes reaches


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with SiLU between."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.SiLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


class Mapping(nn.Module):
    """z and condition -> w. Trained to transport the Gaussian onto the codes of sampled people, which form clusters
    (garments are discrete). Truncation pulls towards the nearest cluster centre (multi-modal truncation, Mokady et al.
    2022) and never leaves the cluster's own spread: half-way between a shirt and a coat lies neither."""

    def __init__(self, z_dim: int, condition_dim: int, w_dim: int, centres: int, width: int = 128) -> None:
        super().__init__()
        self.net = mlp(z_dim + condition_dim, width, width, w_dim)
        self.skip = nn.Linear(z_dim, w_dim, bias=False)
        self.register_buffer("centres", torch.zeros(centres, w_dim))
        self.register_buffer("radii", torch.zeros(centres))  # spread of each cluster, in w

    def forward(
        self, z: Float[Tensor, "B Z"], condition: Float[Tensor, "B A"], truncation_psi: float = 1.0
    ) -> Float[Tensor, "B W"]:
        w = self.skip(z) + self.net(torch.cat([z, condition], 1))
        nearest = torch.cdist(w, self.centres).argmin(1)
        delta = w - self.centres[nearest]
        within = (self.radii[nearest, None] / delta.norm(dim=1, keepdim=True).clamp(min=1e-8)).clamp(max=1)
        return self.centres[nearest] + truncation_psi * within * delta


class LocalShape(nn.Module):
    """w_shape -> residual distance r of one part: its signed distance is body distance + r."""

    def __init__(self, config: PartConfig) -> None:
        super().__init__()
        self.banks = nn.ModuleList(PlaneBank(b.volume, b.rank, b.channels, b.resolution) for b in config.shape)
        self.style = mlp(SHAPE_DIM, 64, sum(b.rank for b in config.shape))
        self.head = mlp(self.banks[0].features, config.hidden, config.hidden, 1)

    def planes(self, w: Float[Tensor, "B W"]) -> list[Float[Tensor, "B 3 C R R"]]:
        ranks = [len(b.basis) - 1 for b in self.banks]
        return [bank(a) for bank, a in zip(self.banks, self.style(w).split(ranks, 1), strict=True)]

    def forward(self, planes: list[Tensor], points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Residual of one person's part; FAR where no volume reaches. `planes` each [1, 3, C, R, R]."""
        features, held = gather(self.banks, planes, points)
        out = points.new_full((len(points),), FAR)
        return out.masked_scatter(held, 0.05 * self.head(features).squeeze(1))


class LocalTexture(nn.Module):
    """(w_shape, w_tex) -> sRGB colour of one part: a * palette + b.

    The palette (first six numbers of w_tex: two colours) meets the features only at the end, so a garment's colour is
    a number that users can set, and retexturing cannot move its seams.
    """

    def __init__(self, config: PartConfig, w_dim: int) -> None:
        super().__init__()
        self.banks = nn.ModuleList(PlaneBank(b.volume, b.rank, b.channels, b.resolution) for b in config.tex)
        self.style = mlp(w_dim, 64, sum(b.rank for b in config.tex))
        self.head = mlp(self.banks[0].features, config.hidden, config.hidden, 7)

    planes = LocalShape.planes

    def forward(
        self, planes: list[Tensor], palette: Float[Tensor, 6], points: Float[Tensor, "N 3"]
    ) -> Float[Tensor, "N 3"]:
        """Colours in 0..1 (not clamped); mid grey where no volume reaches."""
        features, held = gather(self.banks, planes, points)
        light, mix, rest = self.head(features).split((3, 1, 3), 1)
        mix = torch.sigmoid(mix)
        color = (1 + light) * ((1 - mix) * palette[:3] + mix * palette[3:]) + rest
        out = points.new_full((len(points), 3), 0.5)
        return out.masked_scatter(held[:, None].expand_as(out), color)


class BodyDecoder(nn.Module):
    """w_shape of the body -> displacement of the control points, and the joints: a linear decoder."""

    def __init__(self, anchors: int, joints: int, controls: int, dim: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.register_buffer("basis", torch.zeros(dim, anchors + joints, 3))
        self.register_buffer("rest", torch.zeros(anchors + joints, 3))
        self.register_buffer("control_index", torch.zeros(controls, 4, dtype=torch.int32))  # each the mean of 4 anchors

    def rest_controls(self) -> Float[Tensor, "P 3"]:
        """Control points on the canonical body, metres."""
        return self.rest[self.control_index.long()].mean(1)

    def forward(self, w: Float[Tensor, "1 W"]) -> tuple[Float[Tensor, "P 3"], Float[Tensor, "J 3"]]:
        """Displacements of the control points and positions of the joints, metres."""
        delta = torch.einsum("w,wpc->pc", w[0], self.basis)
        return delta[self.control_index.long()].mean(1), (self.rest + delta)[self.anchors :]


class PartGenerator(nn.Module):
    """Everything of one part; the body has no shape network, its surface is the canonical body itself."""

    def __init__(self, config: PartConfig) -> None:
        super().__init__()
        self.shape = LocalShape(config) if config.shape else None
        self.tex = LocalTexture(config, TEX_DIM + (SHAPE_DIM if config.shape else 0))
