# SPDX-License-Identifier: GPL-3.0-or-later
"""Colours of a person: the field's own, and those of its front and back view after the refine net.

Published: every vertex takes the colour of the nearest point that either view met (`nearest`). Ours: the views count
where they look straight on, and the field fills what they graze or do not see, after its colours have been given the
mean and spread that the views have along the seam (`blend`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional

from backend.families.get3dhuman.networks import RefineNet
from backend.families.get3dhuman.tracer import Occupancy, View, rotation, trace, trace_quickly

Colors = Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 3"]]
"""ndc (y down) -> sRGB in 0..1."""

ANGLES = (math.pi, 0.0)  # the order of the published run
NEAREST = 2 * 0.154  # depth from which on a pixel becomes a point of the published look
WIDENED = 512 / 4  # pictures are so many times as wide as what their mask is widened by
SHARPNESS = 2  # a view counts with cosine^SHARPNESS
GRAZING = 0.3  # cosine below which a view is smeared: the seam
BEHIND = 0.02  # ndc that a point may lie off the surface that a view met


@dataclass(frozen=True)
class Picture:
    """One view and its refined picture."""

    view: View
    traced: Float[Tensor, "N N 3"]  # colours of the field on white
    refined: Float[Tensor, "N N 3"]
    facing: Float[Tensor, "N N"]  # cosine between surface and view; 0 where nothing or an edge was met


def look(
    occupancy: Occupancy, colors: Colors, refine: RefineNet, size: int, angle: float, like: Tensor, exact: bool = False
) -> Picture:
    """Trace, colour and refine one view. `exact` traces as published, which takes ten times as long."""
    view = (trace if exact else trace_quickly)(occupancy, size, angle, like)
    traced = paint(view, colors)
    with torch.no_grad():
        refined = refine(traced.movedim(2, 0)[None])[0].movedim(0, 2)
    return Picture(view, traced, refined, facing(view))


def paint(view: View, colors: Colors) -> Float[Tensor, "N N 3"]:
    """Colours at the kept points within the mask, which is widened by a square, 4 x 4 in the published pictures of 512
    pixels and as much of a person in others; white elsewhere."""
    side = max(1, round(len(view.mask) / WIDENED))
    margin = (side // 2, (side - 1) // 2) * 2
    wide = functional.max_pool2d(functional.pad(view.mask[None, None].float(), margin), side, 1)[0, 0] > 0
    picture = torch.ones_like(view.points)
    picture[wide] = colors(view.ndc[wide])
    return picture


def facing(view: View) -> Float[Tensor, "N N"]:
    """Cosine between the surface's normal and the line of sight, from central differences of the depth."""
    pitch = 2 / (len(view.depth) - 1)
    depth = functional.pad(view.depth[None, None], (1, 1, 1, 1), value=torch.inf)[0, 0]
    across = (depth[1:-1, 2:] - depth[1:-1, :-2]) / (2 * pitch)
    down = (depth[2:, 1:-1] - depth[:-2, 1:-1]) / (2 * pitch)
    cosine = (1 + across**2 + down**2).rsqrt().nan_to_num(0.0)
    return torch.where(view.mask, cosine, 0.0)


class BlendedColors:
    """Field colours with the refined views blended in."""

    def __init__(self, field: Colors, pictures: list[Picture]) -> None:
        self.field, self.pictures = field, pictures
        self.gain, self.shift = self._match()

    def __call__(self, ndc: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        color = self.field(ndc) * self.gain + self.shift
        places = ndc * ndc.new_tensor([1, -1, 1])
        for picture in self.pictures:
            seen, weight = _read(picture, places)
            color = color + weight[:, None] * (seen - color)
        return color.clamp(0, 1)

    def _match(self) -> tuple[Float[Tensor, " 3"], Float[Tensor, " 3"]]:
        """What gives the field the mean and spread that the refined views have where they graze."""
        refined, own = self.seam()
        if len(refined) < 2:
            return torch.ones_like(refined[:1].sum(0)), torch.zeros_like(refined[:1].sum(0))
        gain = ((refined.std(0) + 1e-3) / (own.std(0) + 1e-3)).clamp(0.5, 2.0)
        return gain, refined.mean(0) - gain * own.mean(0)

    def seam(self) -> tuple[Float[Tensor, "M 3"], Float[Tensor, "M 3"]]:
        """Refined colours and colours of the field in the strip that the views graze: where the original smears."""
        strips = [(p, (p.facing > 0) & (p.facing < GRAZING)) for p in self.pictures]
        return torch.cat([p.refined[at] for p, at in strips]), torch.cat([p.traced[at] for p, at in strips])

    def seam_difference(self) -> tuple[float, float]:
        """Distance of the mean colours of views and field along the seam, before and after the match."""
        refined, own = self.seam()
        if not len(refined):
            return 0.0, 0.0
        after = own * self.gain + self.shift
        return float((refined.mean(0) - own.mean(0)).norm()), float((refined.mean(0) - after.mean(0)).norm())


def _read(picture: Picture, places: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, "N 3"], Float[Tensor, " N"]]:
    """The refined colour where a view shows these places, and how much it counts there."""
    in_view = places @ rotation(picture.view.angle, places).T
    at = (in_view[:, :2] * in_view.new_tensor([1, -1]))[None, None]
    near = functional.grid_sample(picture.view.depth[None, None], at, "nearest", align_corners=True)[0, 0, 0]
    visible = (near - (1 - in_view[:, 2])).abs() < BEHIND
    maps = torch.cat([picture.refined, picture.facing[..., None]], 2).movedim(2, 0)
    color, cosine = functional.grid_sample(maps[None], at, align_corners=True)[0, :, 0].T.split([3, 1], 1)
    return color, torch.where(visible, cosine[:, 0].clamp(0, 1) ** SHARPNESS, 0.0)


class NearestColors:
    """The published look: the refined colour of the nearest point that a view met."""

    def __init__(self, pictures: list[Picture]) -> None:
        masks = [body(picture.view) for picture in pictures]
        self.tree = cKDTree(torch.cat([p.view.points[m] for p, m in zip(pictures, masks)]).cpu().numpy())
        self.colors = torch.cat([p.refined[m] for p, m in zip(pictures, masks)])

    def __call__(self, ndc: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        places = ndc * ndc.new_tensor([1, -1, 1])
        nearest = torch.from_numpy(self.tree.query(places.detach().cpu().numpy())[1])
        return self.colors[nearest.to(self.colors.device)]


def body(view: View) -> Bool[Tensor, "N N"]:
    """Pixels that become points of the published look."""
    return view.mask & (view.depth > NEAREST)


def colored_obj(
    vertices: Float[Tensor, "V 3"], faces: Float[Tensor, "F 3"], colors: Float[Tensor, "V 3"]
) -> str:
    """The published file: "v x y z r g b" and faces, no uvs."""
    lines = [f"v {x:.6f} {y:.6f} {z:.6f} {r:.4f} {g:.4f} {b:.4f}"
             for (x, y, z), (r, g, b) in zip(vertices.tolist(), colors.tolist())]  # fmt: skip
    return "\n".join([*lines, *(f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces.tolist()), ""])
