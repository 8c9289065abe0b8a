# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes of a GET3D generator. The defaults are those of the published weights; `tiny` is for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["unified", "separate"]
Surface = Literal["dmtet", "flexicubes"]


@dataclass(frozen=True)
class Config:
    """Everything that the shapes and the numbers of a generator depend on."""

    kind: Kind = "unified"  # one backbone for both heads, or 3D convolutions for geometry and planes for texture
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    resolution: int = 256  # of the tri-planes
    base: int = 32768  # channels at a resolution: min(base / resolution, limit)
    limit: int = 512
    features: int = 32  # per plane, and width of the small MLPs
    hidden_layers: int = 1  # of the small MLPs
    color_features: int = 16  # of the texture field, before to_rgb
    clamp: float | None = 256.0  # None for networks trained in float32 throughout
    scale: float = 1.0  # side of the cube that the fields fill
    tet_res: int = 90  # vertices move by at most 1 / (tet_res * deformation_multiplier)
    deformation_multiplier: float = 1.0
    surface: Surface = "dmtet"
    material: bool = False  # colours are base colours, and a head tells roughness, metallic and how normals bend

    @property
    def blocks(self) -> int:
        """Resolutions of the tri-plane backbone: 4, 8, ... resolution."""
        return self.resolution.bit_length() - 2

    @property
    def geo_rows(self) -> int:
        """Rows of w_geo."""
        if self.kind == "separate":
            return 11
        return 3 * self.blocks - 1 + self.hidden_layers + 1

    @property
    def tex_rows(self) -> int:
        """Rows of w_tex."""
        planes = self.blocks if self.kind == "unified" else 3 * self.blocks - 1
        return planes + self.hidden_layers + 1

    @property
    def reach(self) -> float:
        """How far a grid vertex may move along an axis, in units of the unit cube."""
        return 1 / (self.tet_res * self.deformation_multiplier)

    @classmethod
    def tiny(cls, **changes: Any) -> Config:
        """A generator of 160 000 parameters with every layer that the large one has."""
        sizes = {"z_dim": 32, "w_dim": 32, "resolution": 64, "base": 1024, "limit": 32, "tet_res": 64}
        return cls(**{**sizes, **changes})
