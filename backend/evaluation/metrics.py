# SPDX-License-Identifier: GPL-3.0-or-later
"""Two sets compared: by the features of their members, or by any matrix of distances between them.

Rows are members; G generated, R reference. A matrix is named by its rows and columns: `gr` holds the distances from
every generated to every reference member. Everything is computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

Array = np.ndarray[Any, Any]


def frechet_distance(a: Float[Array, "N D"], b: Float[Array, "M D"]) -> float:
    """Frechet distance of the Gaussians with the same means and covariances (Heusel et al. 2017; FID when the features
    are Inception's): |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Biased upwards when there are few samples: compare it with that of two halves of the reference.
    """
    a, b = _features(a, b)
    mean = a.mean(0) - b.mean(0)
    # C_a C_b has the eigenvalues of S_a' S_b S_b' S_a, with C = S S'. The smaller Gram matrix of the centred samples
    # has the same non-zero spectrum, so singular values of S_a' S_b give the trace of the root without any root.
    roots = [(x - x.mean(0)) / np.sqrt(max(len(x) - 1, 1)) for x in (a, b)]
    product = roots[0] @ roots[1].T if len(a) + len(b) < 2 * a.shape[1] else _root(roots[0]) @ _root(roots[1])
    cross = np.linalg.svd(product, compute_uv=False).sum()
    return float(max(mean @ mean + (roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2 * cross, 0.0))


def _root(centred: Float[Array, "N D"]) -> Float[Array, "D D"]:
    """The symmetric root of the covariance."""
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def kernel_distance(a: Float[Array, "N D"], b: Float[Array, "M D"]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, KID).

    About 0, and as often below as above it, when both sets come from one distribution. Needs two rows in each.
    """
    a, b = _features(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError("the unbiased estimate needs at least two members in each set")

    def kernel(x: Array, y: Array) -> Array:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Array) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def coverage(gr: Float[Array, "G R"]) -> float:
    """Share of reference members that are the nearest of some generated one (Achlioptas et al. 2018). Two sets of one
    distribution and equal size reach about 0.55 to 0.65, not 1."""
    return float(len(np.unique(gr.argmin(1))) / gr.shape[1])


def minimum_matching_distance(gr: Float[Array, "G R"]) -> float:
    """Mean over the reference of the distance to the nearest generated member (Achlioptas et al. 2018)."""
    return float(gr.min(0).mean())


def one_nearest_neighbour_accuracy(gg: Float[Array, "G G"], gr: Float[Array, "G R"], rr: Float[Array, "R R"]) -> float:
    """How well "the set of my nearest neighbour" tells the sets apart, leave one out (1-NNA, Yang et al. 2019):
    0.5 when it cannot, 1 when the sets lie apart, 0 when one copies the other. Equally near: counts half."""
    g, r = len(gg), len(rr)
    own = np.concatenate([_without_self(gg).min(1, initial=np.inf), _without_self(rr).min(1, initial=np.inf)])
    other = np.concatenate([gr.min(1), gr.min(0)])
    return float(((own < other) + 0.5 * (own == other)).sum() / (g + r))


def precision_recall(
    gg: Float[Array, "G G"], gr: Float[Array, "G R"], rr: Float[Array, "R R"], k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of generated members within the reference's
    manifold, and the share of the reference within the generated one. A manifold is the union of balls around its
    members that reach to their k-th nearest neighbour."""
    radii = [np.sort(_without_self(m), axis=1)[:, min(k, len(m) - 1) - 1] for m in (gg, rr)]
    return float((gr <= radii[1]).any(1).mean()), float((gr <= radii[0][:, None]).any(0).mean())


def nearest(distances: Float[Array, "G T"], itself: bool = False) -> Float[Array, " G"]:
    """Distance to the nearest of T; with `itself` rows and columns are the same members and do not count themselves.

    A generator that invents is as far from the training people as they are from each other; one that copies is nearer.
    """
    return (_without_self(distances) if itself else distances).min(1)


def euclidean(a: Float[Array, "N D"], b: Float[Array, "M D"]) -> Float[Array, "N M"]:
    """Distances between rows."""
    a, b = _features(a, b)
    square = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(square.clip(min=0))


def _without_self(square: Array) -> Array:
    out = square.astype(np.float64)
    np.fill_diagonal(out, np.inf)
    return out


def _features(a: Array, b: Array) -> tuple[Array, Array]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"features must be [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    return a, b
