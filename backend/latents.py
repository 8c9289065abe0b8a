# SPDX-License-Identifier: GPL-3.0-or-later
"""Arithmetic on people: mix, vary, take parts, remove, re-roll. Pure functions on `Latents` of one family.

A code is called PART/KIND; a part is worn if it has codes, and its shape never goes without its looks. What only one
of two people wears cannot be blended: it changes sides as a whole, at `SWITCH`, if shapes are to change at all. Maps
belong to the looks of their part, and change sides likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from backend.families.base import Latents
from backend.protocol import PopulaceError

KINDS = ("shape", "tex")
SWITCH = 0.5  # amount from which on a part that only one person wears is as on the second one


def parts_of(latents: Latents) -> tuple[str, ...]:
    """What this person has, the body first."""
    return tuple(dict.fromkeys(name.partition("/")[0] for name in latents.codes))


def mix(a: Latents, b: Latents, amount: float, kinds: Collection[str] = KINDS) -> Latents:
    """From `a` (amount 0) straight to `b` (1): equal steps of `amount` change every code equally."""
    return _towards(a, b, amount, None, kinds, lambda name, x, y: _weighted(x, y, 1 - amount, amount))


def vary(
    latents: Latents,
    stranger: Latents,
    amount: float,
    parts: Collection[str] | None = None,
    kinds: Collection[str] = KINDS,
    mean: Mapping[str, Float[Tensor, "L C"]] | None = None,
) -> Latents:
    """Towards an independent draw: 0 is the same person, 1 the stranger, `parts` None: all.

    Codes that have a `mean` are normally distributed about it and turn by amount * 90 degrees about it, which keeps
    their spread: a straight line would pass near the mean, where everybody looks alike. The others, which form
    clusters or have bounds, go straight.
    """
    turn, means = (math.cos(amount * math.pi / 2), math.sin(amount * math.pi / 2)), mean or {}

    def between(name: str, x: Tensor, y: Tensor) -> Tensor:
        if amount in (0, 1) or name not in means:
            return _weighted(x, y, 1 - amount, amount)
        centre = means[name].to(x)
        return centre + _weighted(x - centre, y - centre, *turn)

    return _towards(latents, stranger, amount, parts, kinds, between)


def take_parts(a: Latents, b: Latents, parts: Sequence[str], kinds: Collection[str] = KINDS) -> Latents:
    """`a` with these parts of `b`; what `b` does not wear is taken off. Raises `invalid_request` where that is the
    body, or where the looks alone are asked for of a part that not both wear."""
    for part in parts:
        mine, theirs = part in parts_of(a), part in parts_of(b)
        if set(kinds) == {"tex"} and not (mine and theirs):
            who = "This person" if not mine else "The other person"
            raise PopulaceError("invalid_request", f"{who} wears no {part}, so its looks alone cannot be taken.",
                                'Take shape and looks: "kinds": ["shape", "tex"].')  # fmt: skip
        if part == parts_of(a)[0] and not theirs:
            raise PopulaceError("invalid_request", f"The other person has no part {part!r} to take.",
                                "Take it from a person of the same make.")  # fmt: skip
    return _towards(a, b, 1.0, parts, kinds, lambda name, x, y: y)


def remove(latents: Latents, parts: Collection[str]) -> Latents:
    """Without these parts; those that are not worn are no error. Raises `invalid_request` if one is the body."""
    body, *worn = parts_of(latents)
    if body in parts:
        raise PopulaceError("invalid_request", f"The part {body!r} cannot be taken off.",
                            f"This person wears: {', '.join(worn) or 'nothing'}.")  # fmt: skip
    codes, maps = ({n: x for n, x in named.items() if n.partition("/")[0] not in parts}
                   for named in (latents.codes, latents.maps))  # fmt: skip
    return Latents(latents.family, codes, maps)


def reroll(latents: Latents, sample: Latents, lock: Collection[str] = (), kinds: Collection[str] = KINDS) -> Latents:
    """Everything from `sample` but the locked parts. With kinds ("tex",): new looks on the same geometry."""
    parts = [part for part in (*parts_of(latents), *parts_of(sample)) if part not in lock]
    return _towards(latents, sample, 1.0, parts, kinds, lambda name, x, y: y)


def keep_maps(before: Latents, after: Latents) -> Latents:
    """`after` an edit of codes: maps of parts whose looks are as they were, unless the family itself saw to maps."""
    if after.maps or not before.maps:
        return after
    kept = {}
    for name, shown in before.maps.items():
        part = name.partition("/")[0]
        mine, theirs = ({n: c for n, c in p.codes.items() if n.partition("/")[0] == part} for p in (before, after))
        looks = [n for n in mine if n.partition("/")[2] == "tex"]
        if theirs and all(n in theirs and torch.equal(mine[n], theirs[n].to(mine[n])) for n in looks):
            kept[name] = shown
    return Latents(after.family, after.codes, kept)


def to_rows(latents: Latents) -> dict[str, list[list[float]]]:
    """The codes as a request has them. float32 numbers survive JSON exactly."""
    return {name: code.detach().cpu().tolist() for name, code in latents.codes.items()}


def from_rows(family: str, rows: Mapping[str, list[list[float]]], device: torch.device | str = "cpu") -> Latents:
    """Codes of a request, whose names, sizes and range `checks` has seen."""
    return Latents(family, {name: torch.tensor(r, dtype=torch.float32, device=device) for name, r in rows.items()})


def _towards(
    a: Latents,
    b: Latents,
    amount: float,
    parts: Collection[str] | None,
    kinds: Collection[str],
    between: Callable[[str, Tensor, Tensor], Tensor],
) -> Latents:
    """Part by part: codes that both have are blended by `between`, parts of only one change sides at `SWITCH`."""
    codes: dict[str, Tensor] = {}
    maps: dict[str, Tensor] = {}
    for part in dict.fromkeys((*parts_of(a), *parts_of(b))):
        mine, theirs = ({n: c for n, c in p.codes.items() if n.partition("/")[0] == part} for p in (a, b))
        is_other = amount >= SWITCH and (parts is None or part in parts)
        if parts is not None and part not in parts:
            codes |= mine
        elif mine.keys() == theirs.keys():
            codes |= {n: between(n, x, theirs[n].to(x)) if n.partition("/")[2] in kinds else x
                      for n, x in mine.items()}  # fmt: skip
            is_other &= "tex" in kinds
        else:
            is_other &= "shape" in kinds
            codes |= theirs if is_other else mine
        maps |= {n: m for n, m in (b if is_other else a).maps.items() if n.partition("/")[0] == part}
    return Latents(a.family, codes, maps)


def _weighted(x: Tensor, y: Tensor, of_x: float, of_y: float) -> Tensor:
    """In double precision, so that weights 1 and 0 give the very codes back."""
    return (of_x * x.double() + of_y * y.double()).to(x.dtype)
