# SPDX-License-Identifier: GPL-3.0-or-later
"""A person before a plain background, told apart without any learning: `foreground`.

The frame of the picture shows the background. Its colours are fitted by one smooth surface, or two: a wall, and a floor
below it. What fits neither is the person, as a minimum cut settles it: energies of colours against edges, as GrabCut
has them (Rother et al. 2004), with the background's surfaces in place of its colour mixture. At the outline the matte
is where a colour lies between those on both sides (the compositing equation). A background with a pattern is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from backend.protocol import PopulaceError

_CUT_SIDE: Final = 320  # longer side of the picture that is cut, pixels
_EDGE_SIDE: Final = 1280  # and of the one in which the outline is refined
_RING: Final = 0.03  # width of the frame, of the longer side
_REACH: Final = 0.12  # from a surface, in RGB 0..1, at the first guess
_SPREAD: Final = (0.012, 0.04)  # least and greatest standard deviation of a plain background about its surface
_COVERED: Final = 0.7  # of the frame without its lower side that the background has to explain
_SHADOW: Final = 0.45  # how much darker than the background a shadow may be
_LENIENT: Final = (0.35, 0.1)  # how much that then counts: anywhere, and on the ground about the feet
_FEET: Final = 0.1  # of the person's height
_BRIGHT: Final = 0.5  # length of the RGB colour from which on a background shows shadows: black cloth is none of them
_EDGE_WEIGHT: Final = 4.0  # of a cut between equal colours, in nats
_MAX_CROSSINGS: Final = 4  # of the frame by what stands before the background; more of it is a pattern
_UNIT: Final = 1000  # whole numbers per nat: the flow is computed in integers
_TONES: Final = 5  # of the person's colours


@dataclass(frozen=True)
class _Surface:
    """A colour that changes smoothly over the picture, from row `top` (0..1) on."""

    terms: Float[np.ndarray, "6 3"]
    spread: float
    top: float = 0.0

    def at(self, x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "... 3"]:
        return _basis(x, y) @ self.terms


def foreground(rgb: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """The matte of all that stands before the background. Raises `mask_needed` and `no_person_found`."""
    small = _scaled(rgb, _CUT_SIDE).astype(np.float64) / 255
    height, width = small.shape[:2]
    y, x = np.mgrid[:height, :width]
    x, y = x / max(width - 1, 1), y / max(height - 1, 1)
    surfaces = _surfaces(small, x, y)
    spread, ring = surfaces[0].spread, _ring(height, width)
    distance = np.min([_distance(small, s, x, y) for s in surfaces], 0)  # in standard deviations
    sure = ring & (distance < 3.0)
    person = _cut(small, distance, spread, distance > 5.0, sure)
    rows = np.flatnonzero(person.any(1))
    if len(rows):
        ground = y >= y[rows[-1], 0] - _FEET * (y[rows[-1], 0] - y[rows[0], 0])
        distance = np.min([_distance(small, s, x, y, ground) for s in surfaces], 0)
        person = _cut(small, distance, spread, person, sure)
    person = ndimage.binary_opening(person, iterations=1) | ndimage.binary_erosion(person)
    if person.mean() < 0.001:
        raise PopulaceError("no_person_found", "There is nobody in the photo, only background.", "Choose another one.")
    sides = np.concatenate([person[::-1, 0], person[0], person[:, -1]])
    if person.mean() > 0.9 or np.diff(sides.astype(int), prepend=0).clip(0).sum() > _MAX_CROSSINGS:
        raise _mask_needed()
    return _soft(rgb, person)


def _mask_needed() -> PopulaceError:
    return PopulaceError(
        "mask_needed", "The background of the photo is not plain, so the person cannot be told from it.",
        "Give a mask (white where the person is), a picture with a transparent background, or a photo before a plain "
        "wall."
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the background


def _surfaces(small: Float[np.ndarray, "h w 3"], x: np.ndarray, y: np.ndarray) -> list[_Surface]:
    """One or two. Raises `mask_needed` unless they explain the frame."""
    height, width = small.shape[:2]
    ring = _ring(height, width)
    lower = ring & (y > 0.98 - _RING)
    left, right = ring & (x < 0.1), ring & (x > 0.9)
    found: list[_Surface] = []
    left_over = ring & ~lower
    first = _fit(small, left_over, x, y)
    if first is not None:
        found.append(first)
        far = ring & (_distance(small, first, x, y) > 4.0)
        sides = [y[far & side & ~lower] for side in (left, right)]
        if all(len(rows) > 0.04 * height * _RING * max(height, width) for rows in sides):  # a floor reaches both sides
            top = float(max(np.quantile(rows, 0.05) for rows in sides))
            floor = far & (y >= top)
            second = _fit(small, floor, x, y)
            if second is not None and top > 0.3:
                found.append(_Surface(second.terms, max(second.spread, first.spread), max(0.0, top - 0.1)))
    if found:
        distance = np.min([_distance(small, s, x, y) for s in found], 0)
        if (distance[ring & ~lower] < 4.0).mean() >= _COVERED:
            return found
    raise _mask_needed()


def _fit(
    small: Float[np.ndarray, "h w 3"], where: Bool[np.ndarray, "h w"], x: np.ndarray, y: np.ndarray
) -> _Surface | None:
    """The surface that most of these pixels lie on; None if there is none, or if they spread too much about it."""
    colors, basis = small[where], _basis(x[where], y[where])
    if len(colors) < 40:
        return None
    cells, which = np.unique((colors * 8).astype(int).clip(0, 7), axis=0, return_inverse=True)
    most = cells[np.bincount(which.ravel()).argmax()]
    near = np.abs(colors - (most + 0.5) / 8).max(1) < _REACH
    reach, terms = _REACH, np.zeros((6, 3))
    for step in range(12):
        used = 3 if step < 4 else 6  # a plane first: from few pixels a curved one runs away
        if near.sum() < 30:
            return None
        solved = np.linalg.lstsq(basis[near][:, :used], colors[near], rcond=None)[0]
        terms = np.zeros((6, 3))
        terms[:used] = solved
        off = np.linalg.norm(colors - basis @ terms, axis=1)
        inside = off[off < reach]
        if len(inside) < 30:
            return None
        spread = float(np.median(inside)) / 1.54  # the median length of a normal vector in 3-D
        reach = float(np.clip(4 * spread, 0.04, _REACH))
        near = off < reach
    spread = max(spread, _SPREAD[0])
    if spread > _SPREAD[1] or near.mean() < 0.4:
        return None
    return _Surface(terms, spread)


def _distance(
    small: Float[np.ndarray, "h w 3"], surface: _Surface, x: np.ndarray, y: np.ndarray,
    ground: Bool[np.ndarray, "h w"] | bool = False,
) -> Float[np.ndarray, "h w"]:  # fmt: skip
    """Of every pixel's colour from the surface's, in standard deviations; shadows are near, more so on the ground."""
    color = surface.at(x, y)
    off = small - color
    bright = np.linalg.norm(color, axis=-1)
    along = (off * color).sum(-1) / np.maximum(bright, 1e-3)
    across = np.sqrt(np.maximum((off**2).sum(-1) - along**2, 0))
    counts = np.where(ground, _LENIENT[1], _LENIENT[0])
    along = np.where((along < 0) & (along > -_SHADOW * bright) & (bright > _BRIGHT), counts * along, along)
    return np.where(y >= surface.top, np.hypot(along, across) / surface.spread, np.inf)


def _basis(x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "... 6"]:
    return np.stack([np.ones_like(x), x - 0.5, y - 0.5, (x - 0.5) ** 2, (x - 0.5) * (y - 0.5), (y - 0.5) ** 2], -1)


def _ring(height: int, width: int) -> Bool[np.ndarray, "h w"]:
    ring = np.ones((height, width), bool)
    thick = max(2, round(_RING * max(height, width)))
    ring[thick:-thick, thick:-thick] = False
    return ring


# -------------------------------------------------------------------------------------------------------------- the cut


def _cut(
    small: Float[np.ndarray, "h w 3"], distance: np.ndarray, spread: float, person: Bool[np.ndarray, "h w"],
    sure: Bool[np.ndarray, "h w"],
) -> Bool[np.ndarray, "h w"]:  # fmt: skip
    """The person again, with the colours that the last guess had. Energies in nats."""
    height, width = small.shape[:2]
    if person.sum() < 50:
        return person
    of_background = 0.5 * np.minimum(distance, 30.0) ** 2 + 3 * np.log(spread) + 1.5 * np.log(2 * np.pi)
    of_person = -np.log(0.7 * _mixture(small, small[person]) + 0.3)  # 0.3: any colour at all
    push = np.clip(of_background - of_person, -40, 40)  # above 0: a person's
    push[sure] = -1000
    node = np.arange(height * width).reshape(height, width)
    ends, weights = [], []
    for a, b, far in ((np.s_[:, :-1], np.s_[:, 1:], 1.0), (np.s_[:-1], np.s_[1:], 1.0),
                      (np.s_[:-1, :-1], np.s_[1:, 1:], 2**0.5), (np.s_[1:, :-1], np.s_[:-1, 1:], 2**0.5)):  # fmt: skip
        step = ((small[a] - small[b]) ** 2).sum(-1)
        ends.append((node[a].ravel(), node[b].ravel()))
        weights.append((step, far))
    beta = 1 / (2 * np.mean(np.concatenate([step.ravel() for step, _ in weights])) + 1e-9)
    rows, columns, values = [], [], []
    for (a, b), (step, far) in zip(ends, weights, strict=True):
        weight = (_EDGE_WEIGHT * np.exp(-beta * step) / far + 0.1).ravel()
        rows += [a, b]
        columns += [b, a]
        values += [weight, weight]
    source, sink = height * width, height * width + 1
    rows += [np.full(node.size, source), node.ravel()]
    columns += [node.ravel(), np.full(node.size, sink)]
    values += [np.maximum(push, 0).ravel(), np.maximum(-push, 0).ravel()]
    capacity = (np.concatenate(values) * _UNIT).astype(np.int32)
    graph = csr_array((capacity, (np.concatenate(rows), np.concatenate(columns))), shape=(sink + 1, sink + 1))
    flow = maximum_flow(graph, source, sink).flow
    left = graph - flow
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached = breadth_first_order(left, source, return_predecessors=False)
    out = np.zeros(sink + 1, bool)
    out[reached] = True
    return out[: node.size].reshape(height, width)


def _mixture(small: Float[np.ndarray, "h w 3"], colors: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "h w"]:
    """Density of these colours as a mixture of Gaussians about their k-means, at every pixel."""
    colors = colors[:: max(1, len(colors) // 4000)]
    bright = colors.sum(1)
    centres = colors[np.argsort(bright)[((np.arange(_TONES) + 0.5) / _TONES * len(colors)).astype(int)]]
    nearest: Int[np.ndarray, " N"] = np.zeros(len(colors), int)
    for _ in range(10):
        nearest = ((colors[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.array([colors[nearest == k].mean(0) if (nearest == k).any() else centres[k]
                            for k in range(_TONES)])  # fmt: skip
    density = np.zeros(small.shape[:2])
    for k in range(_TONES):
        mine = colors[nearest == k]
        if len(mine) < 8:
            continue
        spread = np.cov(mine.T) + 0.02**2 * np.eye(3)
        off = small - centres[k]
        power = 0.5 * np.einsum("hwi,ij,hwj->hw", off, np.linalg.inv(spread), off)
        density += len(mine) / len(colors) * np.exp(-power) / np.sqrt((2 * np.pi) ** 3 * np.linalg.det(spread))
    return density


# ---------------------------------------------------------------------------------------------------------- the outline


def _soft(rgb: UInt8[np.ndarray, "H W 3"], person: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W"]:
    """Along the outline the share of the person's colour in what is seen."""
    seen = _scaled(rgb, _EDGE_SIDE).astype(np.float32) / 255
    height, width = seen.shape[:2]
    rough = np.asarray(Image.fromarray(person.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    band = max(height, width) / max(person.shape)  # one pixel of the cut
    guess = ndimage.gaussian_filter(rough, 0.6 * band)
    inside, outside = (ndimage.binary_erosion(side, iterations=max(1, round(1.2 * band)), border_value=1)
                       for side in (guess > 0.5, guess <= 0.5))  # fmt: skip
    near_in, near_out = _spread(seen, inside, 2.0 * band), _spread(seen, outside, 2.0 * band)
    apart = near_in - near_out
    length = (apart**2).sum(-1)
    share = ((seen - near_out) * apart).sum(-1) / np.maximum(length, 1e-6)
    trust = np.clip((np.sqrt(length) - 0.06) / 0.1, 0, 1)  # where both sides look alike, the outline stays as it is cut
    step = np.clip((guess - 0.5) * 2 + 0.5, 0, 1)
    matte = trust * np.clip(1.25 * share - 0.125, 0, 1) + (1 - trust) * step
    matte[inside], matte[outside] = 1, 0
    full = Image.fromarray((matte * 255 + 0.5).astype(np.uint8))
    return np.array(full.resize((rgb.shape[1], rgb.shape[0]), Image.Resampling.BILINEAR))


def _spread(seen: np.ndarray, where: Bool[np.ndarray, "h w"], sigma: float) -> np.ndarray:
    """Colours of `where`, carried beyond it: a blur of only these pixels."""
    weight = ndimage.gaussian_filter(where.astype(np.float32), sigma, truncate=5) + 1e-6
    mean = seen[where].mean(0) if where.any() else np.zeros(3, np.float32)
    blurred = [ndimage.gaussian_filter(seen[..., c] * where, sigma, truncate=5) + 1e-6 * mean[c] for c in range(3)]
    return np.stack(blurred, -1) / weight[..., None]


def _scaled(rgb: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "h w 3"]:
    height, width = rgb.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX, reducing_gap=2.0))
