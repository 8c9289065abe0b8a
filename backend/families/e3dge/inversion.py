# SPDX-License-Identifier: GPL-3.0-or-later
"""The road of the paper: a photo -> codes and residual -> pictures of any view, with the photo's detail in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.e3dge.camera import Cameras
from backend.families.e3dge.config import Config
from backend.families.e3dge.encoder import GlobalEncoder, PoseEstimator
from backend.families.e3dge.generator import Generator, View
from backend.families.e3dge.local import Aligner, Fusion, LocalNet, read_map


@dataclass(frozen=True)
class Codes:
    """w+ of a person."""

    renderer: Float[Tensor, "B L W"]
    decoder: Float[Tensor, "B R D"]

    def moved(self, direction: Mapping[str, Float[Tensor, " ?"]], strength: float) -> Codes:
        """Along an editing direction, in every row: a vector for the renderer's rows and one for the decoder's."""
        return Codes(self.renderer + strength * direction["renderer"].to(self.renderer),
                     self.decoder + strength * direction["decoder"].to(self.decoder))  # fmt: skip

    def between(self, other: Codes, amount: float) -> Codes:
        """Interpolation of latents: 0 is this person, 1 the other."""
        return Codes(torch.lerp(self.renderer, other.renderer, amount), torch.lerp(self.decoder, other.decoder, amount))


@dataclass(frozen=True)
class Seen:
    """What a photo shows beyond the codes."""

    cameras: Cameras  # of the photo
    residual: Float[Tensor, "B 3 P P"]  # photo minus the codes' own picture, both in -1..1
    features: Float[Tensor, "B C h w"]


class E3dge(nn.Module):
    """All networks. Their names: `generator` (with local detail inside), `encoder`, `grid_align`, `fuse`, `camera`.

    Without `inverting` there is the generator alone, as its own file has it; without `posing` no pose estimator.
    """

    w_avg: Tensor
    decoder_avg: Tensor

    def __init__(self, config: Config, inverting: bool = True, posing: bool = True) -> None:
        super().__init__()
        self.config = config
        self.generator = Generator(config, LocalNet(config) if inverting else None)
        if inverting:
            self.encoder = GlobalEncoder(config)
            self.grid_align = Aligner(config)
            self.fuse = Fusion(config)
        if posing:
            self.camera = PoseEstimator(config.pose_widths)
        self.register_buffer("w_avg", torch.zeros(config.style_dim))
        self.register_buffer("decoder_avg", torch.zeros(config.decoder_dim))

    @property
    def local(self) -> LocalNet:
        return self.generator.renderer.network.netLocal

    def cameras(self, angles: Float[Tensor, "B 2"]) -> Cameras:
        """Of the volume renderer; `angles` are azimuth and elevation in radians."""
        return Cameras(angles, self.config.thumb)

    @torch.no_grad()
    def average(self, count: int, draw: Float[Tensor, "N Z"]) -> None:
        """Set the mean codes from normally distributed z, the first `count` of `draw`."""
        w = self.generator.style(draw[:count])
        self.w_avg.copy_(w.double().mean(0))
        self.decoder_avg.copy_(self.generator.decoder.style(w).double().mean(0))

    def sample(self, z: Float[Tensor, "B Z"], truncation_psi: float = 1.0) -> Codes:
        """Codes of z, drawn towards the mean codes."""
        renderer, decoder = self.generator.rows(z)
        if truncation_psi == 1:
            return Codes(renderer, decoder)
        return Codes(self.w_avg.lerp(renderer, truncation_psi), self.decoder_avg.lerp(decoder, truncation_psi))

    def encode(self, photo: Float[Tensor, "B 3 P P"]) -> Codes:
        """E0: means plus what the encoder sees; the photo in -1..1."""
        renderer, decoder = self.encoder(photo)
        return Codes(self.w_avg + renderer, self.decoder_avg + decoder)

    def pose(self, photo: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B 2"]:
        """Azimuth and elevation of a photo."""
        return self.camera(functional.interpolate(photo, 2 * [self.config.thumb], mode="area"))[1]

    def render(self, codes: Codes, cameras: Cameras, samples: int | None = None) -> View:
        """The global view: codes alone."""
        return self.generator.renderer(codes.renderer, cameras, samples or self.config.samples)

    def picture(self, view: View, codes: Codes) -> Float[Tensor, "B 3 H W"]:
        """The decoder's large picture of a view."""
        return self.generator.decoder(view.features, codes.decoder)

    def enlarged(self, thumb: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C P P"]:
        return functional.interpolate(thumb, 2 * [self.config.photo], mode="nearest")

    def see(self, photo: Float[Tensor, "B 3 P P"], view: View, cameras: Cameras) -> Seen:
        """The photo against the codes' own view from its camera."""
        residual = photo - self.enlarged(view.thumb)
        return Seen(cameras, residual, self.local.feature_map(residual, view.depth))

    def align(self, seen: Seen, view: View) -> Float[Tensor, "B 3 P P"]:
        """The residual as this view would show it."""
        return self.grid_align(seen.residual, self.enlarged(view.thumb))

    def fused(self, seen: Seen, view: View, cameras: Cameras) -> Float[Tensor, "B N C"]:
        """Features of all samples of a view: those that the photo's own map has there, and those of the residual that
        was aligned to this view."""
        aligned = self.local.feature_map(self.align(seen, view), view.depth)
        points = view.points.flatten(1, 3)
        there, _ = read_map(aligned, cameras.project(points))
        own, _ = read_map(seen.features, seen.cameras.project(points))
        _, inside = read_map(seen.features, seen.cameras.project(view.xyz.flatten(2).transpose(1, 2)))
        flag = inside[:, :, None].expand(-1, -1, view.points.shape[3]).flatten(1)[..., None].to(there)
        return self.fuse(there, flag, own)

    def render_detail(
        self, codes: Codes, cameras: Cameras, seen: Seen, samples: int | None = None
    ) -> tuple[View, View]:
        """A view with the photo's detail, and the global view that it starts from. Codes may have been edited since the
        photo was seen: then the residual follows the edit by the 2D alignment."""
        samples = samples or self.config.samples
        view = self.render(codes, cameras, samples)
        points = view.points.flatten(1, 3)
        modulation = self.local.modulation(self.fused(seen, view, cameras), points)
        modulation = modulation.unflatten(1, view.points.shape[1:4])
        return self.generator.renderer(codes.renderer, cameras, samples, modulation), view
