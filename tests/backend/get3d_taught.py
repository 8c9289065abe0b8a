# SPDX-License-Identifier: GPL-3.0-or-later
"""A tiny GET3D generator that knows something: its shapes are ellipsoids with a foot, in two colours."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from backend.families.get3d.config import Config
from backend.families.get3d.networks import Generator


def wanted(z_geo: Tensor, z_tex: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Value (positive inside) and colour of these codes' shape at points [B, N, 3]."""
    radii = 0.24 + 0.08 * torch.tanh(z_geo[:, None, :3])
    body = 0.24 * (1 - (points / radii).norm(dim=2))
    foot = 0.1 - torch.linalg.vector_norm(points - points.new_tensor([0.2, -0.25, 0.0]), dim=2)
    color = 0.7 * torch.tanh(torch.stack([z_tex[:, :3], z_tex[:, 3:6]], 1))
    return torch.maximum(body, foot), torch.where(points[..., 1:2] > 0, color[:, :1], color[:, 1:])


STEEP = 8.0  # its raw values per unit of length


@functools.cache
def taught(steps: int = 150, **changes) -> Generator:
    """Some seconds of training on values and colours at points; the mean codes are those of its mappings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"z_dim": 8, "resolution": 8, "tet_res": 24, "mapping_layers": 2}
        net = Generator(Config.tiny(**{**sizes, **changes}))
        optimizer = torch.optim.Adam(net.synthesis.parameters(), 0.01, (0.9, 0.99))
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, 2 * (1 - i / steps))
            z_geo, z_tex = torch.randn(8, net.config.z_dim), torch.randn(8, net.config.z_dim)
            points = (torch.rand(8, 200, 3) - 0.5) * net.config.scale
            value, color = wanted(z_geo, z_tex, points)
            decoded = net(z_geo, z_tex)
            near = (-20 * value.abs()).exp()[..., None]
            loss = (decoded.sdf(points) - STEEP * value).abs().mean()
            loss = loss + ((decoded.color(points) - color).abs() * near).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for mapping in (net.mapping, net.mapping_geo):
                mapping.w_avg.copy_(mapping(torch.randn(4000, net.config.z_dim))[:, 0].mean(0))
    return net.eval().requires_grad_(False)
