# SPDX-License-Identifier: GPL-3.0-or-later
"""A photo of a person -> codes per part, pose and place before the camera, in one forward pass (E0 of E3DGE, Lan et al.
2023, adapted to parts and a skeleton).

The photo is cut out with the person's matte and squared about the person's box. Everything is seen from a camera at
the photo's own place that looks at the middle of that square; the photo's frame comes in once, in `Crop`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from backend.families.base import PersonPhoto
from backend.families.people.config import (
    BODY_DIM,
    BROW,
    CLOTH,
    CODE_DIM,
    IRIS,
    LOOSE,
    OWN,
    PARTS,
    PLAIN,
    SCALE,
    SKIN,
    SKIN_DIM,
    THICK,
    TRIM,
    WORN,
)
from backend.families.people.wardrobe import OPEN, SKIRT, STYLES
from backend.render.camera import Camera, perspective

SIZE = 160  # pixels of the encoder's square
MARGIN = 1.1  # its side over the longer side of the person's box
FOV_Y = math.radians(45)  # of photos that do not tell: the long side of a phone's or a 50 mm camera's picture, about
JOINTS = ("pelvis", "spine_01", "spine_02", "spine_03", "neck_01", "head", "clavicle_l", "clavicle_r", "upperarm_l",
          "upperarm_r", "lowerarm_l", "lowerarm_r", "hand_l", "hand_r", "thigh_l", "thigh_r", "calf_l", "calf_r",
          "foot_l", "foot_r")  # fmt: skip
PARTNERS = tuple(JOINTS.index(name[:-2] + {"_l": "_r", "_r": "_l"}.get(name[-2:], name[-2:])) for name in JOINTS)
WIDTHS = (32, 48, 96, 160, 256)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList((nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)))
        self.short = nn.Identity() if inside == outside and stride == 1 else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.short(x))


class PhotoEncoder(nn.Module):
    """Square [B, 4, SIZE, SIZE] (premultiplied sRGB and matte, 0..1) and its field of view [B, 1] -> named numbers."""

    def __init__(self, facts: Mapping[str, Any], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.layout = layout(facts)
        self.stem = nn.Conv2d(4, widths[0], 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages = [Block(a, b, 2) for a, b in itertools.pairwise(widths)]
        self.stages = nn.Sequential(*[m for s, w in zip(stages, widths[1:], strict=True) for m in (s, Block(w, w, 1))])
        self.squeeze = nn.Conv2d(widths[-1], 64, 1)
        cells = (SIZE // 32) ** 2
        self.head = nn.Sequential(nn.Linear(64 * cells + widths[-1] + 1, 512), nn.SiLU(),
                                  nn.Linear(512, sum(self.layout.values())))  # fmt: skip

    def forward(self, square: Float[Tensor, "B 4 S S"], fov: Float[Tensor, "B 1"]) -> dict[str, Float[Tensor, "B C"]]:
        x = F.relu(self.norm(self.stem(square * 2 - torch.tensor([1.0, 1, 1, 0])[:, None, None].to(square))))
        x = self.stages(x)
        flat = torch.cat([self.squeeze(x).flatten(1), x.mean((2, 3)), fov], 1)
        return dict(zip(self.layout, self.head(flat).split(list(self.layout.values()), 1), strict=True))


def layout(facts: Mapping[str, Any]) -> dict[str, int]:
    """What the encoder says, and in how many numbers."""
    out = {"turn": 6, "place": 3, "joints": 6 * len(JOINTS), "body/shape": BODY_DIM, "body/palette": 6}
    out |= {f"body/{name[:-1]}": len(facts[name]) for name in ("skins", "brows")} | {"body/iris": len(facts["irises"])}
    for part in PARTS:
        items = len(facts["items"][part]) + (part in CLOTH)
        out |= {f"{part}/worn": 1, f"{part}/item": items, f"{part}/cut": 6, f"{part}/palette": 6,
                f"{part}/looks": PLAIN + 1 - OWN, f"{part}/scale": 1}  # fmt: skip
    return out


def to_rotation(six: Float[Tensor, "... 6"]) -> Float[Tensor, "... 3 3"]:
    """Two columns of a rotation, not quite orthonormal -> the rotation (Zhou et al. 2019)."""
    a = F.normalize(six[..., :3], dim=-1)
    b = F.normalize(six[..., 3:] - a * (a * six[..., 3:]).sum(-1, keepdim=True), dim=-1)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def to_six(rotation: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 6"]:
    return torch.cat([rotation[..., :, 0], rotation[..., :, 1]], -1)


def joint_rotations(six: Float[Tensor, "B N"]) -> Float[Tensor, "B J 3 3"]:
    """Of JOINTS, parent-relative in world-aligned axes, from what the encoder adds to "not turned"."""
    rest = torch.tensor([1.0, 0, 0, 0, 1, 0]).to(six)
    return to_rotation(six.unflatten(1, (len(JOINTS), 6)) + rest)


def mirrored(said: Mapping[str, Float[Tensor, "B C"]]) -> dict[str, Float[Tensor, "B C"]]:
    """What is said of a square, as it would be of the square in a mirror; its own inverse."""
    signs = said["turn"].new_tensor([1.0, -1, -1, -1, 1, 1])  # of R's two columns in M R M, M = diag(-1, 1, 1)
    joints = said["joints"].unflatten(1, (len(JOINTS), 6))[:, PARTNERS] * signs
    return {**said, "turn": said["turn"] * signs, "joints": joints.flatten(1),
            "place": said["place"] * said["place"].new_tensor([-1.0, 1, 1])}  # fmt: skip


def write_codes(said: Mapping[str, Float[Tensor, "1 C"]], facts: Mapping[str, Any]) -> dict[str, Float[Tensor, "1 C"]]:
    """Codes of the likeliest person. What is not worn has none."""
    body = said["body/shape"].new_zeros(1, SKIN_DIM)
    body[:, :6] = said["body/palette"].clamp(0, 1)
    for name, at in (("skin", SKIN), ("brow", BROW), ("iris", IRIS)):
        body[0, at.start + int(said[f"body/{name}"].argmax())] = 1
    codes = {"body/shape": said["body/shape"].clone(), "body/tex": body}
    for part in PARTS:
        if float(said[f"{part}/worn"]) > 0 and facts["items"][part]:
            codes |= write_part(part, said, facts)
    return codes


def write_part(
    part: str, said: Mapping[str, Tensor], facts: Mapping[str, Any], item: int | None = None
) -> dict[str, Float[Tensor, "1 C"]]:
    """Codes of a part as said, with its likeliest item or a given one. Trims are said of what is cut alone: other items
    are worn as they were made, but the kit's skirt, which reaches the chin, as skirts are."""
    shape, tex = (said[f"{part}/item"].new_zeros(1, CODE_DIM) for _ in range(2))
    chosen = int(said[f"{part}/item"].argmax()) if item is None else item
    shape[0, chosen], shape[0, WORN] = 1, 1
    if part in CLOTH and chosen == said[f"{part}/item"].shape[1] - 1:
        shape[0, TRIM], shape[0, THICK], shape[0, LOOSE] = (*said[f"{part}/cut"][0].split([4, 1, 1]),)
    elif part in CLOTH:
        skirt = facts["items"][part][chosen]["name"] == SKIRT
        trims = STYLES[part]["skirt"][0].trims if skirt else OPEN[part]
        shape[0, TRIM.start : TRIM.start + len(trims)] = shape.new_tensor(trims)
    tex[0, :6] = said[f"{part}/palette"][0].clamp(-0.2, 1)
    tex[0, OWN + int(said[f"{part}/looks"].argmax())] = 1
    tex[0, SCALE] = said[f"{part}/scale"][0, 0]
    return {f"{part}/shape": shape, f"{part}/tex": tex}


