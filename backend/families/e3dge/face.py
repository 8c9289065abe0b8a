# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the face is in a photo of a person, framed about as the generator's own pictures frame faces.

The generator has learned faces that were aligned by landmarks. There is no landmark detector here: the matte's outline
tells the head from the neck. A photo that shows a face alone, already framed so, is taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from backend.families.base import PersonPhoto
from backend.protocol import PopulaceError

SMALLEST = 32  # pixels along a side, below which nothing of a face can be told
HEAD = 0.64  # of the frame's side: from the top of the hair to where the face narrows, about at the mouth
ABOVE = 0.07  # of the frame's side, free above the hair
NECK = 0.8  # of the head's width: at the first narrower row below it the face narrows


@dataclass(frozen=True)
class Frame:
    """A square of the photo, which it may leave; pixels."""

    left: float
    top: float
    side: float

    @property
    def box(self) -> list[float]:
        return [self.left, self.top, self.left + self.side, self.top + self.side]

    def cut(self, rgba: UInt8[np.ndarray, "H W 4"], size: int) -> UInt8[np.ndarray, "S S 4"]:
        """The square, resampled; beyond the photo its border goes on, and alpha is 0 there."""
        x0, y0 = int(np.floor(self.left)), int(np.floor(self.top))
        x1, y1 = (int(np.ceil(edge)) for edge in self.box[2:])
        height, width = rgba.shape[:2]
        columns, rows = np.arange(x0, x1), np.arange(y0, y1)
        found = rgba[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)].copy()
        found[(rows < 0) | (rows >= height), :, 3] = 0
        found[:, (columns < 0) | (columns >= width), 3] = 0
        part = (self.left - x0, self.top - y0, self.left - x0 + self.side, self.top - y0 + self.side)
        planes = [Image.fromarray(found[..., :3]), Image.fromarray(found[..., 3])]  # alpha must not weigh colours
        made = [np.asarray(p.resize((size, size), Image.Resampling.BICUBIC, box=part)) for p in planes]
        return np.dstack(made)


def frame(photo: PersonPhoto) -> Frame:
    """The face's square. Raises `no_person_found` if the person is too small."""
    x0, y0, x1, y1 = photo.box
    if min(x1 - x0, y1 - y0) < SMALLEST:
        raise PopulaceError("no_person_found", f"The person is only {x1 - x0} x {y1 - y0} pixels large.",
                            "Use a photo that shows the face larger.")  # fmt: skip
    matte = photo.rgba[y0:y1, x0:x1, 3] > 127
    rows = matte.any(1)
    if matte.mean() > 0.97 or not rows.any():  # no outline to go by
        side = min(x1 - x0, y1 - y0)
        return Frame((x0 + x1 - side) / 2, float(y0), float(side))
    top = int(np.argmax(rows))
    chin = _neck(_smooth(matte[top:].sum(1).astype(np.float64)))
    if chin is None:  # long hair, or a face alone
        side = float(min(x1 - x0, y1 - y0 - top))
        return Frame((x0 + x1 - side) / 2, y0 + top - ABOVE * side, side * (1 + ABOVE))
    side = chin / HEAD
    centre = x0 + np.nonzero(matte[top : top + chin])[1].mean() + 0.5
    return Frame(float(centre - side / 2), y0 + top - ABOVE * side, side)


def _neck(widths: Float[np.ndarray, " n"]) -> int | None:
    """The first row from which a head that has been getting narrower counts as neck."""
    widest = 0.0
    for row, width in enumerate(widths):
        widest = max(widest, width)
        if row > 0.7 * widest and width < NECK * widest:
            return row if row >= SMALLEST // 2 else None
    return None


def _smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Means over a fiftieth of the rows, so that a strand of hair is no neck."""
    reach = max(len(values) // 100, 1)
    padded = np.pad(values, reach, mode="edge")
    return np.convolve(padded, np.ones(2 * reach + 1) / (2 * reach + 1), "valid")
