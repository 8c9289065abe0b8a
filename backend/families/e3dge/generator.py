# SPDX-License-Identifier: GPL-3.0-or-later
"""StyleSDF (Or-El et al. 2022), the generator that E3DGE inverts: FiLM-SIREN field, volume renderer, decoder.

    z --style--> w, 9 rows --field--> sdf, features --volume rendering at 64--> features --decoder--> picture 1024

Parameters are named and shaped as in the published files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.e3dge.camera import Cameras, depths
from backend.families.e3dge.config import FAR, FOREGROUND, HALF_SIDE, NEAR, Config
from backend.networks.stylegan2 import (
    SLOPE,
    EqualLinear,
    filter_taps,
    leaky_relu,
    modulated_conv,
    modulated_linear,
    normalize_second_moment,
    upsample,
)

GAMMA, GAMMA_AT = 15.0, 30.0  # frequencies: GAMMA_AT + GAMMA (A w + a)
BETA = 0.25  # phases: BETA (B w + c)
LAST_STEP = 1e10  # length of a ray's last sample


class Mapped(nn.Linear):
    """lrelu(W x + b), without the gain that StyleGAN2 has."""

    def forward(self, input: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        return functional.leaky_relu(super().forward(input), SLOPE)


class FilmSiren(nn.Linear):
    """h = sin(gamma (W x + b) + beta), gamma and beta linear in w (Chan et al. 2021, eq. 3)."""

    def __init__(self, inputs: int, outputs: int, style_dim: int) -> None:
        super().__init__(inputs, outputs)
        self.gamma = nn.Linear(style_dim, outputs)
        self.beta = nn.Linear(style_dim, outputs)

    def forward(self, input: Float[Tensor, "B N I"], w: Float[Tensor, "B W"]) -> Float[Tensor, "B N O"]:
        gamma, beta = GAMMA * self.gamma(w) + GAMMA_AT, BETA * self.beta(w)
        return torch.sin(gamma[:, None] * super().forward(input) + beta[:, None])


class Field(nn.Module):
    """Points in the unit cube -> signed distance, negative inside, and features; `ws` has a row per layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, style = config.width, config.style_dim
        self.pts_linears = nn.ModuleList(
            FilmSiren(3 if i == 0 else width, width, style) for i in range(config.layers)
        )  # fmt: skip
        self.views_linears = FilmSiren(width + 3, width, style)
        self.rgb_linear = nn.Linear(width, 3)
        self.sigma_linear = nn.Linear(width, 1)

    def hidden(self, points: Float[Tensor, "B N 3"], ws: Float[Tensor, "B L W"]) -> Float[Tensor, "B N C"]:
        """What the eighth layer knows of a point of the world."""
        h = points / HALF_SIDE
        for layer, w in zip(self.pts_linears, ws.unbind(1), strict=False):  # the last row is the texture's
            h = layer(h, w)
        return h

    def sdf(self, points: Float[Tensor, "B N 3"], ws: Float[Tensor, "B L W"]) -> Float[Tensor, "B N"]:
        return self.sigma_linear(self.hidden(points, ws))[..., 0]

    def texture(
        self,
        hidden: Float[Tensor, "B N C"],
        directions: Float[Tensor, "B N 3"],
        ws: Float[Tensor, "B L W"],
        modulation: Float[Tensor, "B N 2C"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Features. The directions are of length 1 and in the camera's own frame, so that colour does not depend on
        the pose.
        `modulation` = (alpha, beta): h' = (1 + alpha) h + beta on this way only; the distance never sees it."""
        if modulation is not None:
            alpha, beta = modulation.chunk(2, -1)
            hidden = (1 + alpha) * hidden + beta
        return self.views_linears(torch.cat([hidden, directions], -1), ws[:, -1])


@dataclass(frozen=True)
class View:
    """What volume rendering gives. Lengths are in the world's units, depths along rays of unit depth."""

    thumb: Float[Tensor, "B 3 H W"]  # -1..1
    features: Float[Tensor, "B C H W"]
    depth: Float[Tensor, "B 1 H W"]
    xyz: Float[Tensor, "B 3 H W"]  # points of the surface
    points: Float[Tensor, "B H W n 3"]  # samples
    sdf: Float[Tensor, "B H W n"]
    weights: Float[Tensor, "B H W n"]  # of the samples; they sum to 1

    @property
    def foreground(self) -> Tensor:
        """Bool [B, 1, H, W]."""
        return self.depth < FOREGROUND


class Both(nn.Module):
    """The field and, where detail of a photo is wanted, the network that makes it: their names in the files."""

    def __init__(self, config: Config, local: nn.Module | None) -> None:
        super().__init__()
        self.netGlobal = Field(config)
        if local is not None:
            self.netLocal = local


class Renderer(nn.Module):
    def __init__(self, config: Config, local: nn.Module | None) -> None:
        super().__init__()
        self.network = Both(config, local)
        self.sigmoid_beta = nn.Parameter(torch.full((1,), 0.1))

    def sample_points(
        self, cameras: Cameras, samples: int, jitter: Float[Tensor, "B H W n"] | None = None
    ) -> tuple[Float[Tensor, "B H W n 3"], Float[Tensor, "B H W n"], Float[Tensor, "B H W 3"], Float[Tensor, "H W 3"]]:
        """Points on the rays, their depths, and the rays' directions in the world and in the camera's own frame.
        `jitter` 0..1 moves samples within their step."""
        origin, directions, own = cameras.rays()
        z = depths(samples, directions).expand(*directions.shape[:3], samples)
        if jitter is not None:
            z = z + jitter * ((FAR - NEAR) / samples)
        points = origin[:, None, None, None] + directions[..., None, :] * z[..., None]
        return points, z, directions, own

    def weigh(
        self, sdf: Float[Tensor, "B H W n"], z: Float[Tensor, "B H W n"], directions: Float[Tensor, "B H W 3"]
    ) -> Float[Tensor, "B H W n"]:
        """Density sigmoid(-sdf / b) / b, integrated along the ray; what is left over goes to the last sample."""
        density = torch.sigmoid(-sdf / self.sigmoid_beta) / self.sigmoid_beta
        steps = torch.cat([z[..., 1:] - z[..., :-1], torch.full_like(z[..., :1], LAST_STEP)], -1)
        alpha = 1 - torch.exp(-density * steps * directions.norm(dim=-1, keepdim=True))
        passed = torch.cumprod(1 - alpha + 1e-10, -1)
        weights = alpha[..., :-1] * torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-2]], -1)
        return torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)

    def forward(
        self,
        ws: Float[Tensor, "B L W"],
        cameras: Cameras,
        samples: int,
        modulation: Float[Tensor, "B H W n 2C"] | None = None,
        jitter: Float[Tensor, "B H W n"] | None = None,
    ) -> View:
        field = self.network.netGlobal
        points, z, directions, own = self.sample_points(cameras, samples, jitter)
        hidden = field.hidden(points.flatten(1, 3), ws)
        sdf = field.sigma_linear(hidden).reshape(z.shape)
        every = (own / own.norm(dim=-1, keepdim=True))[None, :, :, None].expand_as(points).flatten(1, 3)
        change = None if modulation is None else modulation.flatten(1, 3)
        features = field.texture(hidden, every, ws, change).unflatten(1, z.shape[1:])
        weights = self.weigh(sdf, z, directions)
        rgb = torch.sigmoid(field.rgb_linear(features))

        def gathered(values: Float[Tensor, "B H W n C"]) -> Float[Tensor, "B C H W"]:
            return torch.einsum("bhwn,bhwnc->bchw", weights, values)

        return View(
            2 * gathered(rgb) - 1, gathered(features), gathered(z[..., None]), gathered(points), points, sdf, weights
        )  # fmt: skip


