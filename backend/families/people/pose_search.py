# SPDX-License-Identifier: GPL-3.0-or-later
"""Other poses that a photo may show: what descent from the encoder's answer cannot reach.

Outlines of a step to the left and of one to the right are alike, and between such poses an encoder says the mean, which
is neither. The poses of the library are therefore tried as well, whole and halfway: the best few are fitted for a few
steps, and the one that explains the photo best is gone on with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from backend import poses
from backend.families.people.config import BODY_DIM
from backend.poses import Bones

if TYPE_CHECKING:
    from backend.families.people.fit import Fit
    from backend.families.people.model import PeopleModel

SHARES = (0.5, 1.0)  # of the way from the pose that was said to one of the library
FITTED = 4  # poses besides the one that was said
RELAXED = "standing_1"  # the library's pose that fingers and toes are taken from


def search(fit: Fit, steps: int, size: int, step: Callable[[float], None]) -> None:
    """The pose of every photo, chosen among the one it has and those of the library, each fitted for so many `steps`.
    `size` in pixels."""
    known = library(fit.model)
    for n, first in enumerate(fit.sittings):
        said = first.rotations[fit.body.at]
        tried = []
        for share in SHARES:
            for rotations in known:
                joints = nearest_rotation(said + share * (rotations[fit.body.at] - said))
                where = torch.tensor(fit.body.at)
                tried.append(replace(first, rotations=first.rotations.index_copy(0, where, joints), said=None))
        scores = []
        for sitting in tried:
            fit.sittings[n] = sitting
            scores.append(fit.score_of(n, size))
        likely = sorted(range(len(tried)), key=scores.__getitem__)[:FITTED]
        shape, ends = fit.codes["body/shape"], []
        for i, sitting in enumerate([first, *(tried[i] for i in likely)]):
            fit.sittings[n], fit.codes["body/shape"] = replace(sitting), shape
            fit.solve_light()
            fit.descend(steps, size)
            fit.solve_light()
            ends.append((fit.score_of(n, size), i, fit.sittings[n], fit.codes["body/shape"]))
            step((n + (i + 1) / (FITTED + 1)) / len(fit.sittings))
        _, _, fit.sittings[n], fit.codes["body/shape"] = min(ends, key=lambda end: end[:2])
    fit.solve_light()


def library(model: PeopleModel) -> list[Float[Tensor, "J 3 3"]]:
    """The poses of the library and their mirror images, on the mean body."""
    rig, out = mean_rig(model), []
    for name in poses.pose_names():
        rotations = torch.from_numpy(poses.to_matrices(poses.pose(name, rig)[0])).float()
        out += [rotations, mirrored(rotations, model.bones)]
    return out


def relaxed(model: PeopleModel) -> Float[Tensor, "J 3 3"]:
    """Rotations of all bones in the library's relaxed pose."""
    return torch.from_numpy(poses.to_matrices(poses.pose(RELAXED, mean_rig(model))[0])).float()


@torch.no_grad()
def mean_rig(model: PeopleModel) -> Bones:
    """Bones of the mean body."""
    _, ends = model.networks.body_shape(torch.zeros(1, BODY_DIM))  # pyright: ignore[reportCallIssue]
    heads, tails = (e.numpy() for e in ends.split(len(model.bones)))
    return Bones(model.bones, np.array(model.parents, np.int32), heads, tails)


def mirrored(rotations: Float[Tensor, "J 3 3"], names: tuple[str, ...]) -> Float[Tensor, "J 3 3"]:
    """The pose in a mirror: sides change places."""
    other = {"_l": "_r", "_r": "_l"}
    partner = [names.index(n[:-2] + other[n[-2:]]) if n[-2:] in other else j for j, n in enumerate(names)]
    mirror = torch.diag(torch.tensor([-1.0, 1, 1]))
    return mirror @ rotations[partner] @ mirror


def nearest_rotation(matrix: Float[Tensor, "N 3 3"]) -> Float[Tensor, "N 3 3"]:
    """Orthogonal Procrustes."""
    u, _, vt = torch.linalg.svd(matrix)
    sign = torch.ones(*matrix.shape[:-1])
    sign[..., 2] = torch.det(u @ vt)
    return (u * sign[..., None, :]) @ vt
