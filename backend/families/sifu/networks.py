# SPDX-License-Identifier: GPL-3.0-or-later
"""All networks of GTA and SIFU but the transformers, and the module that holds them under the released names.

photo, body -> normals (NormalFilter) -> planes (ImageFilter, refined by ImageFeatures for GTA)
                                      -> features of the normals (ImageFeatures)
point       -> what `query` reads of these -> PointDecoder -> occupancy, or colour
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.sifu.config import Config
from backend.families.sifu.transformer import ImageFilter
from backend.networks.hourglass import StackedHourglass


class ImageFeatures(StackedHourglass):
    """`F_filter`: normal map -> 6 channels at a quarter of its pixels per side."""

    def __init__(self, config: Config, outputs: int, beside: int = 0) -> None:
        super().__init__(3, outputs, 2, config.width, config.stem, groups=config.groups, down="conv", beside=beside)


class RefineFilter(ImageFeatures):
    """GTA's `refine_filter`: photo and xy plane -> that plane at twice its pixels per side."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.width, config.plane)
        self.up_conv = nn.ConvTranspose2d(config.width, config.side_plane, 2, stride=2)

    def refine(self, image: Float[Tensor, "B 3 H W"], xy: Float[Tensor, "B P h w"]) -> Float[Tensor, "B O h2 w2"]:
        return self.up_conv(self.maps(image, xy)[-1])


class PointDecoder(nn.Module):
    """Features of points -> values before the last activation; the input is appended again before layers 2, 3 and 4."""

    def __init__(self, inputs: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        sizes = [inputs, *widths, outputs]
        self.filters = nn.ModuleList(nn.Conv1d(a + inputs * (i >= 2), b, 1) for i, (a, b) in enumerate(pairwise(sizes)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, x: Float[Tensor, "B C N"]) -> Float[Tensor, "B O N"]:
        y = x
        for i, layer in enumerate(self.filters):
            y = layer(torch.cat([y, x], 1) if i >= 2 else y)
            if i < len(self.norms):
                y = functional.leaky_relu(self.norms[i](y), 0.01)
        return y


class PointDecoders(nn.Module):
    """What a point is: inside or outside, and of which colour."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.geo_mlp = PointDecoder(config.features, config.mlp, 1)
        self.color_mlp = PointDecoder(config.features, config.mlp, 3)

    def occupancy(self, features: Float[Tensor, "B C N"]) -> Float[Tensor, "B N"]:
        """1 inside, 0 outside."""
        return torch.sigmoid(self.geo_mlp(features))[:, 0]

    def color(self, features: Float[Tensor, "B C N"]) -> Float[Tensor, "B N 3"]:
        """sRGB in 0..1."""
        return (torch.tanh(self.color_mlp(features)) / 2 + 0.5).transpose(1, 2)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), norm(width), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), norm(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class NormalGenerator(nn.Module):
    """Photo and render of the body's normals -> normals of the clothed person (pix2pixHD's generator, Wang 2018)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        w, layers = config.normal_width, []

        def unit(conv: nn.Module, width: int) -> list[nn.Module]:
            return [conv, nn.InstanceNorm2d(width), nn.ReLU()]

        layers += [nn.ReflectionPad2d(3), *unit(nn.Conv2d(6, w, 7), w)]
        for _ in range(config.normal_downs):
            w *= 2
            layers += unit(nn.Conv2d(w // 2, w, 3, stride=2, padding=1), w)
        layers += [_Residual(w) for _ in range(config.normal_blocks)]
        for _ in range(config.normal_downs):
            w //= 2
            layers += unit(nn.ConvTranspose2d(2 * w, w, 3, stride=2, padding=1, output_padding=1), w)
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh())

    def forward(self, image: Float[Tensor, "B 3 H W"], body: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Unit vectors of the viewer's frame, 0 where the picture is all zero."""
        raw = self.model(torch.cat([image, body], 1))
        unit = raw / torch.linalg.vector_norm(raw, dim=1, keepdim=True).clamp(min=1e-12)
        return unit * (image != 0).any(1, keepdim=True)


class NormalFilter(nn.Module):
    """Front and back."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.netF = NormalGenerator(config)
        self.netB = NormalGenerator(config)


class Reconstructor(nn.Module):
    """Every tensor of a released GTA or SIFU, under its name. Stages may be missing (None) to spare memory."""

    def __init__(self, config: Config, normals: bool = True) -> None:
        super().__init__()
        self.config = config
        self.image_filter = ImageFilter(config)
        self.F_filter = ImageFeatures(config, config.normal_channels)
        self.refine_filter = None
        if config.kind == "gta":
            self.refine_filter = RefineFilter(config)
        self.add_module(decoders_name(config), PointDecoders(config))
        self.normal_filter = NormalFilter(config) if normals else None

    @property
    def decoders(self) -> PointDecoders:
        found = self.get_submodule(decoders_name(self.config))
        assert isinstance(found, PointDecoders)
        return found

    def normals(
        self, image: Float[Tensor, "B 3 H W"], body: Mapping[str, Float[Tensor, "B 3 H W"]]
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B 3 H W"]]:
        """Clothed normals of front and back; `body` has the body's as "F" and "B"."""
        assert self.normal_filter is not None
        return self.normal_filter.netF(image, body["F"]), self.normal_filter.netB(image, body["B"])

    def planes(
        self,
        image: Float[Tensor, "B 3 H W"],
        front: Float[Tensor, "B 3 H W"],
        back: Float[Tensor, "B 3 H W"],
        body: Mapping[str, Float[Tensor, "B 3 H W"]],
    ) -> dict[str, Float[Tensor, "B C h w"]]:
        """Feature planes by name, ready to be read, and "N": features of the front's normals, then of the back's."""
        planes = self.image_filter(image, front, back, body.get("R"), body.get("L"))
        if self.refine_filter is not None:
            planes["xy"] = self.refine_filter.refine(image, planes["xy"])
        planes["N"] = torch.cat([self.F_filter(front), self.F_filter(back)], 1)
        return planes


def decoders_name(config: Config) -> str:
    """What the released files call the point decoders."""
    return "transformer" if config.kind == "gta" else "mlp"
