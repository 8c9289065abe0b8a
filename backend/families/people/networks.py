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
from torch.nn import functional as F

from backend.families.people import cut
from backend.families.people.config import (
    ARM,
    BROW,
    BROWS,
    CLOTH,
    EYES,
    FACE,
    FRONT,
    IRIS,
    LASHES,
    LOOSE,
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
        self.register_buffer("materials", torch.zeros(items + self.cloth, 2))  # roughness and metallic of each item

    def material(self, w: Float[Tensor, "1 W"]) -> Float[Tensor, " 2"]:
        """Roughness and metallic of the mix of items."""
        share = w[0, : len(self.materials)].clamp(min=0)
        return share @ self.materials / share.sum().clamp(min=1e-6)

    def mixed(self, w: Float[Tensor, "1 W"]) -> Mixed:
        a = w[0, : self.items]
        return Mixed([bank(a) for bank in self.base], [_smooth(bank(a)) for bank in self.edge])

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


def _smooth(grid: Float[Tensor, "1 X Y Z"]) -> Float[Tensor, "1 X Y Z"]:
    """A binomial filter along each axis: which side of a border a node is on is uncertain near folded collars."""
    out = F.pad(grid[None], (1,) * 6, mode="replicate")
    for axis in (2, 3, 4):
        n = out.shape[axis]
        low, middle, high = (out.narrow(axis, k, n - 2) for k in range(3))
        out = 0.25 * low + 0.5 * middle + 0.25 * high
    return out[0]


def _blend(banks: nn.ModuleList, points: Tensor, read: Callable[[int, Tensor], Tensor]) -> Float[Tensor, "N C+1"]:
    """Values of the volumes that hold each point, later ones over earlier ones; the last column is 0 where there is
    none."""
    out = held = None
    for i, bank in enumerate(banks):
        local = bank.volume.local(points)
        inside = (local.abs() < 1).all(-1).nonzero().squeeze(1)
        local = local[inside]
        values = read(i, local)
        if out is None:
            out, held = values.new_zeros(len(points), values.shape[1]), values.new_zeros(len(points), 1)
        out, held = _lay(out, held, inside, values, bank.volume.window(local)[:, None])
    return torch.cat([out, held], 1)


def _lay(out: Tensor, held: Tensor, at: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`values` over `out` at rows `at`, as far as their weight goes; alone where nothing was held before."""
    below = held[at] * (1 - weight)
    weight = weight + 1e-6
    mixed = (out[at] * below + values * weight) / (below + weight)
    return out.index_copy(0, at, mixed), held.index_copy(0, at, torch.ones_like(below))


class ColorBank(nn.Module):
    """Colour planes in several volumes, coarse to fine; the finer one counts where several hold a point."""

    def __init__(self, boxes: Sequence[tuple[Volume, Sequence[Side]]], rank: int, channels: int) -> None:
        super().__init__()
        self.boxes = nn.ModuleList(PlaneBank(volume, sides, rank, channels) for volume, sides in boxes)

    def mixed(self, a: Float[Tensor, " J"]) -> list[list[Tensor]]:
        return [box(a) for box in self.boxes]

    def forward(
        self, planes: list[list[Tensor]], points: Float[Tensor, "N 3"], facing: Float[Tensor, "N 3"]
    ) -> Float[Tensor, "N C"]:
        """Values at points on surfaces that face `facing`, later volumes over earlier ones; 0 where none reaches."""
        out = points.new_zeros(len(points), planes[0][0].shape[0])
        held = points.new_zeros(len(points), 1)
        for box, mixed in zip(self.boxes, planes, strict=True):
            local = box.volume.local(points)
            turned = box.volume.turned(points, facing)
            weight = (local.abs() < 1).all(-1) * box.volume.window(local) * box.coverage(turned)
            at = (weight > 0).nonzero().squeeze(1)
            if at.numel():
                values = box.read(mixed, local[at], turned[at])
                out, held = _lay(out, held, at, values, weight[at, None])
        return out


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
        self.register_buffer("palettes", torch.zeros(items, OWN))  # of the kit's own colours

    def palette(self, w_shape: Float[Tensor, "1 W"], w_tex: Float[Tensor, "1 W"]) -> Float[Tensor, "1 6"]:
        """The palette that the items' own colours are relative to; that of w_tex where no item is worn."""
        share = w_shape[:, : self.items].clamp(min=0)
        return share @ self.palettes + (1 - share.sum(1, keepdim=True)).clamp(min=0) * w_tex[:, :OWN]

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


def skin_boxes(size: Size) -> list[tuple[Volume, Sequence[Side]]]:
    """Volumes of the skin's colour, coarse to fine."""
    return [(WHOLE, six_sides(size.skin)), (ARM, six_sides(size.arm)), (FACE, size.face),
            (FRONT, (Side(2, 1, size.front),))]  # fmt: skip


class BodyTexture(nn.Module):
    """w_tex of the body -> sRGB colour of skin, brows and eyes: shares of those of the training data."""

    def __init__(self, size: Size, skins: int, brows: int, irises: int) -> None:
        super().__init__()
        self.skin = ColorBank(skin_boxes(size), skins, 3)
        self.brow = PlaneBank(BROWS, (Side(2, 1, size.brow),), brows, 1)
        self.iris = PlaneBank(EYES, (Side(2, 1, size.eye),), irises, 3)
        self.gloss = PlaneBank(FRONT, (Side(2, 1, size.gloss),), 1, 1)  # how much rougher the face is than the body
        self.lash = PlaneBank(EYES, (Side(2, 1, size.eye),), 1, 1)  # line of the lashes, and their shadow on the eye
        self.eye = PlaneBank(EYES, (Side(2, 1, size.eye),), 1, 1)  # how much of a texel is eyeball

    def mixed(self, w: Float[Tensor, "1 W"]) -> tuple[list, list, list, list]:
        skin, brow, iris = (w[0, at.start : at.start + len(planes[0])] for at, planes in (
            (SKIN, self.skin.boxes[0].planes), (BROW, self.brow.planes), (IRIS, self.iris.planes)))  # fmt: skip
        return self.skin.mixed(skin), self.brow(brow), self.iris(iris), self.eye(w.new_ones(1))

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
            0.9 * self.brow.read(brow, local, local).clamp(0, 1), w[0, 3:6].expand(len(local), 3)))  # fmt: skip
        out = self._over(out, self.eye, EYES, points, lambda local: (
            self.eye.read(eye, local, local).clamp(0, 1), self.iris.read(iris, local, local)))  # fmt: skip
        lash, color = self.lash(w.new_ones(1)), w.new_tensor(LASHES)
        return self._over(out, self.lash, EYES, points, lambda local: (
            self.lash.read(lash, local, local).clamp(0, 1), color.expand(len(local), 3)))  # fmt: skip

    def roughness(self, mixed: tuple[list, list, list, list], points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Of skin, lips and the wet eyeballs."""
        local = FRONT.local(points)
        share = ((local.abs() < 1).all(-1) * FRONT.window(local))[:, None]
        out = ROUGHNESS["body"] + share * self.gloss.read(self.gloss(share.new_ones(1)), local, local.new_tensor(
            [0.0, 0.0, 1.0]).expand_as(local))  # fmt: skip
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
