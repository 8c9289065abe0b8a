# SPDX-License-Identifier: GPL-3.0-or-later
"""How good a reconstruction is: millimetres, pictures from eight sides, the face by itself, and parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from backend.evaluation import images, shapes
from backend.evaluation.parts import intersections_and_unions, iou
from backend.evaluation.portraits import GRID, SIZE, around, cameras, figure, photograph, surface_points
from backend.evaluation.reconstruct import Fit, Steps, Target
from backend.families.base import FamilyModel, Latents
from backend.render.camera import Camera

EIGHT = 8
DENSE = 60_000  # points of the reconstruction's surface: 3 mm apart


@dataclass(frozen=True)
class Reality:
    """A person to be reconstructed, standing on y = 0."""

    target: Target
    head: Float[Tensor, " 3"]  # middle of the head
    height_m: float
    photograph: Callable[[Camera, int], tuple[Tensor, Tensor, Tensor]]
    """(camera, size) -> pictures, normals, parts as `portraits.photograph` gives them."""


def rebuild(
    model: FamilyModel, reality: Reality, bank: Sequence[Latents], steps: Steps, grid: int = GRID
) -> dict[str, Any]:
    """Fit, make the surface, compare. Pictures are compared over the whole frame, which is filled by the person from
    feet to top, and (`psnr_person`) only where either person is."""
    begin = time.perf_counter()
    fit = Fit(model, reality.target, bank)
    latents = fit.run(steps)
    seconds = time.perf_counter() - begin
    made = figure(model.decode(latents)[0], grid)
    made.mesh.vertices[:, 1] += made_on(fit, made.drop)
    points, _ = surface_points(made, DENSE)
    camera, face = around(EIGHT, reality.height_m), cameras(reality.head)
    face = Camera(face.c2w[-1:], face.projection[-1:])
    out: dict[str, Any] = {
        "chamfer_mm": 1000 * shapes.chamfer(points.numpy(), reality.target.points.numpy()),
        "height_error_m": abs(made.height - reality.height_m), "seconds": seconds,
    }  # fmt: skip
    counts = np.zeros((1,))
    for suffix, lens in (("", camera), ("_face", face)):
        mine, theirs = photograph(made, lens), reality.photograph(lens, SIZE)
        a, b = (x[0].permute(0, 3, 1, 2).float() / 255 for x in (mine, theirs))
        out[f"psnr{suffix}"] = images.psnr(a, b)
        out[f"ssim{suffix}"] = float(images.ssim(a, b).mean())
        out[f"psnr_person{suffix}"] = images.psnr(a, b, (mine[2] > 0) | (theirs[2] > 0))
        if not suffix:
            counts = intersections_and_unions(mine[2].numpy(), theirs[2].numpy())
    return {**out, "label_iou": iou(counts)}


def made_on(fit: Fit, drop: float) -> float:
    """Metres to move a figure that was put on its own feet so that it stands where the fit wants it: the fit carries
    points of the person up by `lift` into the family's space."""
    return -float(fit.lift) - drop
