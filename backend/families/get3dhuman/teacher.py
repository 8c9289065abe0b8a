# SPDX-License-Identifier: GPL-3.0-or-later
"""The prior network: a pixel-aligned reconstructor that turns a picture of a person into the volumes that the
generators learn to make from codes (sec. 3.2 of the paper).

    picture -> mask -> normals -> depth -> V_s        masked picture -> V_t

It is trained beforehand on scans by occupancy and colour, as PIFu is. The generators take over its point decoders, so
volumes of teacher and student live in the same space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from backend.families.get3dhuman.config import Config
from backend.families.get3dhuman.networks import Get3DHuman, HourglassFilter, PointDecoder, UNet


class Residue(nn.Module):
    """Two 3x3 convolutions on reflected borders, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def half() -> list[nn.Module]:
            return [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]

        self.conv_block = nn.Sequential(*half(), nn.ReLU(), *half())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class GlobalGenerator(nn.Module):
    """pix2pixHD's generator (Wang et al. 2018): down, residues, up; picture to picture in -1..1."""

    def __init__(self, inputs: int, outputs: int, width: int = 64, downs: int = 4, residues: int = 9) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(inputs, width, 7), nn.InstanceNorm2d(width),
                                   nn.ReLU()]  # fmt: skip
        for i in range(downs):
            now = width << i
            layers += [nn.Conv2d(now, 2 * now, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * now), nn.ReLU()]
        layers += [Residue(width << downs) for _ in range(residues)]
        for i in reversed(range(downs)):
            now = width << i
            layers += [nn.ConvTranspose2d(2 * now, now, 3, stride=2, padding=1, output_padding=1),
                       nn.InstanceNorm2d(now), nn.ReLU()]  # fmt: skip
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, outputs, 7), nn.Tanh())

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        return self.model(x)


@dataclass(frozen=True)
class Prior:
    """What the teacher makes of pictures."""

    mask: Bool[Tensor, "B 1 H W"]
    normal: Float[Tensor, "B 3 H W"]
    depth: Float[Tensor, "B 1 H W"]  # -1 nearest, 1 background
    shape_volume: Float[Tensor, "B C h w"]
    texture_volume: Float[Tensor, "B C h w"]


class Teacher(nn.Module):
    """248.7 million parameters in the published form; `config.refine_width` is the width of its U-Nets too."""

    def __init__(self, config: Config, residues: int = 9) -> None:
        super().__init__()
        width = config.refine_width
        self.mask = UNet(3, 1, width, batch_statistics=False)
        self.normal = GlobalGenerator(3, 3, width, residues=residues)
        self.depth = UNet(6, 1, width, batch_statistics=False)
        self.filter_shape = HourglassFilter(3, config)
        self.filter_texture = HourglassFilter(3, config)
        self.mlp_shape = PointDecoder(config.volume + 1, config.shape_widths, 1, again=(1, 2))
        self.mlp_texture = PointDecoder(2 * config.volume + 1, config.texture_widths, 3, again=(2, 3))

    def forward(self, picture: Float[Tensor, "B 3 H W"], mask: Bool[Tensor, "B 1 H W"] | None = None) -> Prior:
        """Pictures in -1..1; a known mask saves finding it."""
        mask = torch.sigmoid(self.mask(picture)) > 0.5 if mask is None else mask
        masked = picture * mask
        normal = self.normal(masked)
        depth = torch.where(mask, torch.tanh(self.depth(torch.cat([masked, normal], 1))), 1.0)
        shape = self.filter_shape(depth.expand(-1, 3, -1, -1))
        return Prior(mask, normal, depth, shape, self.filter_texture(masked))

    def hand_over(self, student: Get3DHuman) -> None:
        """Copy the point decoders."""
        student.mlp_shape.load_state_dict(self.mlp_shape.state_dict())
        student.mlp_texture.load_state_dict(self.mlp_texture.state_dict())
