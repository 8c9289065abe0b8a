# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D's two critics with the camera as condition: one sees colours, one the silhouette."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backend.networks.stylegan2 import CLAMP, MappingNetwork, widths
from backend.networks.stylegan2_discriminator import add_blocks, block_resolutions, run_blocks

FREQUENCIES = (1, 2, 4)


def camera_code(cameras: Float[Tensor, "B 2"]) -> Float[Tensor, "B 14"]:
    """(azimuth, polar angle) in radians -> for each frequency k [sin ka, sin kt, cos ka, cos kt], then the angles."""
    waves = [wave(k * cameras) for k in FREQUENCIES for wave in (torch.sin, torch.cos)]
    return torch.cat([*waves, cameras], 1)


class DualDiscriminator(nn.Module):
    """Blocks `b*` and `mapping` for the colour's three channels, `mask_b*` and `mask_mapping` for the mask's one."""

    def __init__(
        self, resolution: int = 1024, base: int = 32768, limit: int = 512, clamp: float | None = CLAMP
    ) -> None:
        super().__init__()
        self.resolutions = block_resolutions(resolution)
        last = widths(4, base, limit)
        for prefix, channels in (("", 3), ("mask_", 1)):
            add_blocks(self, prefix, channels, self.resolutions, base, limit, "skip", None, clamp)
            setattr(self, f"{prefix}mapping", MappingNetwork(14, last, embed=True))

    def forward(
        self, pictures: Float[Tensor, "B 4 R R"], cameras: Float[Tensor, "B 2"]
    ) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B 1"]]:
        """Scores of colour and of mask; pictures are colour in -1..1 and mask in 0..1."""
        code = camera_code(cameras)
        rgb = run_blocks(self, "", self.resolutions, pictures[:, :3], self.mapping(code))
        mask = run_blocks(self, "mask_", self.resolutions, pictures[:, 3:], self.mask_mapping(code))
        return rgb, mask