class Normalized(nn.Module):
    """First of the decoder's mapping: x / sqrt(mean x^2 + eps)."""

    def forward(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        return normalize_second_moment(x)


class ModulatedConv(nn.Module):
    """The weights [1, O, I, k, k] and the modulation of a convolution; `forward` is in `StyledConv` and `ToRGB`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))
        self.modulation = EqualLinear(style_dim, inputs, bias=1.0)
        if up:
            self.blur = Filter()

    @property
    def scaled(self) -> Float[Tensor, "O I k k"]:
        return self.weight[0] * self.weight[0, 0].numel() ** -0.5


class Filter(nn.Module):
    """The low-pass as files name it, times 4; never read."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", 4 * filter_taps())


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Bias(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))


class StyledConv(nn.Module):
    """Modulated 3x3 convolution that may double the picture, fixed noise, bias, sqrt(2) lrelu."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.conv = ModulatedConv(inputs, outputs, 3, style_dim, up)
        self.noise = Weight()
        self.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))  # in the files, and of no use
        self.activate = Bias(outputs)

    def forward(
        self, x: Float[Tensor, "B I h w"], w: Float[Tensor, "B W"], noise: Float[Tensor, "1 1 H W"]
    ) -> Float[Tensor, "B O H W"]:
        y = modulated_conv(x, self.conv.scaled, self.conv.modulation(w), up=self.up)
        if self.up:  # 2 H + 1 -> 2 H
            taps = (4 * filter_taps()).to(y).expand(y.shape[1], 1, 4, 4)
            y = functional.conv2d(y, taps, padding=1, groups=y.shape[1])
        return leaky_relu(y + self.noise.weight * noise + self.activate.bias[:, None, None])


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation, added to the doubled picture so far."""

    def __init__(self, inputs: int, style_dim: int, up: bool = True) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, 3, 1, style_dim)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if up:
            self.upsample = Filter()

    def forward(
        self, x: Float[Tensor, "B I H W"], w: Float[Tensor, "B W"], skip: Float[Tensor, "B 3 h w"] | None
    ) -> Float[Tensor, "B 3 H W"]:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        weight, styles = self.conv.scaled[:, :, 0, 0], self.conv.modulation(w)
        y = modulated_linear(pixels, weight, self.bias.flatten(), styles, demodulate=False)
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return y if skip is None else y + upsample(skip)