@dataclass(frozen=True)
class Crop:
    """The square that the encoder sees, and the camera that would take it."""

    square: Float[Tensor, "4 S S"]  # premultiplied sRGB and matte
    seen: Float[Tensor, "1 S S"]  # 0 beyond the photo's edges
    fov: float  # radians, of the square seen head-on
    turn: Float[Tensor, "3 3"]  # from the square's camera to the photo's camera
    side: float  # pixels of the photo


def crop(photo: PersonPhoto, size: int = SIZE, fov_y: float | None = None) -> Crop:
    """The square about the person's box, resampled through both pinholes, so that a person at the rim of a wide photo
    is seen as if the camera had looked at them."""
    height, width = photo.rgba.shape[:2]
    fov_y = fov_of(photo) if fov_y is None else fov_y
    focal = 0.5 * height / math.tan(fov_y / 2)
    left, top, right, bottom = photo.box
    x, y = (left + right) / 2 - width / 2, height / 2 - (top + bottom) / 2
    turn = towards(torch.tensor([x, y, -focal]))
    half = MARGIN * max(right - left, bottom - top) / 2
    stretch = math.sqrt(focal**2 + x**2 + y**2)
    fov = 2 * math.atan(half / stretch)
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    tangent = math.tan(fov / 2)
    rows, columns = torch.meshgrid(-line * tangent, line * tangent, indexing="ij")
    rays = torch.stack([columns, rows, -torch.ones_like(rows)], -1) @ turn.T
    at = torch.stack([rays[..., 0] / -rays[..., 2] * focal / (width / 2),
                      -rays[..., 1] / -rays[..., 2] * focal / (height / 2)], -1)  # fmt: skip
    rgba = torch.from_numpy(np.ascontiguousarray(photo.rgba)).float().movedim(2, 0) / 255
    rgba = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])
    factor = max(1, int(2 * half / size))  # pixels of the photo that become one: averaged first, not skipped
    if factor > 1:
        rgba = F.avg_pool2d(rgba[None], factor, ceil_mode=True, count_include_pad=False)[0]
        at = at * at.new_tensor([width / (rgba.shape[2] * factor), height / (rgba.shape[1] * factor)]) + at.new_tensor(
            [width / (rgba.shape[2] * factor) - 1, height / (rgba.shape[1] * factor) - 1])  # fmt: skip
    square = F.grid_sample(rgba[None], at[None], align_corners=False)[0]
    seen = F.grid_sample(torch.ones_like(rgba[None, :1]), at[None], align_corners=False)[0]
    return Crop(square, seen, fov, turn, 2 * half)


