# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes of the networks of GTA and SIFU; the defaults are those of the published weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["gta", "sifu"]


@dataclass(frozen=True)
class Config:
    """Widths and depths. Planes have a quarter of the picture's pixels per side, GTA's refined one a half."""

    kind: Kind = "sifu"
    image: int = 512  # pixels per side
    patch: int = 16  # pixels of a token's side; a multiple of 4
    dim: int = 256  # of tokens; a multiple of 4
    heads: int = 8
    head_dim: int = 64
    feed: int = 2048  # hidden layer of the feed-forward parts
    depth: int = 8  # of the encoder
    decoder_depth: int = 3
    plane: int = 32  # channels of a SIFU plane; GTA's xy has as many before it is refined
    side_plane: int = 64  # channels of GTA's planes as they are read
    stem: int = 64  # first width of the hourglass networks
    width: int = 256  # of the hourglass networks
    groups: int = 32  # of group normalisation
    normal_channels: int = 6  # of the features of one normal map
    mlp: tuple[int, ...] = (1024, 512, 256, 128)
    normal_width: int = 64  # first width of the normal networks
    normal_downs: int = 4
    normal_blocks: int = 9
    body: str = "smplx"  # which body prior the weights were trained with

    @property
    def tokens(self) -> int:
        """Per side of the picture."""
        return self.image // self.patch

    @property
    def features(self) -> int:
        """Of a point: spatial, carried by the body, normals, and eight numbers of the body."""
        read = 2 * self.side_plane if self.kind == "gta" else 2 * self.plane
        return read + self.normal_channels + 8

    @classmethod
    def published(cls, kind: Kind) -> Config:
        return cls(kind="gta", decoder_depth=4) if kind == "gta" else cls()

    @classmethod
    def tiny(cls, kind: Kind = "sifu") -> Config:
        """Same construction, for tests on a CPU."""
        return replace(
            cls.published(kind), image=128, patch=16, dim=32, heads=2, head_dim=16, feed=64, depth=1, decoder_depth=1,
            plane=16, side_plane=16, stem=16, width=32, groups=4, mlp=(64, 64, 32, 16), normal_width=8, normal_downs=2,
            normal_blocks=1, body="people",
        )  # fmt: skip

    @classmethod
    def small(cls, kind: Kind = "sifu") -> Config:
        """What two CPU cores train in half an hour."""
        return replace(
            cls.published(kind), image=128, patch=8, dim=96, heads=4, head_dim=24, feed=192, depth=3, decoder_depth=1,
            plane=32, side_plane=32, stem=16, width=48, groups=4, mlp=(192, 128, 96, 64), normal_width=12,
            normal_downs=3, normal_blocks=3, body="people",
        )  # fmt: skip


def from_metadata(metadata: Mapping[str, str]) -> Config:
    """Sizes as weights files have them, those of the normal networks perhaps in a file of their own. Raises ValueError
    if they say nothing of them, or nothing sensible."""
    if "sifu" not in metadata:
        raise ValueError("it does not say the sizes of its networks")
    facts = json.loads(metadata["sifu"]) | json.loads(metadata.get("sifu_normals", "{}"))
    named: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    try:
        return Config(**named)
    except TypeError as error:
        raise ValueError(str(error)) from None


def to_metadata(config: Config) -> dict[str, str]:
    return {"sifu": json.dumps(asdict(config))}


def normal_sizes(config: Config) -> dict[str, str]:
    """What a file of normal networks alone says."""
    return {"sifu_normals": json.dumps({k: v for k, v in asdict(config).items() if k.startswith("normal_")
                                        and k != "normal_channels"})}  # fmt: skip
