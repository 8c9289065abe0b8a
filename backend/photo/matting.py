# SPDX-License-Identifier: GPL-3.0-or-later
"""Who is in a photo: `find` gives one person with a soft matte.

What tells the person from the background is, in this order: a mask that was supplied, the picture's alpha channel, a
plain background (see `background`). People are the connected pieces of that, from left to right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy import ndimage

from backend.families.base import PersonPhoto
from backend.photo.background import foreground
from backend.protocol import PopulaceError

MIN_PERSON: Final = 64  # pixels of height
MAX_PEOPLE: Final = 64
_LOOK: Final = 512  # longer side of the picture in which pieces are counted, pixels
_SAME: Final = 0.25  # of the tallest person's height that another one has at least; what is less is a thing or a speck
_NEAR: Final = 0.1  # of a person's height: smaller pieces so near belong to that person

Matte = Literal["mask", "alpha", "background"]


@dataclass(frozen=True)
class Found(PersonPhoto):
    """One person in a photo, and what else is known of it."""

    people: int  # in the photo
    matte: Matte  # what told the person from the background
    cut_off: tuple[str, ...]  # sides of the picture that the person reaches: "left", "top", "right", "bottom"
    is_torn: bool = False  # in pieces above each other: something between them looks like the background
    fov_y_rad: float | None = None  # vertical field of view, where the file tells

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user."""
        said = []
        if self.people > 1:
            said.append(f"{self.people} people are in the photo")
        if self.cut_off:
            said.append(f"the person is cut off ({', '.join(self.cut_off)}), the rest is guessed")
        if self.is_torn and self.matte == "background":
            said.append("parts of the person look like the background: a mask would help")
        return tuple(said)


def find(rgba: UInt8[np.ndarray, "H W 4"], mask: UInt8[np.ndarray, "H W"] | None = None, person: int = 0) -> Found:
    """Person number `person` from the left. Raises `no_person_found` and `mask_needed`."""
    matte, how = _matte(rgba, mask)
    pieces, people, torn = _people(matte)
    if person >= people:
        count = "one person is" if people == 1 else f"{people} people are"
        raise PopulaceError("no_person_found", f"Person {person} was asked for, but only {count} in the photo.",
                            "They are counted from the left, from 0 on.")  # fmt: skip
    matte = _only(matte, pieces, person + 1)
    rows, columns = np.flatnonzero(matte.max(1) > 127), np.flatnonzero(matte.max(0) > 127)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    if bottom - top < MIN_PERSON:
        raise PopulaceError("no_person_found", f"The person is only {bottom - top} pixels tall in the photo.",
                            f"At least {MIN_PERSON} are needed; 500 or more are good.")  # fmt: skip
    height, width = matte.shape
    edge = max(2, round(0.004 * max(width, height)))  # a matte fades out towards the frame
    reach = {"left": left < edge, "top": top < edge, "right": right > width - edge, "bottom": bottom > height - edge}
    box = (int(left), int(top), int(right), int(bottom))
    cut = np.dstack([rgba[:, :, :3], matte])
    return Found(cut, box, people, how, tuple(side for side, reached in reach.items() if reached), person + 1 in torn)


def _matte(rgba: UInt8[np.ndarray, "H W 4"], mask: UInt8[np.ndarray, "H W"] | None) -> tuple[np.ndarray, Matte]:
    alpha, how = (rgba[:, :, 3], "alpha") if mask is None else (mask, "mask")
    name = "photo" if mask is None else "mask"
    if mask is None and alpha.min() > 127:
        return foreground(rgba[:, :, :3]), "background"
    covered = float((alpha > 127).mean())
    if covered == 0:
        raise PopulaceError("no_person_found", f"The {name} is empty: nothing in it is "
                            f"{'opaque' if mask is None else 'white or opaque'}.", "Choose another one.")  # fmt: skip
    if covered > 0.98:
        if mask is not None:
            raise PopulaceError("no_person_found", "The mask is white everywhere.", "Make it black around the person.")
        return foreground(rgba[:, :, :3]), "background"  # rounded corners, say
    return np.ascontiguousarray(alpha), how  # type: ignore[return-value]


