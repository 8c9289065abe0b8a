# SPDX-License-Identifier: GPL-3.0-or-later
"""The editor that needs no weights: what the photo taught goes on to what it did not show.

Two teachers. The mirror image: a place whose counterpart on the other side was seen looks like it. And the distance:
the photo's difference from what the model believed (a warmer skin, a darker shirt) holds nearby and fades off. How
much to trust each is measured on the photo's own places, which teach each other: there the right answer is known. So
where people are not symmetric, or where the difference says nothing about other places, little or nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from backend.families.base import Step, no_step
from backend.photo.refine import Known, Views

REACH = 0.02  # metres between a place's mirror image and what was seen there
NEIGHBOURS = 24
TURNED = 0.3  # least cosine between normals of places that teach each other
FEWEST = 50  # examples
PROBES = 1500  # examples that test the rules
PRIOR = 0.1  # of the examples' own variance: how much is believed of mirrors before any evidence
DISTANCES = (0.0, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)  # metres from which on examples are taken, to test the rule
SOFT = 1e-4  # square metres: examples nearer than a centimetre count about alike
CHUNK = 100_000


class SymmetricFill:
    """See `refine.Editor`."""

    def edit(self, views: Views, step: Step = no_step) -> Float[Tensor, "B H W 3"]:
        out = views.rgb.clone()
        numbers = views.part[views.mask].unique().tolist()
        for i, number in enumerate(numbers):
            step("edit", i / len(numbers))
            mine = views.known.part == number
            if mine.sum() < FEWEST:
                continue
            rules = Rules.learn(_only(views.known, mine))
            at = (views.part == number) & (views.seen < 1)
            base = views.base[at]
            places = [values[at].double().cpu().numpy() for values in (views.points, views.normals)]
            fill = rules.predict(*places, base.double().cpu().numpy())
            change = torch.from_numpy(fill).to(base) - base
            out[at] = views.rgb[at] + change
        return out


def _only(known: Known, mine: np.ndarray) -> Known:
    return Known(*(getattr(known, name)[mine] for name in ("points", "normals", "colors", "base", "part")))


@dataclass(frozen=True)
class Rules:
    """What the photo's places say of others, and how far they are right."""

    known: Known
    tree: cKDTree  # of all examples
    coarse: cKDTree  # of the probes alone
    probes: Int[np.ndarray, " P"]  # of the examples
    mirror: float  # share of a mirror image's difference that is right
    fading: Float[np.ndarray, " n"]  # the same for the mean difference of neighbours, at `DISTANCES`

    @classmethod
    def learn(cls, known: Known) -> Rules:
        probes = np.random.default_rng(0).permutation(len(known.points))[:PROBES]
        trees = cKDTree(known.points), cKDTree(known.points[probes])
        blank = cls(known, *trees, probes, 0.0, np.zeros(len(DISTANCES)))
        return replace(blank, mirror=blank._mirror_share(probes), fading=_fading(known, probes))

    def _mirror_share(self, probes: np.ndarray) -> float:
        """By places whose mirror image was seen as well and is another place; least squares with a prior."""
        known = self.known
        apart = probes[np.abs(known.points[probes, 0]) > REACH]
        truth, base = known.colors[apart], known.base[apart]
        color, trust = self._mirrored(known.points[apart], known.normals[apart])
        weight = trust[:, None]
        said = (color - base) * weight
        usual = PRIOR * len(probes) * np.square(known.colors - known.base).mean() * 3 + 1e-9
        right = ((truth - base) * said).sum() + usual
        return float(np.clip(right / (np.square(said).sum() + usual), 0, 1))

    def _mirrored(
        self, points: Float[np.ndarray, "N 3"], normals: Float[np.ndarray, "N 3"]
    ) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, " N"]]:
        """Colours at mirror images, and how far something was seen just there, 0..1."""
        turn = np.array([-1.0, 1, 1])
        distance, index = self.tree.query(points * turn, k=4, distance_upper_bound=REACH)
        there = np.minimum(index, len(self.known.points) - 1)
        alike = (self.known.normals[there] * (normals * turn)[:, None]).sum(2) > TURNED
        weight = np.where(np.isfinite(distance) & alike, 1 / (np.square(distance) + 1e-6), 0)
        total = weight.sum(1)
        color = (weight[..., None] * self.known.colors[there]).sum(1) / np.maximum(total, 1e-12)[:, None]
        nearest = np.where(weight > 0, distance, np.inf).min(1)
        return color, np.clip(2 - 2 * nearest / REACH, 0, 1)

    def predict(
        self, points: Float[np.ndarray, "N 3"], normals: Float[np.ndarray, "N 3"], base: Float[np.ndarray, "N 3"]
    ) -> Float[np.ndarray, "N 3"]:
        """Colours of places that the photo did not show."""
        out = [self._predict(*(values[i : i + CHUNK] for values in (points, normals, base)))
               for i in range(0, len(points), CHUNK)]  # fmt: skip
        return np.concatenate(out) if out else base

    def _predict(self, points: np.ndarray, normals: np.ndarray, base: np.ndarray) -> np.ndarray:
        distance, index = self.coarse.query(points, k=min(NEIGHBOURS, len(self.probes)))
        difference = _mean(distance, (self.known.colors - self.known.base)[self.probes[index]])
        share = np.interp(distance[:, 0], DISTANCES, self.fading, right=0.0)
        near = base + share[:, None] * difference
        color, trust = self._mirrored(points, normals)
        return near + (self.mirror * trust)[:, None] * (color - near)


def _mean(distance: Float[np.ndarray, "N k"], values: Float[np.ndarray, "N k 3"]) -> Float[np.ndarray, "N 3"]:
    weight = np.where(np.isfinite(distance), 1 / (np.square(distance) + SOFT), 0)
    return (weight[..., None] * values).sum(1) / np.maximum(weight.sum(1), 1e-12)[:, None]


def _fading(known: Known, probes: np.ndarray) -> Float[np.ndarray, " n"]:
    """Which share of the mean difference of the nearest examples is right here if all nearer ones than a distance are
    not to be had: least squares over the probes. It never grows with the distance."""
    points, difference = known.points[probes], (known.colors - known.base)[probes]
    apart = np.sqrt(np.square(points[:, None] - points[None]).sum(2))
    np.fill_diagonal(apart, np.inf)
    k, shares = min(NEIGHBOURS, len(points) - 1), []
    for least in DISTANCES:
        allowed = np.where(apart >= least, apart, np.inf)
        index = np.argpartition(allowed, k - 1, 1)[:, :k]
        distance = np.take_along_axis(allowed, index, 1)
        tested = np.isfinite(distance).any(1)
        mean = _mean(distance, difference[index])[tested]
        power = np.square(mean).sum()
        enough = tested.sum() >= FEWEST // 2 and power > 0
        shares.append((mean * difference[tested]).sum() / power if enough else 0.0)
    return np.minimum.accumulate(np.clip(shares, 0, 1))
