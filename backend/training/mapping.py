# SPDX-License-Identifier: GPL-3.0-or-later
"""Fitting a mapping network: Gaussian z onto the codes of sampled people, by optimal transport."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from backend.families.people.networks import Mapping

CONDITION = 1.5  # how much the condition counts against the code when particles look for their real code


def transport(w: np.ndarray, condition: np.ndarray, z: np.ndarray, rng, rounds: int = 150) -> np.ndarray:
    """Move Gaussian z [N, D] onto the distribution of w [N, D] given condition [N, C], by sliced optimal transport
    (Bonneel et al. 2015): along random directions, particles move to the target's quantiles. Standardised inputs."""
    x = z.copy()
    d, c = w.shape[1], condition.shape[1]
    target = np.concatenate([w, condition], 1)
    for _ in range(rounds):
        frame, _ = np.linalg.qr(rng.normal(size=(d + c, d + c)))
        now = np.concatenate([x, condition], 1) @ frame
        goal = np.sort(target @ frame, 0)
        rank = np.argsort(np.argsort(now, 0), 0)
        x += ((np.take_along_axis(goal, rank, 0) - now) @ frame.T)[:, :d] * (1 if c == 0 else 0.7)
    return x


def fit_body(mapping: Mapping, w: np.ndarray, active: int = 16, steps: int = 2500) -> float:
    """Bodies have no choices: the leading directions are transported (sex, age and build are not Gaussian), the rest
    are Gaussian by themselves. Returns the mean squared error of the regression."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=w.shape)
    x = z.copy()
    x[:, :active] = transport(w[:, :active], np.zeros((len(w), 0)), x[:, :active], rng)
    with torch.no_grad():
        mapping.skip.weight.copy_(torch.eye(w.shape[1]))
        mapping.radii.fill_(1e4)
        if len(mapping.centres) > 1:  # truncation leads to a mean woman or man, not between them
            means, _ = kmeans2(w[:, :active], len(mapping.centres), minit="++", seed=0)
            mapping.centres[:, :active] = torch.from_numpy(means.astype(np.float32))
    return _regress(mapping, z, np.zeros((len(w), 0)), x, np.ones(w.shape[1]), steps)


def fit_choices(mapping: Mapping, w: np.ndarray, condition: np.ndarray, steps: int = 3000) -> float:
    """Codes with choices in them form clusters: their main directions are matched with z, then each particle takes the
    nearest real code of a person of its condition. Returns the mean squared error of the regression, standardised."""
    rng = np.random.default_rng(0)
    n, active = len(w), min(mapping.skip.in_features, w.shape[1])
    mean, std = w.mean(0), w.std(0)
    std = np.where(std < 1e-6, 1.0, std + 0.05 * std.max())  # numbers that hardly vary must not rule the distances
    goal = (w - mean) / std
    _, spread, axes = np.linalg.svd(goal[:: max(1, n // 2000)], full_matrices=False)
    main = goal @ axes[:active].T / (spread[:active] / np.sqrt(min(n, 2000)) + 0.1)
    z = rng.normal(size=(n, mapping.skip.in_features))
    moved = transport(main, 2 * condition, z[:, :active], rng)
    tree = cKDTree(np.concatenate([main, CONDITION * condition], 1))
    real = w[tree.query(np.concatenate([moved, CONDITION * condition], 1), workers=2)[1]]
    with torch.no_grad():
        mapping.skip.weight.zero_()
        mapping.scale.copy_(torch.from_numpy(std))
    error = _regress(mapping, z, condition, real, std, steps)
    _set_centres(mapping, w, goal, rng)
    return error


def _regress(
    mapping: Mapping, z: np.ndarray, condition: np.ndarray, goal: np.ndarray, scale: np.ndarray, steps: int
) -> float:
    zt, ct, xt, st = (torch.from_numpy(a.astype(np.float32)) for a in (z, condition, goal, scale))
    with torch.no_grad():
        mapping.net[-1].bias.copy_((xt - mapping.skip(zt)).mean(0))
    optimiser = torch.optim.Adam(mapping.net.parameters(), 4e-3)
    rng = np.random.default_rng(1)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 4e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
        at = torch.from_numpy(rng.integers(len(z), size=512))
        loss = (((mapping.raw(zt[at], ct[at]) - xt[at]) / st) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return float((((mapping.raw(zt, ct) - xt) / st) ** 2).mean())


def _set_centres(mapping: Mapping, w: np.ndarray, goal: np.ndarray, rng: np.random.Generator) -> None:
    """Real codes that stand for their neighbours, and how far those lie around them."""
    count = len(mapping.centres)
    pick = rng.permutation(len(w))[: min(len(w), 3000)]
    means, owner = kmeans2(goal[pick], goal[pick[:count]], minit="matrix", missing="warn")
    centres, radii = [], []
    for c in np.unique(owner):
        members = pick[owner == c]
        distance = np.linalg.norm(goal[members] - means[c], axis=1)
        centre = members[distance.argmin()]
        centres.append(w[centre])
        radii.append(float(np.quantile(np.linalg.norm(goal[members] - goal[centre], axis=1), 0.8)))
    while len(centres) < count:  # unused slots repeat the first
        centres.append(centres[0])
        radii.append(radii[0])
    mapping.centres.copy_(torch.from_numpy(np.stack(centres).astype(np.float32)))
    mapping.radii.copy_(torch.tensor(radii))