def _people(matte: UInt8[np.ndarray, "H W"]) -> tuple[np.ndarray, int, set[int]]:
    """Labels i32 [h, w] of a smaller picture: 1 for the leftmost person and what is near, and so on; how many people;
    the labels of those that are in large pieces above each other."""
    height, width = matte.shape
    scale = min(1.0, _LOOK / max(height, width))
    small = np.asarray(Image.fromarray(matte).resize((max(1, round(width * scale)), max(1, round(height * scale))),
                                                     Image.Resampling.BOX)) > 127  # fmt: skip
    labels, count = ndimage.label(small, np.ones((3, 3)))
    if not count:
        raise PopulaceError("no_person_found", "There is nobody in the photo.", "Choose another one.")
    boxes = ndimage.find_objects(labels)
    tall = np.array([rows.stop - rows.start for rows, _ in boxes])
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    is_person = (tall >= _SAME * tall.max()) & (area >= _SAME**2 * area.max())
    for i in np.argsort(tall, kind="stable"):  # what hangs above or below a taller piece is of the same person
        taller = [j for j in np.flatnonzero(is_person) if (tall[j], j) > (tall[i], i)]
        is_person[i] &= not any(_is_in_line(boxes[i], boxes[j]) for j in taller)
    middles = np.array([(columns.start + columns.stop) / 2 for _, columns in boxes])
    order = [i for i in np.argsort(middles, kind="stable") if is_person[i]][:MAX_PEOPLE]
    out, torn = np.zeros(labels.shape, np.int32), set[int]()
    for number, i in enumerate(order, 1):
        out[labels == i + 1] = number
    for i in np.flatnonzero(~is_person):  # a hand behind a bag, a shoe: of whoever is nearest
        piece = labels[boxes[i]] == i + 1
        nearest = [(_gap(boxes[i], boxes[j]) / tall[j], number, j) for number, j in enumerate(order, 1)]
        gap, number, j = min(nearest)
        is_large = bool(tall[i] >= _SAME * tall[j]) and _is_in_line(boxes[i], boxes[j])
        if gap <= _NEAR or is_large:
            out[boxes[i]][piece] = number
            torn |= {number} if is_large else set()
    return out, len(order), torn


def _is_in_line(a: tuple[slice, slice], b: tuple[slice, slice]) -> bool:
    """Whether a box is above or below another one, with half of the narrower one's width in common."""
    common = min(a[1].stop, b[1].stop) - max(a[1].start, b[1].start)
    apart = a[0].start >= b[0].stop or b[0].start >= a[0].stop
    return apart and common >= 0.5 * min(a[1].stop - a[1].start, b[1].stop - b[1].start)


def _gap(a: tuple[slice, slice], b: tuple[slice, slice]) -> float:
    """Pixels between two boxes."""
    apart = [max(x.start - y.stop, y.start - x.stop, 0) for x, y in zip(a, b, strict=True)]
    return float(np.hypot(*apart))


def _only(matte: UInt8[np.ndarray, "H W"], pieces: np.ndarray, number: int) -> UInt8[np.ndarray, "H W"]:
    """The matte of one person: soft edges go to whoever they touch."""
    if (pieces == number).sum() == (pieces > 0).sum() and pieces.max() == 1:
        grown = ndimage.binary_dilation(pieces > 0, iterations=3)
    else:
        distance, nearest = ndimage.distance_transform_edt(pieces == 0, return_indices=True)
        grown = (pieces[tuple(nearest)] == number) & (distance <= 3)
    size = (matte.shape[1], matte.shape[0])
    keep: Bool[np.ndarray, "H W"] = np.asarray(Image.fromarray(grown).resize(size, Image.Resampling.NEAREST))
    return np.where(keep, matte, 0).astype(np.uint8)
