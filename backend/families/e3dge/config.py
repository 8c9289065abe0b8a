# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes of the networks, and how long and wide the generator's world is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

HALF_SIDE = 0.12000000476837158  # of the cube that holds the head, (FAR - NEAR) / 2 as float32 rounds it
NEAR, FAR = 0.88, 1.12  # depth of the rays from the camera, which is at distance 1 from the origin
HALF_ANGLE_DEG = 6.0  # of the camera
FOREGROUND = 1.08  # rays that end nearer than this meet the head
AZIMUTH_STD, ELEVATION_STD = 0.3, 0.15  # radians; normal distribution of the training's cameras


@dataclass(frozen=True)
class Config:
    """Widths; the defaults are those of the published weights."""

    style_dim: int = 256  # of z and of w
    width: int = 256  # of the field's layers, and of its features
    layers: int = 8
    thumb: int = 64  # pixels along a side of what is volume-rendered
    samples: int = 24  # along a ray
    picture: int = 1024  # of the decoder; thumb times a power of two
    decoder_dim: int = 512
    decoder_rows: int = 10  # of a person's code; a smaller decoder reads the first ones
    decoder_base: int = 32768  # channels at a resolution: min(decoder_base // resolution, decoder_dim)
    encoder_units: tuple[int, ...] = (3, 4, 14, 3)  # bottlenecks with 1, 2, 4, 8 times `encoder_width` channels
    encoder_width: int = 64
    local_stem: int = 32  # channels of residual and of depth before the hourglass
    hourglass_stacks: int = 4
    hourglass_stem: int = 64
    local_norm: str = "instance"  # of residual and depth: "instance" in the published weights, or "batch"
    aligner_widths: tuple[int, ...] = (16, 32, 48, 64)
    pose_widths: tuple[int, ...] = (128, 256, 400, 400, 400, 400)

    @property
    def photo(self) -> int:
        """Pixels along a side of what encoder, hourglass and aligner see."""
        return 4 * self.thumb

    @property
    def groups(self) -> int:
        """Of group normalisation."""
        return min(32, self.width // 4)

    @property
    def rows(self) -> int:
        """Rows of w that the renderer takes: one per layer of the field, then one for the texture's. The encoder calls
        the first six shape and the last three texture; the distance, however, depends on all but the last."""
        return self.layers + 1

    @property
    def tex_rows(self) -> int:
        """Rows of the code of looks: the renderer's last one, then the decoder's, cut to the same width."""
        return 1 + self.decoder_rows * (self.decoder_dim // self.style_dim)

    def decoder_channels(self, resolution: int) -> int:
        return min(self.decoder_base // resolution, self.decoder_dim)

    @classmethod
    def tiny(cls) -> Config:
        """Same construction with 0.5 million numbers, for tests on a CPU."""
        return replace(
            cls(), style_dim=16, width=16, thumb=16, samples=8, picture=64, decoder_rows=6, decoder_dim=16,
            decoder_base=1024, encoder_units=(1, 1, 1, 1), encoder_width=16, local_stem=8, hourglass_stacks=2,
            hourglass_stem=16, aligner_widths=(4, 8, 12, 16), pose_widths=(8, 16, 16, 16),
        )  # fmt: skip


PARTS = ("e3dge", "e3dge_pose", "e3dge_encoder")  # one file each, and one note in its metadata


def from_metadata(metadata: Mapping[str, str]) -> Config:
    """Widths as the weights files have them; without a word those of the published weights."""
    facts = {name: value for part in PARTS for name, value in json.loads(metadata.get(part, "{}")).items()}
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()})


def to_metadata(part: str, config: Config) -> dict[str, str]:
    """The sizes that differ from the published ones, as the file of this part notes them."""
    published = asdict(Config())
    return {part: json.dumps({name: value for name, value in asdict(config).items() if value != published[name]})}
