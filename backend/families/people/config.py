# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes of the `people` family. Lengths are metres in canonical space (see `canonical` in the training package)."""

from __future__ import annotations

from dataclasses import dataclass

from backend.networks.triplane import Volume

SHAPE_DIM = 32  # w_shape per part; the last number says whether the part is worn (> 0)
TEX_DIM = 32  # w_tex per part; the first six numbers are the palette: primary and secondary colour
BODY_DIM = 64  # w_shape of the body
Z_DIM = 8  # z per part and kind; the body's shape has BODY_DIM

PARTS = ("shoes", "bottom", "top", "hair", "accessory")  # inner to outer: a part hides those before it


@dataclass(frozen=True)
class Bank:
    """One volume with the rank and resolution of its planes."""

    volume: Volume
    rank: int
    resolution: int
    channels: int = 8


@dataclass(frozen=True)
class PartConfig:
    shape: tuple[Bank, ...]
    tex: tuple[Bank, ...]
    hidden: int = 48


_ARM_AXES = ((0.543, -0.682, 0.487), (0.782, 0.623, 0.0), (-0.303, 0.381, 0.872))
HEAD = Volume("head", (0.0, 1.335, 0.02), (0.18, 0.41, 0.20))  # long hair hangs below the chest
HAT = Volume("hat", (0.0, 1.63, 0.06), (0.16, 0.13, 0.20))
FACE = Volume("face", (0.0, 1.545, 0.04), (0.12, 0.165, 0.15))
EYES = Volume("eyes", (0.034, 1.563, 0.118), (0.036, 0.03, 0.035), mirror=True)
TORSO = Volume("torso", (0.0, 1.13, 0.05), (0.33, 0.42, 0.24))
ARM = Volume("arm", (0.335, 1.135, 0.13), (0.42, 0.15, 0.18), _ARM_AXES, mirror=True)
LEGS = Volume("legs", (0.0, 0.52, 0.03), (0.34, 0.56, 0.21))
FOOT = Volume("foot", (0.145, 0.11, 0.08), (0.135, 0.16, 0.18), mirror=True)
WHOLE = Volume("whole", (0.0, 0.85, 0.12), (0.60, 0.92, 0.28))

SMALL: dict[str, PartConfig] = {
    "body": PartConfig((), (Bank(WHOLE, 8, 112), Bank(ARM, 8, 64), Bank(FACE, 12, 144), Bank(EYES, 14, 48))),
    "hair": PartConfig((Bank(HEAD, 9, 96),), (Bank(HEAD, 9, 96),)),
    "top": PartConfig((Bank(TORSO, 16, 96), Bank(ARM, 12, 64)), (Bank(TORSO, 12, 128), Bank(ARM, 10, 64))),
    "bottom": PartConfig((Bank(LEGS, 16, 96), Bank(TORSO, 5, 64)), (Bank(LEGS, 10, 128), Bank(TORSO, 5, 64))),
    "shoes": PartConfig((Bank(FOOT, 6, 96),), (Bank(FOOT, 6, 96),)),
    "accessory": PartConfig((Bank(HAT, 3, 64),), (Bank(HAT, 4, 64),)),
}
