# SPDX-License-Identifier: GPL-3.0-or-later
"""Colours of the surface: large pictures of a few views, brought back onto what each of them sees.

The field's own colours are those of the 64 x 64 picture. The detail is in the decoder, which only makes pictures; so
the front and both sides are decoded, and the photo itself stands for its own view. What nobody sees, such as the ears'
backs, has the field's colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from backend.families.e3dge.camera import Cameras
from backend.families.e3dge.config import AZIMUTH_STD, FAR, NEAR
from backend.families.e3dge.generator import Field, View
from backend.families.e3dge.inversion import Codes, E3dge, Seen

ANGLES = ((0.0, 0.0), (0.5, 0.0), (-0.5, 0.0))  # azimuth, elevation: the sides at the rim of what was trained
PHOTO = 6.0  # times as much as a decoded view: what the photo shows stays the photo's
OWN = 0.02  # of the field's colour
SHARPNESS = 3  # power of the cosine between the surface and the view
CHUNK = 1 << 15


@dataclass(frozen=True)
class Picture:
    """One view: its colours, how deep it sees, and how much each of its pixels counts."""

    cameras: Cameras
    rgb: Float[Tensor, "1 3 H W"]  # 0..1
    depth: Float[Tensor, "1 1 h w"]
    weight: Float[Tensor, "1 1 h w"]
    reach: float  # depth by which a point may lie behind what is seen

    def read(self, points: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N 1"]]:
        """Colours at points of the world and their weights, 0 where they are hidden."""
        xy = self.cameras.project(points[None])[:, :, None]

        def at(values: Tensor) -> Tensor:
            found = functional.grid_sample(values, xy, padding_mode="border", align_corners=False)
            return found[0, :, :, 0].T

        w2c = self.cameras.w2c[0]
        behind = -(points @ w2c[2, :3] + w2c[2, 3])[:, None] - at(self.depth)
        inside = (xy[0].abs() <= 1).all(-1)
        return at(self.rgb), at(self.weight) * (2 - behind / self.reach).clamp(0, 1) * inside


class Looks:
    """All views of a person; made when a colour is first asked for."""

    @torch.no_grad()
    def __init__(self, net: E3dge, codes: Codes, seen: Seen | None, photo: Float[Tensor, "1 4 H W"] | None) -> None:
        """`photo`: what stands for its own view, 0..1 with its matte."""
        self.field, self.ws = net.generator.field, codes.renderer
        self.pictures = []
        like = codes.renderer
        for angles in ANGLES:
            cameras = net.cameras(like.new_tensor([angles]))
            view = net.render(codes, cameras) if seen is None else net.render_detail(codes, cameras, seen)[0]
            rgb = ((net.picture(view, codes) + 1) / 2).clamp(0, 1)
            weight = facing(view) * math.exp(-0.5 * (angles[0] / (2 * AZIMUTH_STD)) ** 2)
            self.pictures.append(Picture(cameras, rgb, view.depth, weight, _reach(net)))
        if seen is not None and photo is not None:
            view = net.render(codes, seen.cameras)
            matte = functional.interpolate(photo[:, 3:], view.depth.shape[2:], mode="area")
            matte = -functional.max_pool2d(-matte, 3, 1, 1)  # the background bleeds into the outline
            weight = PHOTO * facing(view) * (matte > 0.99)
            self.pictures.append(Picture(seen.cameras, photo[:, :3], view.depth, weight, _reach(net)))

    @torch.no_grad()
    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """sRGB at points of the world near the surface."""
        found = [self._color(chunk) for chunk in points.split(CHUNK)]
        return torch.cat(found) if found else points

    @torch.no_grad()
    def shown(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """How far the colours at points are the photo's own pixels, 0..1."""
        weights = [picture.read(points)[1][:, 0] for picture in self.pictures]
        others = OWN + torch.stack(weights[: len(ANGLES)]).sum(0)
        mine = weights[len(ANGLES)] if len(weights) > len(ANGLES) else torch.zeros_like(others)
        return mine / (mine + others)

    def _color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        own = own_color(self.field, self.ws, points)
        total, weights = OWN * own, torch.full_like(points[:, :1], OWN)
        for picture in self.pictures:
            rgb, weight = picture.read(points)
            total, weights = total + weight * rgb, weights + weight
        return total / weights


def own_color(field: Field, ws: Float[Tensor, "1 L W"], points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """The field's colours, seen along the axis of the camera."""
    ahead = points.new_tensor([0.0, 0.0, -1.0]).expand_as(points)[None]
    return torch.sigmoid(field.rgb_linear(field.texture(field.hidden(points[None], ws), ahead, ws)))[0]


def facing(view: View) -> Float[Tensor, "1 1 h w"]:
    """How squarely each pixel's surface faces the camera, cos^SHARPNESS; 0 at the background and beside it."""
    xyz = view.xyz
    padded = functional.pad(xyz, (1, 1, 1, 1), mode="replicate")
    along, down = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2], padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    normal = functional.normalize(torch.linalg.cross(along, down, dim=1), dim=1)
    towards = functional.normalize(view.points[:, :, :, 0] - view.points[:, :, :, -1], dim=-1).permute(0, 3, 1, 2)
    cosine = (normal * towards).sum(1, keepdim=True).abs()
    near = -functional.max_pool2d(-view.foreground.to(xyz), 3, 1, 1)
    return cosine**SHARPNESS * near


def _reach(net: E3dge) -> float:
    return 2 * (FAR - NEAR) / net.config.samples
