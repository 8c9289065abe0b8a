# SPDX-License-Identifier: GPL-3.0-or-later
"""Fits by gradients through the renderer: the body to the photo before the reconstruction, the surface to the predicted
normals after it (SIFU's supplement, ICON section 3.3).

The released program's body loss counts the front's normals twice and the back's never; here both count once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.families.base import Step, no_step
from backend.families.sifu.prior import Placed, SkinnedBody
from backend.families.sifu.views import normal_views
from backend.render.silhouette import edge_topology

Predict = Callable[[Mapping[str, Float[Tensor, "3 S S"]]], tuple[Float[Tensor, "3 S S"], Float[Tensor, "3 S S"]]]
"""Body normals by side -> clothed normals of front and back; called without gradients."""
KNEES = ("calf_l", "calf_r", "left_knee", "right_knee")


@dataclass(frozen=True)
class BodyFit:
    """Settings of the body's fit; the defaults are the published ones but for `every`, which was 1."""

    steps: int = 100
    rate: float = 1e-3
    every: int = 5  # steps between two predictions of the clothed normals, the costliest part
    patience: int = 5
    lowest_rate: float = 1e-5
    keep: float = 0.0  # pull of the rotations to where they began
    straight_legs: float = 0.0  # pull of the knees to rest: regressors bend legs that are straight
    size: int = 256  # pixels per side
    seconds: float | None = None
    still: tuple[str, ...] = ("thumb", "index", "middle", "ring", "pinky", "joint_")  # bones that stay, by beginning


def six_of(rotations: Float[Tensor, "N 3 3"]) -> Float[Tensor, "N 6"]:
    """The first two columns (Zhou et al. 2019): continuous, unlike angles."""
    return rotations[:, :, :2].transpose(1, 2).flatten(1)


def rotation_of(six: Float[Tensor, "N 6"]) -> Float[Tensor, "N 3 3"]:
    """Gram-Schmidt on both columns."""
    x = functional.normalize(six[:, :3], dim=1)
    y = functional.normalize(six[:, 3:] - (x * six[:, 3:]).sum(1, keepdim=True) * x, dim=1)
    return torch.stack([x, y, torch.linalg.cross(x, y, dim=1)], 2)


def fit_body(
    body: SkinnedBody,
    start: Placed,
    mask: Float[Tensor, "S S"],
    predict: Predict | None,
    settings: BodyFit = BodyFit(),
    step: Step = no_step,
) -> tuple[Placed, dict[str, float]]:
    """The pose, shape and place whose silhouette is the mask and whose normals are those that `predict` says, and what
    the losses came to. Without `predict` only the silhouette counts. `mask` has `settings.size` pixels per side.

    Returns the best state met, never a worse one than the start.
    """
    topology = edge_topology(body.faces)
    free = torch.tensor([not name.startswith(settings.still) for name in body.bones])
    knees = torch.tensor([name in KNEES for name in body.bones])
    beginning = six_of(start.rotations)
    six = beginning.clone().requires_grad_()
    shape, shift = start.shape.clone().requires_grad_(), start.shift.clone().requires_grad_()
    growth = start.scale.new_zeros(()).requires_grad_()
    optimiser = torch.optim.Adam([six, shape, shift, growth], settings.rate, amsgrad=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=settings.patience, min_lr=settings.lowest_rate
    )
    rest, wanted = six_of(torch.eye(3)[None]), None
    best, best_loss, figures, begin = start, float("inf"), {}, time.monotonic()
    with torch.enable_grad():
        for i in range(settings.steps + 1):
            step("fit", i / max(settings.steps, 1))
            turns = rotation_of(torch.where(free[:, None], six, beginning))
            placed = Placed(shape, turns, start.scale * growth.exp(), shift)
            views = normal_views(
                placed.vertices(body), body.faces, settings.size, ("F", "B") if predict else ("F",),
                smooth=True, topology=topology,
            )  # fmt: skip
            terms = {"silhouette": (views["F"][3] - mask).abs().mean()}
            if predict is not None:
                if wanted is None or i % settings.every == 0:
                    with torch.no_grad():
                        wanted = predict({side: view[:3].detach() for side, view in views.items()})
                terms["front"] = (views["F"][:3] - wanted[0]).abs().mean()
                terms["back"] = (views["B"][:3] - wanted[1]).abs().mean()
            pull = settings.keep * (six - beginning).square().mean()
            pull = pull + settings.straight_legs * (six[knees] - rest).square().sum()
            pull = pull + 1e-4 * (shape - start.shape).square().mean()
            loss = torch.stack([*terms.values(), pull]).sum()
            if float(loss.detach()) < best_loss:
                best_loss, figures = float(loss.detach()), {name: float(term.detach()) for name, term in terms.items()}
                best = Placed(shape.detach().clone(), turns.detach(), placed.scale.detach(), shift.detach().clone())
            if i == settings.steps or (settings.seconds and time.monotonic() - begin > settings.seconds):
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            plateau.step(loss.detach())
    return best, figures


@dataclass(frozen=True)
class ClothFit:
    """Settings of the surface's fit, as published."""

    steps: int = 200
    rate: float = 1e-4
    patience: int = 5
    normals: float = 10.0
    stiffness: float = 1e5
    rigidity: float = 1e5
    laplacian: float = 100.0


def fit_cloth(
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    front: Float[Tensor, "3 S S"],
    back: Float[Tensor, "3 S S"],
    settings: ClothFit = ClothFit(),
    step: Step = no_step,
) -> tuple[Float[Tensor, "V 3"], Float[Tensor, "V 3 4"], list[float]]:
    """The surface bent until its normals are the predicted ones: an affine map [A | b] per vertex, stiff along edges
    and near to volume-preserving. In the network's frame. Returns vertices, maps, and the normals' error per step."""
    identity = torch.eye(3, 4).to(vertices)
    maps = identity.repeat(len(vertices), 1, 1).requires_grad_()
    edges = edge_topology(faces)[:, :2]
    degree = torch.zeros(len(vertices)).index_add(0, edges.flatten(), torch.ones(edges.numel())).clamp(min=1)
    optimiser = torch.optim.Adam([maps], settings.rate, amsgrad=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.1, patience=settings.patience)
    errors: list[float] = []
    moved = vertices
    with torch.enable_grad():
        for i in range(settings.steps + 1):
            step("fit", i / max(settings.steps, 1))
            moved = (maps[:, :, :3] @ vertices[:, :, None])[:, :, 0] + maps[:, :, 3]
            views = normal_views(moved, faces, front.shape[-1], ("F", "B"))
            error = (views["F"][:3] - front).abs().mean() + (views["B"][:3] - back).abs().mean()
            errors.append(float(error.detach()))
            if i == settings.steps:
                break
            stiff = (maps[edges[:, 0]] - maps[edges[:, 1]]).square().mean()
            rigid = (torch.linalg.det(maps[:, :, :3]) - 1).square().mean()
            a, b = edges.unbind(1)
            around = torch.zeros_like(moved).index_add(0, a, moved[b]).index_add(0, b, moved[a]) / degree[:, None]
            bumpy = torch.linalg.vector_norm(around - moved, dim=1).mean()
            loss = (settings.normals * error + settings.stiffness * stiff + settings.rigidity * rigid
                    + settings.laplacian * bumpy)  # fmt: skip
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            plateau.step(loss.detach())
    return moved.detach(), maps.detach(), errors
