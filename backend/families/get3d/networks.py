# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D's generators (Gao et al. 2022): two codes become fields of signed value, offset and colour.

    z_geo --mapping_geo--> w_geo --+--> backbone --> geo planes --mlp sdf, mlp def--> at grid vertices
    z_tex --mapping------> w_tex --+             --> tex planes --mlp tex--> 16 features --to_rgb--> colour

Modules are named as in the published files: `load_state_dict` of a file's G_ema is all there is to do. Here positive
values are inside, as the authors have it; `model.py` turns the sign at the family's door.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backend.families.get3d.config import Config
from backend.families.get3d.fields import FieldMLP, read_planes, read_volume, stack_planes, to_unit
from backend.families.get3d.volume import VolumeField
from backend.networks.stylegan2 import (
    Head,
    MappingNetwork,
    NoiseMode,
    SynthesisNetwork,
    modulated_linear,
    own_rows,
)

Rows = Sequence[Float[Tensor, "B W"]]
BEND = 0.5  # the most that a learned normal differs from the surface's, per axis


@dataclass(frozen=True)
class Decoded:
    """The fields of B shapes: what synthesis makes of the codes, asked at points as often as one likes."""

    synthesis: Synthesis
    geometry: tuple[Float[Tensor, "B ..."], ...]  # feature planes [B, 3, R, R, C], or the volumes of sdf and offset
    texture: Float[Tensor, "B 3 R R C"]
    geo_rows: Rows  # of w, for the MLPs of the geometry
    tex_rows: Rows  # for the MLP of the texture
    color_row: Float[Tensor, "B W"]  # for to_rgb

    def sdf(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        """Raw value, positive inside."""
        return self.synthesis.read_sdf(self, points)

    def deform(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        """Raw offsets, before tanh."""
        return self.synthesis.read_deform(self, points)

    def offset(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        """By how much a grid vertex moves: tanh(def) / (tet_res multiplier), not scaled by the cube."""
        return torch.tanh(self.deform(points)) * self.synthesis.config.reach

    def weights(self, points: Float[Tensor, "B N 3"], cubes: Int[Tensor, "C 8"]) -> Float[Tensor, "B C 21"]:
        """FlexiCubes' weights of cubes whose corners are these points; generators made for it have them."""
        return self.synthesis.read_weights(self, points, cubes)

    def features(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N F"]:
        """Of the texture field."""
        return self.synthesis.read_features(self, points)

    def color(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        """-1..1 is the range that colours should have."""
        return self.to_rgb(self.features(points))

    def to_rgb(self, features: Float[Tensor, "B N F"]) -> Float[Tensor, "B N 3"]:
        """Modulated, without demodulation; zeros (nothing there) give the bias."""
        return self._head(self.synthesis.to_rgb, features)

    def to_material(self, features: Float[Tensor, "B N F"]) -> tuple[Float[Tensor, "B N 2"], Float[Tensor, "B N 3"]]:
        """Roughness and metallic in 0..1, and what is added to unit normals, each part within +-BEND. Generators with
        `Config.material` tell it."""
        raw = self._head(self.synthesis.to_material, features)
        return torch.sigmoid(raw[..., :2]), BEND * torch.tanh(raw[..., 2:])

    def _head(self, layer: Head, features: Float[Tensor, "B N F"]) -> Float[Tensor, "B N O"]:
        clamp = self.synthesis.config.clamp
        styles = layer.affine(self.color_row) / math.sqrt(features.shape[2])
        out = modulated_linear(features, layer.weight[:, :, 0, 0], layer.bias, styles, demodulate=False)
        return out if clamp is None else out.clamp(-clamp, clamp)


class Synthesis(nn.Module, ABC):
    """Codes to fields; the two generators differ here."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.to_rgb = Head(config.color_features, 3, config.w_dim, config.clamp)
        if config.material:
            self.to_material = Head(config.color_features, 5, config.w_dim, config.clamp)
            with torch.no_grad():  # begins as a dull plastic without bumps, and can learn from there
                self.to_material.weight.mul_(0.1)
                self.to_material.bias.copy_(torch.tensor([0.5, -3.0, 0.0, 0.0, 0.0]))

    @abstractmethod
    def forward(
        self, ws_geo: Float[Tensor, "B L W"], ws_tex: Float[Tensor, "B M W"], noise_mode: NoiseMode = "const"
    ) -> Decoded: ...

    @abstractmethod
    def read_sdf(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]: ...

    @abstractmethod
    def read_deform(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]: ...

    def read_weights(
        self, decoded: Decoded, points: Float[Tensor, "B N 3"], cubes: Int[Tensor, "C 8"]
    ) -> Float[Tensor, "B C 21"]:
        raise NotImplementedError("only the unified generator has a head for FlexiCubes' weights")

    @abstractmethod
    def read_features(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N F"]: ...


class UnifiedBackbone(nn.Module):
    """Tri-planes of both kinds from one stack of convolutions, and the MLPs that read them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, planes = config, 3 * config.features
        self.tri_plane_synthesis = SynthesisNetwork(
            c.w_dim, c.resolution, {"togeo": planes, "totex": planes}, c.base, c.limit, c.clamp
        )
        self.mlp_synthesis_tex = FieldMLP(c.features, c.features, c.color_features, c.w_dim, c.hidden_layers)
        self.mlp_synthesis_sdf = FieldMLP(c.features, c.features, 1, c.w_dim, c.hidden_layers)
        self.mlp_synthesis_def = FieldMLP(c.features, c.features, 3, c.w_dim, c.hidden_layers)
        if c.surface == "flexicubes":
            self.mlp_synthesis_weight = FieldMLP(8 * c.features, c.features, 21, c.w_dim, c.hidden_layers)


class UnifiedSynthesis(Synthesis):
    """The improved generator, which all published weights use. The geometry code drives every convolution, the texture
    code only its own heads and MLP: a change of w_tex leaves the surface alone, one of w_geo changes both."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.generator = UnifiedBackbone(config)

    def forward(
        self, ws_geo: Float[Tensor, "B L W"], ws_tex: Float[Tensor, "B M W"], noise_mode: NoiseMode = "const"
    ) -> Decoded:
        blocks = self.config.blocks
        geo, tex = ws_geo.unbind(1), ws_tex.unbind(1)
        convs, heads = own_rows(blocks)
        rows = {"togeo": [geo[i] for i in heads], "totex": tex[:blocks]}
        planes = self.generator.tri_plane_synthesis([geo[i] for i in convs], rows, noise_mode)
        geometry, texture = stack_planes(planes["togeo"]), stack_planes(planes["totex"])
        return Decoded(self, (geometry,), texture, geo[3 * blocks - 1 :], tex[blocks:], tex[-1])

    def read_sdf(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        features = read_planes(decoded.geometry[0], to_unit(points, self.config.scale))
        return self.generator.mlp_synthesis_sdf(features, decoded.geo_rows)[..., 0]

    def read_deform(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        features = read_planes(decoded.geometry[0], to_unit(points, self.config.scale))
        return self.generator.mlp_synthesis_def(features, decoded.geo_rows)

    def read_features(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N F"]:
        features = read_planes(decoded.texture, to_unit(points, self.config.scale))
        return self.generator.mlp_synthesis_tex(features, decoded.tex_rows)

    def read_weights(
        self, decoded: Decoded, points: Float[Tensor, "B N 3"], cubes: Int[Tensor, "C 8"]
    ) -> Float[Tensor, "B C 21"]:
        """FlexiCubes' weights of cubes [C, 8] of lattice points, times 0.1: from the features of all eight corners."""
        features = read_planes(decoded.geometry[0], to_unit(points, self.config.scale))
        return 0.1 * self.generator.mlp_synthesis_weight(features[:, cubes].flatten(2), decoded.geo_rows)


class TexturePlanes(nn.Module):
    """The separate generator's texture: an ordinary tri-plane backbone for both codes together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, w_dim = config, 2 * config.w_dim
        self.tri_plane_synthesis = SynthesisNetwork(
            w_dim, c.resolution, {"torgb": 3 * c.features}, c.base, c.limit, c.clamp
        )
        self.mlp_synthesis = FieldMLP(c.features, c.features, c.color_features, w_dim, c.hidden_layers)


class SeparateSynthesis(Synthesis):
    """The generator of the paper's main text: 3D convolutions for geometry, tri-planes for texture."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.geometry_synthesis_sdf = VolumeField(1, 4, config.w_dim, config.clamp)
        self.geometry_synthesis_def = VolumeField(3, 3, config.w_dim, config.clamp)
        self.geometry_synthesis_tex = TexturePlanes(config)

    def forward(
        self, ws_geo: Float[Tensor, "B L W"], ws_tex: Float[Tensor, "B M W"], noise_mode: NoiseMode = "const"
    ) -> Decoded:
        blocks = self.config.blocks
        geo = ws_geo.unbind(1)
        volumes = (self.geometry_synthesis_sdf(geo), self.geometry_synthesis_def(geo))
        repeated = torch.arange(ws_tex.shape[1], device=ws_geo.device).clamp(max=len(geo) - 1)
        seen = ws_geo[:, repeated].detach()  # texture sees the geometry's code, and does not teach it
        rows = torch.cat([ws_tex, seen], 2).unbind(1)
        convs, heads = own_rows(blocks)
        planes = self.geometry_synthesis_tex.tri_plane_synthesis(
            [rows[i] for i in convs], {"torgb": [rows[i] for i in heads]}, noise_mode
        )
        return Decoded(self, volumes, stack_planes(planes["torgb"]), geo, rows[3 * blocks - 1 :], ws_tex[:, -1])

    def read_sdf(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        features = read_volume(decoded.geometry[0], to_unit(points, self.config.scale))
        return self.geometry_synthesis_sdf.read(features, points, decoded.geo_rows)[..., 0]

    def read_deform(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        features = read_volume(decoded.geometry[1], to_unit(points, self.config.scale))
        return self.geometry_synthesis_def.read(features, points, decoded.geo_rows)

    def read_features(self, decoded: Decoded, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N F"]:
        features = read_planes(decoded.texture, to_unit(points, self.config.scale))
        return self.geometry_synthesis_tex.mlp_synthesis(features, decoded.tex_rows)


class Generator(nn.Module):
    """Both mapping networks and the synthesis."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.synthesis = UnifiedSynthesis(config) if config.kind == "unified" else SeparateSynthesis(config)
        self.mapping = MappingNetwork(config.z_dim, config.w_dim, config.tex_rows, config.mapping_layers)
        self.mapping_geo = MappingNetwork(config.z_dim, config.w_dim, config.geo_rows, config.mapping_layers)

    def forward(
        self,
        z_geo: Float[Tensor, "B Z"],
        z_tex: Float[Tensor, "B Z"],
        truncation_psi: float = 1.0,
        noise_mode: NoiseMode = "const",
    ) -> Decoded:
        return self.synthesis(self.mapping_geo(z_geo, truncation_psi), self.mapping(z_tex, truncation_psi), noise_mode)


def mixed_rows(ws: Float[Tensor, "B L W"], other: Float[Tensor, "B L W"], cut: int) -> Float[Tensor, "B L W"]:
    """Style mixing: rows from `cut` on are the other's. Coarse rows say shape, late ones detail."""
    return torch.cat([ws[:, :cut], other[:, cut:]], 1)
