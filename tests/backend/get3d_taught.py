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


@functools.cache
def taught(steps: int = 120, **changes) -> Generator:
    """Some seconds of training on values and colours at points; the mean codes are those of its mappings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"z_dim": 8, "resolution": 16, "tet_res": 24, "mapping_layers": 2}
        net = Generator(Config.tiny(**{**sizes, **changes}))
        # Mappings learn a hundredth as fast as the rest; random ones of two layers tell codes apart as they are.
        optimizer = torch.optim.Adam(net.synthesis.parameters(), 0.01)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - i / steps)
            z_geo, z_tex = torch.randn(4, net.config.z_dim), torch.randn(4, net.config.z_dim)
            points = (torch.rand(4, 400, 3) - 0.5) * net.config.scale
            value, color = wanted(z_geo, z_tex, points)
            decoded = net(z_geo, z_tex)
            near = (-20 * value.abs()).exp()[..., None]
            loss = 5 * (decoded.sdf(points) - value).abs().mean()
            loss = loss + ((decoded.color(points) - color) * near).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for mapping in (net.mapping, net.mapping_geo):
                mapping.w_avg.copy_(mapping(torch.randn(4000, net.config.z_dim))[:, 0].mean(0))
    return net.eval().requires_grad_(False)
