# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks of Get3DHuman (Xiong et al. 2023) under the names of the released state dicts.

    z -> w -> F [16, 512, 512] -> hourglass -> V [256, 128, 128] -> point decoder -> occupancy, or colour

A "volume" V is a picture of features and the depth of the point: a point is projected orthographically, its feature is
read there, and its depth is appended. F is read by the eye of nobody: it has no activation and no fixed meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.get3dhuman.config import DEPTH_UNITS, OUTSIDE, Config
from backend.networks.hourglass import StackedHourglass
from backend.networks.stylegan2 import MappingNetwork, NoiseMode, SynthesisNetwork, shared_rows
from backend.networks.stylegan2_discriminator import Discriminator


class HourglassFilter(StackedHourglass):
    """Picture of features [B, C, 512, 512] -> volume [B, 256, 128, 128], after PIFu's image filter (Saito 2019)."""

    def __init__(self, inputs: int, config: Config) -> None:
        super().__init__(
            inputs, config.volume, channels=config.volume, stem=config.stem, kernel=5, groups=config.groups,
            fourth_norm=False,
        )  # fmt: skip


class PointDecoder(nn.Module):
    """Shared layers over points; before the layers `again` the input is appended once more."""

    def __init__(self, inputs: int, widths: Sequence[int], outputs: int, again: Sequence[int]) -> None:
        super().__init__()
        sizes = [inputs, *widths, outputs]
        self.again = frozenset(again)
        self.filters = nn.ModuleList(
            nn.Conv1d(a + inputs * (i in self.again), b, 1) for i, (a, b) in enumerate(pairwise(sizes))
        )

    def forward(self, x: Float[Tensor, "B C N"]) -> Float[Tensor, "B O N"]:
        hidden = x
        for i, layer in enumerate(self.filters):
            hidden = layer(torch.cat([hidden, x], 1) if i in self.again else hidden)
            if i < len(self.filters) - 1:
                hidden = functional.leaky_relu(hidden, 0.01)
        return torch.sigmoid(hidden)


def read_volume(volume: Float[Tensor, "B C H W"], ndc: Float[Tensor, "B N 3"]) -> Float[Tensor, "B C N"]:
    """Bilinear features at (x, y); the corner pixels' centres lie at +-1, beyond is zero."""
    return functional.grid_sample(volume, ndc[:, :, None, :2], align_corners=True)[..., 0]


def decode_shape(
    decoder: PointDecoder, shape: Float[Tensor, "B C H W"], ndc: Float[Tensor, "B N 3"]
) -> Float[Tensor, "B N"]:
    """0 inside, 1 outside; `OUTSIDE` where the projection leaves the picture."""
    depth = ndc[:, None, :, 2] * DEPTH_UNITS
    value = decoder(torch.cat([read_volume(shape, ndc), depth], 1))[:, 0]
    in_picture = (ndc[..., :2].abs() <= 1).all(-1)
    return torch.where(in_picture, value, OUTSIDE)


def decode_texture(
    decoder: PointDecoder,
    shape: Float[Tensor, "B C H W"],
    texture: Float[Tensor, "B C H W"],
    ndc: Float[Tensor, "B N 3"],
) -> Float[Tensor, "B N 3"]:
    """sRGB in 0..1."""
    depth = ndc[:, None, :, 2] * DEPTH_UNITS
    features = torch.cat([read_volume(shape, ndc), read_volume(texture, ndc), depth], 1)
    return decoder(features).transpose(1, 2)


