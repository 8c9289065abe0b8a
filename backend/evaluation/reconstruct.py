# SPDX-License-Identifier: GPL-3.0-or-later
"""How near can a family come to a person it never saw? Codes are fitted to the person's visible surface.

Points p of the person are carried back into the field's space, x + offset(x) = p, by iteration. There the field should
be 0 at x, +d at the point d in front of it and -d behind it, show the colour and the part seen, and be positive where
some view sees through. The body comes first (skin points lie on it, all others outside of it), then every part worn
starts from the best of a bank of the family's own samples, then all codes move together, held by the spread of the
bank. Adam throughout. Every step is differentiable in the codes: dx = -d offset, to first order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from backend.evaluation.portraits import PARTS
from backend.families.base import FamilyModel, HumanField, Latents

log = logging.getLogger(__name__)


POOL = 16_384  # points of the surface that are looked at, and half as many in the air
POINTS = 2048  # per step
SOLES = 0.015  # metres: families stand barefoot at 0, people on their soles; the fit finds how thick those are
REFRESH = 25  # steps after which the pool is carried back anew
SHELL = 0.008  # metres in front of and behind the surface
SOLVE = 5  # iterations of the pull-back: offsets are smooth, each one divides the error by several


@dataclass(frozen=True)
class Target:
    """What is known of the person."""

    points: Float[Tensor, "N 3"]  # person space
    normals: Float[Tensor, "N 3"]
    colors: Float[Tensor, "N 3"]  # sRGB 0..1
    labels: Int[Tensor, " N"]  # index into PARTS
    empty: Float[Tensor, "M 3"]  # points that some view sees through

    @property
    def worn(self) -> list[str]:
        """Parts that show: at least one point in 300."""
        share = torch.bincount(self.labels, minlength=len(PARTS)) / len(self.labels)
        return [p for i, p in enumerate(PARTS) if i and share[i] > 1 / 300]


@dataclass(frozen=True)
class Steps:
    """How long to look."""

    body: int = 100
    parts: int = 150
    rate: float = 0.03
    prior: float = 3e-4


def pull_back(field: HumanField, points: Float[Tensor, "N 3"], start: Tensor | None = None) -> Float[Tensor, "N 3"]:
    """Field-space points x with x + offset(x) = points, metres. From a `start` near by one step is enough. The last
    step keeps the gradient of offset."""
    x = points if start is None else start
    with torch.no_grad():
        for _ in range(SOLVE if start is None else 0):
            x = points - field.offset(x)
    return points - field.offset(x.detach())


class Fit:
    """One reconstruction: codes, and the height of the person's floor in the field's person space."""

    def __init__(self, model: FamilyModel, target: Target, bank: Sequence[Latents], seed: int = 0) -> None:
        self.model, self.bank = model, bank
        self.random = torch.Generator().manual_seed(seed)
        some, free = (torch.randperm(n, generator=self.random)[:most]
                      for n, most in ((len(target.points), POOL), (len(target.empty), POOL // 2)))  # fmt: skip
        self.target = Target(target.points[some], target.normals[some], target.colors[some], target.labels[some],
                             target.empty[free])  # fmt: skip
        self.home, self.air = self.target.points, self.target.empty  # the same in the field's space, more or less
        self.codes: dict[str, Tensor] = {}
        self.lift = torch.zeros(1)
        self.spread: dict[str, tuple[Tensor, Tensor]] = {}
        for name in sorted({k for latents in bank for k in latents.codes}):
            rows = torch.cat([latents.codes[name] for latents in bank if name in latents.codes]).detach().cpu()
            deviation = rows.std(0, correction=0) if len(rows) > 1 else torch.ones(rows.shape[1])
            self.spread[name] = rows.mean(0), deviation.clamp(min=0.05 * float(deviation.max()) + 1e-6)

    def run(self, steps: Steps) -> Latents:
        """The codes found."""
        begin = time.perf_counter()
        self._start_body()
        self._optimise(["body/shape"], steps.body, steps, self._body_loss)
        self._start_parts()
        self._optimise(sorted(self.codes), steps.parts, steps, self._whole_loss)
        log.info("fitted in %.1f s", time.perf_counter() - begin)
        return self.latents()

    def latents(self, *parts: str) -> Latents:
        """Of these parts only, if any are named."""
        chosen = {k: v for k, v in self.codes.items() if not parts or k.partition("/")[0] in parts}
        return Latents(self.bank[0].family, chosen)

    def field(self, *parts: str) -> HumanField:
        return self.model.decode(self.latents(*parts))[0]

    def _draw(self, count: int, of: Int[Tensor, " M"] | None = None) -> Int[Tensor, " K"]:
        pool = len(self.target.points) if of is None else len(of)
        index = torch.randint(pool, (min(count, pool),), generator=self.random)
        return index if of is None else of[index]

    @torch.no_grad()
    def _refresh(self) -> None:
        """Carry the whole pool back into the field's space."""
        field = self.field("body")
        self.home, self.air = (pull_back(field, self._place(p)) for p in (self.target.points, self.target.empty))

    def _place(self, points: Tensor) -> Tensor:
        """From the target's floor to that of the family."""
        up = self.lift.new_zeros(3).index_copy(0, torch.tensor([1]), self.lift)
        return points + up

    # --- starting points

    @torch.no_grad()
    def _start_body(self) -> None:
        """The best body of the bank."""
        index, best = self._draw(1000), np.inf
        self.lift = torch.tensor([-SOLES])
        for latents in self.bank:
            self.codes = {k: v.detach().clone() for k, v in latents.codes.items() if k.startswith("body/")}
            loss = float(self._body_terms(index, solve=True))
            if loss < best:
                best, chosen = loss, self.codes
        self.codes = chosen

    @torch.no_grad()
    def _start_parts(self) -> None:
        """Every part worn from the bank: shape by its points and by what must stay empty, then texture by colours."""
        self._refresh()
        x, free = self.home, self.air[self._draw_empty(1500)]
        self.codes["body/tex"] = self._best_texture("body", x)
        for part in self.target.worn:
            own = self._draw(1200, (self.target.labels == PARTS.index(part)).nonzero().squeeze(1))
            others = self._draw(800, (self.target.labels != PARTS.index(part)).nonzero().squeeze(1))
            best = np.inf
            for latents in self.bank:
                if f"{part}/shape" not in latents.codes:
                    continue
                mine = {k: v for k, v in latents.codes.items() if k.startswith(f"{part}/")}
                field = self.model.decode(Latents(latents.family, self._body() | mine))[0]
                # with only body and part, the field at the part's points is the part's; elsewhere it must not stand out
                loss = float(field.sdf(x[own]).abs().clamp(max=0.05).mean())
                loss += float((-field.sdf(x[others])).clamp(0, 0.05).mean())
                loss += float((SHELL / 2 - field.sdf(free)).clamp(0, 0.05).mean())
                if loss < best:
                    best, found = loss, mine
            if np.isfinite(best):
                self.codes |= {k: v.detach().clone() for k, v in found.items()}
                self.codes[f"{part}/tex"] = self._best_texture(part, x)

    def _body(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.codes.items() if k.startswith("body/")}

    def _best_texture(self, part: str, x: Float[Tensor, "N 3"]) -> Tensor:
        """Of the bank's textures for this part the one whose colours are nearest; small clouds of points."""
        own = self._draw(1000, (self.target.labels == PARTS.index(part)).nonzero().squeeze(1))
        best, found = np.inf, self.bank[0].codes.get(f"{part}/tex")
        for latents in self.bank:
            tex = latents.codes.get(f"{part}/tex")
            if tex is None or not len(own):
                continue
            mine = {k: v for k, v in self.codes.items() if k.startswith((f"{part}/", "body/"))} | {f"{part}/tex": tex}
            field = self.model.decode(Latents(latents.family, mine))[0]
            loss = float((field.color(x[own]) - self.target.colors[own]).abs().mean())
            if loss < best:
                best, found = loss, tex
        assert found is not None, "a bank in which a part has a shape has its texture too"
        return found.detach().clone()

    # --- losses

    def _body_terms(self, index: Int[Tensor, " K"], solve: bool = False) -> Tensor:
        field = self.field("body")
        points = self._place(self.target.points[index])
        distance = field.sdf(pull_back(field, points, None if solve else self.home[index]))
        skin = self.target.labels[index] == PARTS.index("body")
        covered = functional.relu(0.001 - distance) + 0.3 * functional.relu(distance - 0.06)
        return torch.where(skin, distance.abs(), covered).mean()

    def _body_loss(self) -> Tensor:
        """As the whole loss in units of 1 cm."""
        return 100 * self._body_terms(self._draw(POINTS))

    def _whole_loss(self) -> Tensor:
        """Distances in units of 1 cm, so that all terms are of the order of one."""
        index, target = self._draw(POINTS), self.target
        field = self.field()
        third = len(index) // 3
        first, second, free = index[:third], index[third : 2 * third], self._draw_empty(third)
        front, behind = SHELL * target.normals[first], -SHELL * target.normals[second]
        places = torch.cat([target.points[index], target.points[first] + front, target.points[second] + behind,
                            target.empty[free]])  # fmt: skip
        starts = torch.cat([self.home[index], self.home[first] + front, self.home[second] + behind, self.air[free]])
        x = pull_back(field, self._place(places), starts)
        on, before, after, open_air = field.sdf(x).split([len(index), third, third, third])
        loss = on.abs().clamp(max=0.04).mean() + functional.relu(SHELL / 2 - open_air).mean()
        loss = loss + 0.3 * ((before - SHELL).abs().mean() + (after + SHELL).abs().mean())
        x = x[: len(index)]
        color = 3 * (field.color(x) - target.colors[index]).abs().mean()
        return 100 * loss + color + self._label_loss(field, x, target.labels[index])

    def _label_loss(self, field: HumanField, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of softmax(-distance of each layer), for fields that have layers."""
        if not hasattr(field, "layers"):
            return x.new_zeros(())
        layers = torch.stack(field.layers(x), 1)
        order = {name: i for i, name in enumerate(("body", *field.worn))}  # pyright: ignore[reportAttributeAccessIssue]
        index = torch.tensor([order.get(part, -1) for part in PARTS])[labels]
        known = index >= 0
        return 0.1 * functional.cross_entropy(-layers[known] / 0.003, index[known])

    def _draw_empty(self, count: int) -> Int[Tensor, " K"]:
        return torch.randint(len(self.target.empty), (count,), generator=self.random)

    def _optimise(self, names: Sequence[str], count: int, steps: Steps, loss: object) -> None:
        """Codes move in units of their spread; the last number of a part's shape says that it is worn, and stays."""
        assert callable(loss)
        fixed = {name: code.detach() for name, code in self.codes.items()}
        moves = {name: torch.zeros_like(fixed[name], requires_grad=True) for name in names}
        lift, sink = self.lift.detach(), torch.zeros(1, requires_grad=True)
        optimiser = torch.optim.Adam([*moves.values(), sink], steps.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(count, 1), 0.1 * steps.rate)
        for i in range(count):
            if i % REFRESH == 0:
                self._refresh()
            self.codes = dict(fixed) | {name: self._moved(name, fixed[name], move) for name, move in moves.items()}
            self.lift = lift + 0.05 * sink
            total = loss() + steps.prior * self._unlikely(moves, fixed)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            self.codes = dict(fixed) | {name: self._moved(name, fixed[name], move) for name, move in moves.items()}
            self.lift = (lift + 0.05 * sink).detach()
        self.codes = {name: code.detach() for name, code in self.codes.items()}

    def _moved(self, name: str, code: Tensor, move: Tensor) -> Tensor:
        moved = code + move * self.spread[name][1]
        if name.endswith("/shape") and not name.startswith("body/"):
            moved = torch.cat([moved[:, :-1], code[:, -1:]], 1)
        return moved

    def _unlikely(self, moves: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> Tensor:
        """Squared distance from the bank's middle for the body, from the start for parts: those are clusters."""
        total = torch.zeros(())
        for name, move in moves.items():
            mean, deviation = self.spread[name]
            where = (fixed[name] - mean) / deviation + move if name.startswith("body/") else move
            total = total + (where**2).sum()
        return total


def through(
    masks: Bool[Tensor, "B H W"], mvp: Float[Tensor, "B 4 4"], candidates: Float[Tensor, "N 3"]
) -> Float[Tensor, "M 3"]:
    """Of `candidates` those that some view sees against the background (a pixel's breadth away from the outline)."""
    clip = torch.einsum("bij,nj->bni", mvp.double(), functional.pad(candidates, (0, 1), value=1.0).double())
    place = clip[..., :2] / clip[..., 3:] * clip.new_tensor([1.0, -1.0])
    grown = functional.max_pool2d(masks[:, None].double(), 3, 1, 1)
    hit = functional.grid_sample(grown, place[:, None], mode="nearest", padding_mode="border", align_corners=False)
    inside = (place.abs() < 1).all(2)
    return candidates[((hit[:, 0, 0] == 0) & inside).any(0)]
