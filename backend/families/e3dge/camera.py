# SPDX-License-Identifier: GPL-3.0-or-later
"""Cameras of StyleSDF: on the unit sphere, looking at the origin, +Y up, half angle 6 degrees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from backend.families.e3dge.config import FAR, HALF_ANGLE_DEG, NEAR


@dataclass(frozen=True)
class Cameras:
    """`size` x `size` pixels; `angles` are azimuth and elevation in radians."""

    angles: Float[Tensor, "B 2"]
    size: int

    @property
    def focal(self) -> float:
        """In pixels."""
        return self.size / 2 / math.tan(math.radians(HALF_ANGLE_DEG))

    @property
    def c2w(self) -> Float[Tensor, "B 3 4"]:
        """Columns: right, up, towards the viewer, and the place (cos e sin a, sin e, cos e cos a)."""
        a, e = self.angles.unbind(1)
        back = torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()], 1)
        away = functional.normalize(back)  # of length 1 already; the published run rounds here, and so do we
        right = functional.normalize(torch.linalg.cross(back.new_tensor([[0.0, 1, 0]]).expand_as(away), away))
        up = functional.normalize(torch.linalg.cross(away, right))
        return torch.stack([right, up, away, back], 2)

    @property
    def w2c(self) -> Float[Tensor, "B 3 4"]:
        pose = self.c2w
        turn = pose[:, :, :3].transpose(1, 2)
        return torch.cat([turn, -turn @ pose[:, :, 3:]], 2)

    def projection(self) -> Float[Tensor, "B 4 4"]:
        """World to (x, y, z, 1) times the depth: x and y are -1..1 in the picture after division by -z, y up."""
        scale = 2 * self.focal / self.size
        intrinsics = torch.diag(torch.tensor([scale, scale, 1.0])).to(self.angles)
        last = torch.tensor([[[0.0, 0, 0, 1]]]).to(self.angles).expand(len(self.angles), -1, -1)
        return torch.cat([intrinsics @ self.w2c, last], 1)

    def project(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 2"]:
        """Places in the picture: -1..1 over its pixel areas, x right, y down."""
        matrix = self.projection()
        seen = points @ matrix[:, :3, :3].transpose(1, 2) + matrix[:, None, :3, 3]
        xy = seen[..., :2] / -seen[..., 2:]
        return xy * xy.new_tensor([1, -1])

    def rays(self) -> tuple[Float[Tensor, "B 3"], Float[Tensor, "B H W 3"], Float[Tensor, "H W 3"]]:
        """Origins, directions in the world, and directions in the camera's own frame, through pixel centres. They have
        depth 1 and are not normalised."""
        pixel = (torch.arange(self.size, device=self.angles.device) + 0.5 - self.size / 2) / self.focal
        pixel = pixel.to(self.angles)
        y, x = torch.meshgrid(-pixel, pixel, indexing="ij")
        own = torch.stack([x, y, -torch.ones_like(x)], -1)
        pose = self.c2w
        return pose[:, :, 3], (own[:, :, None] * pose[:, None, None, :, :3]).sum(-1), own


def depths(samples: int, like: Tensor) -> Float[Tensor, " n"]:
    """NEAR + (FAR - NEAR) k / n."""
    part = torch.arange(samples, device=like.device).to(like) / samples
    return NEAR * (1 - part) + FAR * part