class Backbone(nn.Module):
    """Code -> picture of features, an ordinary StyleGAN2 whose picture has 16 channels and no activation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = int(math.log2(config.resolution)) - 1
        self.synthesis = SynthesisNetwork(
            config.w_dim, config.resolution, {"torgb": config.feature_channels}, config.channel_base, config.channel_max
        )
        self.mapping = MappingNetwork(config.z_dim, config.w_dim, 2 * self.blocks, config.mapping_layers)

    def forward(self, ws: Float[Tensor, "B L W"], noise_mode: NoiseMode = "const") -> Float[Tensor, "B F R R"]:
        """F of one w per row; all rows are equal unless styles are mixed."""
        convs, heads = shared_rows(self.blocks)
        rows = ws.unbind(1)
        return self.synthesis([rows[i] for i in convs], {"torgb": [rows[i] for i in heads]}, noise_mode)["torgb"]


class Get3DHuman(nn.Module):
    """Everything of the first released file but its discriminators, which only training asks for."""

    def __init__(self, config: Config, discriminators: bool = False) -> None:
        super().__init__()
        self.config = config
        self.backbone_shape = Backbone(config)
        self.backbone_texture = Backbone(config)
        self.filter_shape = HourglassFilter(config.feature_channels, config)
        self.filter_texture = HourglassFilter(2 * config.feature_channels, config)
        self.mlp_shape = PointDecoder(config.volume + 1, config.shape_widths, 1, again=(1, 2))
        self.mlp_texture = PointDecoder(2 * config.volume + 1, config.texture_widths, 3, again=(2, 3))
        if discriminators:
            size, limit = config.volume_size, config.discriminator_max
            self.Dis_shape = Discriminator(config.volume, size, limit=limit)
            self.Dis_texture = Discriminator(2 * config.volume, size, limit=limit)

    def shape_features(
        self, ws: Float[Tensor, "B L W"], noise_mode: NoiseMode = "const"
    ) -> tuple[Float[Tensor, "B F R R"], Float[Tensor, "B C h w"]]:
        """F_s and V_s of the shape's code."""
        picture = self.backbone_shape(ws, noise_mode)
        return picture, self.filter_shape(picture)

    def texture_features(
        self, ws: Float[Tensor, "B L W"], shape_picture: Float[Tensor, "B F R R"], noise_mode: NoiseMode = "const"
    ) -> tuple[Float[Tensor, "B F R R"], Float[Tensor, "B C h w"]]:
        """F_t and V_t of the texture's code; the filter sees the shape's picture, so clothes follow the body."""
        picture = self.backbone_texture(ws, noise_mode)
        return picture, self.filter_texture(torch.cat([picture, shape_picture], 1))


class PictureNorm(nn.BatchNorm2d):
    """Batch normalisation that outside training may still take the statistics of the one picture it sees."""

    def __init__(self, channels: int, batch_statistics: bool) -> None:
        super().__init__(channels)
        self.batch_statistics = batch_statistics

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if self.training or not self.batch_statistics:
            return super().forward(x)
        return functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Unit(nn.Module):
    """3x3 convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, batch_statistics: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), PictureNorm(outputs, batch_statistics), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UNet(nn.Module):
    """The U-Net of the refine net and of the teacher's mask and depth: four poolings, skips at every level.

    The published run never leaves training mode, so its batch normalisation uses the statistics of the one picture it
    sees. `batch_statistics` does the same in evaluation mode; without it the stored statistics give another picture.
    """

    def __init__(self, inputs: int = 3, outputs: int = 3, width: int = 64, batch_statistics: bool = True) -> None:
        super().__init__()
        w = [width << i for i in range(5)]  # 64, 128, 256, 512, 1024
        sizes = [(inputs, w[0]), (w[0], w[0]), (w[0], w[0]), (w[0], w[1]), (w[1], w[2]), (w[2], w[3]),
                 (w[3], w[4]), (w[4], w[4]), (w[4], w[3]), (2 * w[3], w[3]), (w[3], w[2]), (2 * w[2], w[2]),
                 (w[2], w[1]), (2 * w[1], w[1]), (w[1], w[0]), (2 * w[0], w[0]), (w[0], w[0])]  # fmt: skip
        for i, (a, b) in enumerate(sizes):
            self.add_module(f"Conv{i}", Unit(a, b, batch_statistics))
        self.Conv_out = nn.Conv2d(w[0], outputs, 1)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        """Before the output's activation. H and W are multiples of 16."""
        unit = self.get_submodule
        skips = []
        x = unit("Conv0")(x)
        for first, last in ((1, 2), (3, 3), (4, 4), (5, 5)):
            for i in range(first, last + 1):
                x = unit(f"Conv{i}")(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        for i in (6, 7, 8):
            x = unit(f"Conv{i}")(x)
        for i, skip in zip((9, 11, 13, 15), reversed(skips)):
            x = torch.cat([functional.interpolate(x, scale_factor=2, mode="nearest"), skip], 1)
            x = unit(f"Conv{i + 1}")(unit(f"Conv{i}")(x))
        return self.Conv_out(x)


class RefineNet(nn.Module):
    """Picture traced from the field -> picture as a camera would show it; both 0..1 on white."""

    def __init__(self, width: int = 64, batch_statistics: bool = True) -> None:
        super().__init__()
        self.rnet = UNet(3, 3, width, batch_statistics)

    def forward(self, picture: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return (self.raw(picture) + 1) / 2

    def raw(self, picture: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """-1..1, as the network was trained."""
        return torch.tanh(self.rnet(picture))
