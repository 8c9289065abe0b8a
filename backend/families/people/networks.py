# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks of the `people` family: a mapping per code, a body decoder, and a local generator per part.

A local generator (SemanticHuman-HD's term) owns its volumes and answers, for one part, how far its surface is and what
colour it has. Everything is in canonical space: the mean body shared by all persons.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backend.families.people import cut
from backend.families.people.config import (
    ARM,
    BROW,
    BROWS,
    CLOTH,
    EYES,
    FACE,
    IRIS,
    LIPS,
    LOOSE,
    MOUTH,
    OWN,
    PATTERN,
    ROUGHNESS,
    SCALE,
    SKIN,
    THICK,
    TRIM,
    WET,
    WHOLE,
    Size,
)
from backend.networks.volumes import GridBank, PlaneBank, Side, Volume, read_grid, six_sides

FAR = 0.06  # metres: the distance a part reports where none of its volumes reaches
BAND = 0.03  # metres: distances are truncated to +-BAND
Guide = Callable[[Tensor], Tensor]  # points [N, 3] -> the direction that the body's surface faces there [N, 3]


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with SiLU between."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.SiLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


class Mapping(nn.Module):
    """z and condition -> w. Trained to transport the Gaussian onto the codes of sampled people.

    Some numbers of a code are choices (which garment, which pattern): `groups` of them end as near one-hot vectors,
    because half a shirt and half a coat is neither. Truncation pulls towards the nearest of real codes, the `centres`
    (multi-modal truncation, Mokady et al. 2022), and no farther from it than their neighbours lie.
    """

    def __init__(
        self, z_dim: int, condition_dim: int, w_dim: int, centres: int, groups: Sequence[tuple[int, int]], width: int
    ) -> None:
        super().__init__()
        self.net = mlp(z_dim + condition_dim, width, width, w_dim)
        self.skip = nn.Linear(z_dim, w_dim, bias=False)
        self.groups = tuple(groups)
        self.register_buffer("centres", torch.zeros(centres, w_dim))
        self.register_buffer("radii", torch.zeros(centres))  # spread of each cluster, in w
        self.register_buffer("scale", torch.ones(w_dim))  # spread of each number, for distances

    def raw(self, z: Float[Tensor, "B Z"], condition: Float[Tensor, "B A"]) -> Float[Tensor, "B W"]:
        """Before choices are made and truncation."""
        return self.skip(z) + self.net(torch.cat([z, condition], 1))

    def forward(
        self, z: Float[Tensor, "B Z"], condition: Float[Tensor, "B A"], truncation_psi: float = 1.0
    ) -> Float[Tensor, "B W"]:
        w = self.raw(z, condition)
        for begin, end in self.groups:
            choice = torch.softmax((w[:, begin:end] - w[:, begin:end].amax(1, keepdim=True)) / 0.02, 1)
            w = torch.cat([w[:, :begin], choice, w[:, end:]], 1)
        nearest = torch.cdist(w / self.scale, self.centres / self.scale).argmin(1)
        delta = w - self.centres[nearest]
        distance = (delta / self.scale).norm(dim=1, keepdim=True)
        within = (self.radii[nearest, None] / distance.clamp(min=1e-8)).clamp(max=1)
        w = self.centres[nearest] + truncation_psi * within * delta
        for begin, end in self.groups:
            w = torch.cat([w[:, :begin], (w[:, begin:end] > 0.5).to(w) + 0 * w[:, begin:end], w[:, end:]], 1)
        return w


@dataclass(frozen=True)
class Mixed:
    """One person's volumes of one part."""

    base: list[Tensor]  # per volume [1, X, Y, Z]
    edge: list[Tensor]


class LocalShape(nn.Module):
    """w_shape -> signed distance s of one part = max(surface, borders): the surface goes on where the cloth ends.

    Keeping surface and borders apart keeps hems crisp (each of both is smooth), and a mix of two garments has its
    hems in between.
    """

    def __init__(self, part: str, size: Size, items: int) -> None:
        super().__init__()
        self.part, self.items = part, items
        self.cloth = part in CLOTH
        self.base = nn.ModuleList(GridBank(g.volume, items, g.step) for g in size.shape[part])
        self.edge = nn.ModuleList(GridBank(g.volume, items, g.edge_step) for g in size.shape[part])

    def mixed(self, w: Float[Tensor, "1 W"]) -> Mixed:
        a = w[0, : self.items]
        return Mixed([bank(a) for bank in self.base], [bank(a) for bank in self.edge])

    def forward(
        self, mixed: Mixed, w: Float[Tensor, "1 W"], points: Float[Tensor, "N 3"], body: Float[Tensor, " N"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Distance to the surface and to the borders at points with distance `body` to the naked body; FAR where no
        volume reaches."""
        base, edge, held = _blend(self.base, points, lambda i, at: torch.cat(
            [read_grid(mixed.base[i], at), read_grid(mixed.edge[i], at)], 1)).split((1, 1, 1), 1)  # fmt: skip
        base, edge, held = base[:, 0], edge[:, 0], held[:, 0] > 0
        if self.cloth:
            loose = 0.05 * w[0, LOOSE] * cut.slack(self.part, points)
            base = base + w[0, self.items] * body - 0.01 * w[0, THICK] - loose
            edge = torch.maximum(edge - BAND * w[0, self.items], cut.borders(self.part, w[0, TRIM], points))
        return torch.where(held, base, FAR), torch.where(held, edge, FAR)


def _blend(banks: nn.ModuleList, points: Tensor, read: Callable[[int, Tensor], Tensor]) -> Float[Tensor, "N C+1"]:
    """Values of the volumes that hold each point, window-weighted; the last column is 0 where there is none."""
    out = total = None
    for i, bank in enumerate(banks):
        local = bank.volume.local(points)
        inside = (local.abs() < 1).all(-1).nonzero().squeeze(1)
        local = local[inside]
        weight = bank.volume.window(local)[:, None] + 1e-6
        values = read(i, local) * weight
        if out is None:
            out, total = values.new_zeros(len(points), values.shape[1]), values.new_zeros(len(points), 1)
        out, total = out.index_add(0, inside, values), total.index_add(0, inside, weight)
    return torch.cat([out / total.clamp(min=1e-12), total], 1)


class ColorBank(nn.Module):
    """Colour planes in several volumes, blended where they overlap."""

    def __init__(self, boxes: Sequence[tuple[Volume, Sequence[Side]]], rank: int, channels: int) -> None:
        super().__init__()
        self.boxes = nn.ModuleList(PlaneBank(volume, sides, rank, channels) for volume, sides in boxes)

    def mixed(self, a: Float[Tensor, " J"]) -> list[list[Tensor]]:
        return [box(a) for box in self.boxes]

    def forward(
        self, planes: list[list[Tensor]], points: Float[Tensor, "N 3"], facing: Float[Tensor, "N 3"]
    ) -> Float[Tensor, "N C"]:
        """Values at points on surfaces that face `facing`; 0 where no volume reaches."""
        if len(self.boxes) == 1:
            volume = self.boxes[0].volume
            return self.boxes[0].read(planes[0], volume.local(points), volume.turned(points, facing))

        out = points.new_zeros(len(points), planes[0][0].shape[0])
        total = points.new_zeros(len(points), 1)
        for box, mixed in zip(self.boxes, planes, strict=True):
            local = box.volume.local(points)
            at = (local.abs() < 1).all(-1).nonzero().squeeze(1)
            weight = box.volume.window(local[at])[:, None] + 1e-6
            values = box.read(mixed, local[at], box.volume.turned(points[at], facing[at])) * weight
            out, total = out.index_add(0, at, values), total.index_add(0, at, weight)
        return out / total.clamp(min=1e-12)


class LocalTexture(nn.Module):
    """(w_shape, w_tex) -> sRGB colour of one part: (1 + tone) * palette + own * hue.

    The palette (first six numbers of w_tex: two colours) is not learned, so a garment's colour is a number that users
    can set, and a new texture cannot move a seam. Patterns mix the two colours by functions of the canonical point.
    """

    def __init__(self, part: str, size: Size, items: int) -> None:
        super().__init__()
        self.part, self.items = part, items
        self.tone = ColorBank([(c.volume, c.tone) for c in size.tex[part]], items, 1)
        self.hue = ColorBank([(c.volume, c.hue) for c in size.tex[part]], items, 3)

    def mixed(self, w_shape: Float[Tensor, "1 W"], w_tex: Float[Tensor, "1 W"]) -> tuple[list, list]:
        a = w_shape[0, : self.items]
        return self.tone.mixed(a), self.hue.mixed(a * w_tex[0, OWN])

    def forward(
        self, mixed: tuple[list, list], w: Float[Tensor, "1 W"], points: Float[Tensor, "N 3"], facing: Tensor
    ) -> Float[Tensor, "N 3"]:
        """Colours in 0..1 (not clamped)."""
        mask = points.new_zeros(len(points))
        for weight, name in zip(w[0, PATTERN], cut.PATTERNS, strict=True):
            if weight.requires_grad or abs(float(weight.detach())) > 1e-3:
                mask = mask + weight * cut.pattern_mask(name, points, w[0, SCALE])
        mask = mask.clamp(0, 1)[:, None]
        color = (1 - mask) * w[0, :3] + mask * w[0, 3:6]
        color = (1 + self.tone(mixed[0], points, facing)) * color
        if w.requires_grad or float(w[0, OWN].detach()) != 0:
            color = color + self.hue(mixed[1], points, facing)
        return color


class BodyTexture(nn.Module):
    """w_tex of the body -> sRGB colour of skin, brows and eyes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        skins = 1 + SKIN.stop - SKIN.start
        boxes = [(FACE, size.face), (ARM, six_sides(size.arm)), (WHOLE, six_sides(size.skin))]
        self.skin = ColorBank(boxes, skins, 3)
        self.brow = PlaneBank(BROWS, (Side(2, 1, size.brow),), 1 + BROW.stop - BROW.start, 1)
        self.iris = PlaneBank(EYES, (Side(2, 1, size.eye),), IRIS.stop - IRIS.start, 3)
        self.eye = PlaneBank(EYES, (Side(2, 1, size.eye),), 1, 1)  # how much of a texel is eyeball

    def mixed(self, w: Float[Tensor, "1 W"]) -> tuple[list, list, list, list]:
        one = w.new_ones(1)
        return (self.skin.mixed(torch.cat([one, w[0, SKIN]])), self.brow(torch.cat([one, w[0, BROW]])),
                self.iris(w[0, IRIS]), self.eye(one))  # fmt: skip

    def forward(
        self,
        mixed: tuple[list, list, list, list],
        w: Float[Tensor, "1 W"],
        points: Float[Tensor, "N 3"],
        facing: Tensor,
    ) -> Float[Tensor, "N 3"]:
        """Colours in 0..1 (not clamped)."""
        skin, brow, iris, eye = mixed
        out = (1 + self.skin(skin, points, facing)) * w[0, :3]
        out = self._over(out, self.brow, BROWS, points, lambda local: (
            0.75 * self.brow.read(brow, local, local).clamp(0, 1), w[0, 3:6].expand(len(local), 3)))  # fmt: skip
        return self._over(out, self.eye, EYES, points, lambda local: (
            self.eye.read(eye, local, local).clamp(0, 1), self.iris.read(iris, local, local)))  # fmt: skip

    def roughness(self, mixed: tuple[list, list, list, list], points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Of skin, lips and the wet eyeballs."""
        (x, y), (wide, high) = MOUTH
        lips = 1.5 - ((points[:, 0] - x) / wide) ** 2 - ((points[:, 1] - y) / high) ** 2
        lips = torch.where(points[:, 2] > 0.1, lips.clamp(0, 1), 0.0)
        out = (ROUGHNESS["body"] + lips * (LIPS - ROUGHNESS["body"]))[:, None]
        wet = out.new_tensor([[WET]])
        return self._over(out, self.eye, EYES, points, lambda local: (
            self.eye.read(mixed[3], local, local).clamp(0, 1), wet.expand(len(local), 1)))[:, 0]  # fmt: skip

    @staticmethod
    def _over(out: Tensor, bank: PlaneBank, volume: Volume, points: Tensor, layer: Callable) -> Tensor:
        local = volume.local(points)
        at = (local.abs() < 1).all(-1).nonzero().squeeze(1)
        if not at.numel():
            return out
        alpha, color = layer(local[at])
        return out.index_copy(0, at, out[at] * (1 - alpha) + alpha * color)


class BodyField(nn.Module):
    """The naked canonical body: its distance, and the direction that its smoothed surface faces."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.distance = nn.ModuleList(GridBank(volume, 1, step) for volume, step in size.body)
        self.guide = nn.ModuleList(GridBank(volume, 3, step) for volume, step in size.guide)

    @staticmethod
    def _finest(banks: nn.ModuleList, points: Tensor) -> Float[Tensor, "N C"]:
        """Values from the finest grid that holds each point."""
        out = read_grid(banks[0].basis, banks[0].volume.local(points))
        for bank in list(banks)[1:]:
            local = bank.volume.local(points)
            inside = (local.abs() < 1).all(1).nonzero().squeeze(1)
            out = out.index_copy(0, inside, read_grid(bank.basis, local[inside]))
        return out

    def forward(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Signed distance, metres."""
        return self._finest(self.distance, points)[:, 0]

    def facing(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Unit directions away from the body."""
        d = self._finest(self.guide, points)
        d = torch.cat([d[:, :1] * torch.where(points[:, :1] < 0, -1.0, 1.0), d[:, 1:]], 1)
        return d / d.norm(dim=1, keepdim=True).clamp(min=1e-6)


class BodyDecoder(nn.Module):
    """w_shape of the body -> displacement of the control points, and the joints: a linear decoder."""

    def __init__(self, anchors: int, joints: int, controls: int, dim: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.register_buffer("basis", torch.zeros(dim, anchors + joints, 3))
        self.register_buffer("rest", torch.zeros(anchors + joints, 3))
        self.register_buffer("control_index", torch.zeros(controls, 4, dtype=torch.int32))  # each the mean of 4 anchors

    def rest_controls(self) -> Float[Tensor, "P 3"]:
        """Control points on the canonical body, metres."""
        return self.rest[self.control_index.long()].mean(1)

    def forward(self, w: Float[Tensor, "1 W"]) -> tuple[Float[Tensor, "P 3"], Float[Tensor, "J 3"]]:
        """Displacements of the control points and positions of the joints, metres."""
        delta = torch.einsum("w,wpc->pc", w[0], self.basis)
        return delta[self.control_index.long()].mean(1), (self.rest + delta)[self.anchors :]