class Decoder(nn.Module):
    """Features at `thumb` pixels -> picture. Rows: conv1, to_rgb1, then per doubling two convolutions, the second of
    which shares its next row with the picture's layer: i, i+1 and i+2 with i = 1, 3, 5, ..."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.sizes = [config.thumb << i for i in range((config.picture // config.thumb).bit_length())]
        mapping = [EqualLinear(config.style_dim if i == 0 else dim, dim, True, lr_mul=0.01) for i in range(5)]
        self.style = nn.Sequential(Normalized(), *mapping)
        widths = [config.decoder_channels(size) for size in self.sizes]
        self.conv1 = StyledConv(config.width, widths[0], dim)
        self.to_rgb1 = ToRGB(widths[0], dim, up=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        for before, now in pairwise(widths):
            self.convs.extend([StyledConv(before, now, dim, up=True), StyledConv(now, now, dim)])
            self.to_rgbs.append(ToRGB(now, dim))
        for i in range(2 * len(self.sizes) - 1):
            size = self.sizes[(i + 1) // 2]
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, size, size))

    def forward(self, features: Float[Tensor, "B C h w"], rows: Float[Tensor, "B R D"]) -> Float[Tensor, "B 3 H W"]:
        """-1..1, not clipped."""
        ws: Sequence[Tensor] = rows.unbind(1)
        x = self.conv1(features, ws[0], self.noises.get_buffer("noise_0"))
        picture = self.to_rgb1(x, ws[1], None)
        for i, to_rgb in enumerate(self.to_rgbs):
            for k in (2 * i, 2 * i + 1):
                x = self.convs[k](x, ws[k + 1], self.noises.get_buffer(f"noise_{k + 1}"))
            picture = to_rgb(x, ws[2 * i + 3], picture)
        return picture


class Generator(nn.Module):
    """All of StyleSDF, with the network of local detail inside where its file has it."""

    def __init__(self, config: Config, local: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        style = config.style_dim
        self.style = nn.Sequential(*(Mapped(style, style) for _ in range(3)))
        self.renderer = Renderer(config, local)
        self.decoder = Decoder(config)
        _start_as_siren(self)

    @property
    def field(self) -> Field:
        return self.renderer.network.netGlobal

    def rows(self, z: Float[Tensor, "B Z"]) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B R D"]]:
        """Codes of the renderer and of the decoder, the same in all rows."""
        w = self.style(z)
        decoder = self.decoder.style(w)
        return (w[:, None].expand(-1, self.config.rows, -1),
                decoder[:, None].expand(-1, self.config.decoder_rows, -1))  # fmt: skip


@torch.no_grad()
def _start_as_siren(generator: Generator) -> None:
    """As StyleSDF starts, so that untrained fields are smooth: uniform +-1/3 for points, +-sqrt(6 / n) / 25 behind."""
    for name, layer in generator.field.named_modules():
        if isinstance(layer, FilmSiren):
            inputs = layer.weight.shape[1]
            limit = 1 / 3 if inputs == 3 else (6 / inputs) ** 0.5 / 25
            layer.weight.uniform_(-limit, limit)
            for head in (layer.gamma, layer.beta):
                nn.init.kaiming_normal_(head.weight, a=SLOPE)
                head.weight.mul_(0.25)
                head.bias.zero_()
        elif name in ("rgb_linear", "sigma_linear") and isinstance(layer, nn.Linear):
            limit = (6 / layer.weight.shape[1]) ** 0.5 / 25
            layer.weight.uniform_(-limit, limit)