def fov_of(photo: PersonPhoto) -> float:
    """Vertical field of view, radians: what the photo tells, or that of a usual camera by the picture's long side."""
    told = getattr(photo, "fov_y_rad", None)
    if told:
        return told
    height, width = photo.rgba.shape[:2]
    return 2 * math.atan(math.tan(FOV_Y / 2) * height / max(height, width))


def towards(direction: Float[Tensor, " 3"]) -> Float[Tensor, "3 3"]:
    """The shortest turn from -Z to a direction."""
    back = -F.normalize(direction.double(), dim=0)
    axis = torch.linalg.cross(back.new_tensor([0, 0, 1.0]), back)
    k = torch.zeros(3, 3, dtype=torch.float64)
    k[0, 1], k[0, 2], k[1, 0], k[1, 2], k[2, 0], k[2, 1] = -axis[2], axis[1], axis[2], -axis[0], -axis[1], axis[0]
    return (torch.eye(3, dtype=torch.float64) + k + k @ k / (1 + back[2])).float()


@dataclass(frozen=True)
class Placement:
    """Where a person in rest coordinates stands before the square's camera: camera = turn (p - pelvis) + shift."""

    turn: Float[Tensor, "3 3"]
    shift: Float[Tensor, " 3"]


def placement(said: Mapping[str, Tensor], fov: float) -> Placement:
    """`place`: where the pelvis is in the square (-1..1, y up), and the log of the metres across the square there."""
    u, v, log_across = said["place"][0].unbind()
    across = log_across.exp()
    shift = torch.stack([u * across / 2, v * across / 2, -across / (2 * math.tan(fov / 2))])
    return Placement(to_rotation(said["turn"][0]), shift)


def square_camera(place: Placement, pelvis: Float[Tensor, " 3"], fov: float) -> Camera:
    """The square's camera in the person's own space."""
    c2w = torch.eye(4)
    c2w[:3, :3] = place.turn.T
    c2w[:3, 3] = pelvis - place.turn.T @ place.shift
    return Camera(c2w, perspective(fov, 1.0, 0.2, 60.0))
