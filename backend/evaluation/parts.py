# SPDX-License-Identifier: GPL-3.0-or-later
"""Do parts and sliders move what they say and nothing else?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from backend.evaluation.portraits import GRID, PARTS, SIZE, Figure, cameras, draw, figure, part_of, photograph
from backend.families.base import Attribute, AttributeValue, FamilyModel, HumanField, Latents
from backend.geometry.mesh import TriMesh
from backend.geometry.tetgrid import extract_surface
from backend.protocol import PopulaceError

Array = np.ndarray[Any, Any]
STILL = 0.001  # metres: less is "did not move"
FAINT = 2 / 255  # sRGB: less is "kept its colour"
HAND_BONES = ("hand", "thumb", "index", "middle", "ring", "pinky")
FACE, HANDS, SHOES = "face", "hands", "shoes"


# --- swapping a part --------------------------------------------------------------------------------------------------


def with_part(latents: Latents, other: Latents, part: str) -> Latents:
    """`latents` wearing this part of `other`."""
    codes = {k: v for k, v in latents.codes.items() if k.partition("/")[0] != part}
    return Latents(latents.family, codes | {k: v for k, v in other.codes.items() if k.partition("/")[0] == part})


def places(field: HumanField, points: Float[Tensor, "N 3"]) -> dict[str, Bool[Array, " N"]]:
    """Which surface points belong to the face, to the hands, to the shoes."""
    label = part_of(field, points).numpy()
    skin, shoes = label == PARTS.index("body"), label == PARTS.index("shoes")
    if field.rig is None:
        return {SHOES: shoes}
    index, weight = field.skin(points)
    dominant = index[torch.arange(len(points)), weight.argmax(1)].cpu().numpy()
    names = [name.lower().replace("def-", "") for name in field.rig.names]
    head = np.array([name.startswith("head") for name in names])[dominant]
    hand = np.array([name.startswith(HAND_BONES) for name in names])[dominant]
    return {FACE: head & skin, HANDS: hand & skin, SHOES: shoes}


@torch.no_grad()
def swap_locality(
    model: FamilyModel, pairs: Sequence[tuple[Latents, Latents]], part: str = "top", grid: int = GRID
) -> dict[str, Any]:
    """Give each first person the second one's `part`; how far do the vertices of face, hands and shoes move, and do
    they keep their colours? Distances are to the nearest vertex of the new surface, made on the same lattice: never
    less than the way to the surface."""
    moved: dict[str, list[Array]] = {FACE: [], HANDS: [], SHOES: []}
    recolored: dict[str, list[Array]] = {FACE: [], HANDS: [], SHOES: []}
    for first, second in pairs:
        before, after = (figure(model.decode(x)[0], grid) for x in (first, with_part(first, second, part)))
        old = before.mesh.vertices.numpy() - [0, before.drop, 0]  # where it was before it was put on the floor
        new = after.mesh.vertices.numpy() - [0, after.drop, 0]
        way = cKDTree(new).query(old)[0]
        points = before.mesh.points
        change = (before.field.color(points) - after.field.color(points)).abs().amax(1).cpu().numpy()
        for place, chosen in places(before.field, points).items():
            moved[place].append(way[chosen])
            recolored[place].append(change[chosen])
    out: dict[str, Any] = {"part": part, "pairs": len(pairs)}
    for place, ways in moved.items():
        way = np.concatenate(ways) if ways else np.zeros(0)
        if len(way):
            out[place] = {
                "still": float((way < STILL).mean()), "moved_mm_95": float(np.quantile(way, 0.95) * 1000),
                "same_color": float((np.concatenate(recolored[place]) < FAINT).mean()), "vertices": len(way),
            }  # fmt: skip
    return out


# --- labels -----------------------------------------------------------------------------------------------------------


def intersections_and_unions(a: Int[Array, "B H W"], b: Int[Array, "B H W"]) -> Int[Array, "P 2"]:
    """Pixels where both maps name a part, and where either does; the maps hold 1 + index into PARTS, or 0."""
    pairs = [(((a == i + 1) & (b == i + 1)).sum(), ((a == i + 1) | (b == i + 1)).sum()) for i in range(len(PARTS))]
    return np.array(pairs)


def iou(counts: Int[Array, "P 2"]) -> dict[str, float]:
    """Intersection over union of every part that occurs."""
    return {part: float(i / u) for part, (i, u) in zip(PARTS, counts, strict=True) if u}


@torch.no_grad()
def label_iou(model: FamilyModel, people: Sequence[Latents], grid: int = GRID) -> dict[str, float] | None:
    """The parts that the whole person's field names at visible points, against those that are seen when every part is
    an object of its own (`decode(separate=True)`). None where the family cannot take people apart."""
    counts = np.zeros((len(PARTS), 2), np.int64)
    for latents in people:
        try:
            fields = model.decode(latents, separate=True)
        except TypeError:
            return None
        whole = figure(model.decode(latents)[0], grid)
        if len(fields) == 1 and len({k.partition("/")[0] for k in latents.codes}) > 1:
            return None
        camera = cameras(whole.head)
        named = photograph(whole, camera)[2].numpy()
        counts += intersections_and_unions(named, _assembled(fields, whole, camera, grid))
    return iou(counts)


def _assembled(fields: Sequence[HumanField], whole: Figure, camera: Any, grid: int) -> Int[Array, "B S S"]:
    """The map of objects drawn together, at the same pixels as `photograph`'s."""
    vertices, faces, parts, start = [], [], [], 0
    for field in fields:
        try:
            mesh = extract_surface(field, grid)  # not cleaned: a pair of shoes is two pieces
        except PopulaceError:  # wholly hidden under others
            continue
        vertices.append(mesh.vertices.cpu() + torch.tensor([0.0, whole.drop, 0.0]))
        faces.append(mesh.faces.cpu() + start)
        name = field.name if field.name in PARTS else "body"
        parts.append(torch.full((len(mesh.faces),), 1 + PARTS.index(name)))
        start += len(mesh.vertices)
    mesh = TriMesh(torch.cat(vertices), torch.cat(faces), torch.cat(vertices))
    face = draw(mesh, camera, 2 * SIZE).face_id[:, 1::2, 1::2]
    return torch.where(face >= 0, torch.cat(parts)[face.clamp(min=0)], 0).numpy()


# --- attributes -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def height_error(model: FamilyModel, people: Sequence[Latents], grid: int = 192) -> dict[str, float]:
    """Height of the naked, bald body's surface against the attribute, as parts of the latter."""
    errors = []
    for latents in people:
        naked = Latents(latents.family, {k: v for k, v in latents.codes.items() if k.partition("/")[0] == "body"})
        said = float(model.describe(latents)["height_m"])  # pyright: ignore[reportArgumentType]
        errors.append(figure(model.decode(naked)[0], grid).height / said - 1)
    sizes = np.abs(errors)
    return {
        "mean": float(sizes.mean()),
        "largest": float(sizes.max()),
        "within_1_percent": float((sizes < 0.01).mean()),
    }


def distance(attribute: Attribute, a: AttributeValue, b: AttributeValue) -> float:
    """How different two values are: of numbers as a part of the attribute's range, of colours the largest difference
    of a channel, of choices 0 or 1."""
    if isinstance(a, str) or isinstance(b, str):
        return float(a != b)
    if attribute.kind == "color":
        return float(np.abs(np.subtract(a, b)).max())
    return abs(float(a) - float(b)) / (attribute.high - attribute.low)  # pyright: ignore[reportArgumentType]


def targets(attribute: Attribute) -> list[AttributeValue]:
    """What sliders are set to: a fifth of the range from either end, two colours, every choice."""
    if attribute.kind == "number":
        span = attribute.high - attribute.low
        return [attribute.low + 0.2 * span, attribute.high - 0.2 * span]
    if attribute.kind == "color":
        return [(0.6, 0.15, 0.15), (0.15, 0.3, 0.6)]
    return list(attribute.choices)


@torch.no_grad()
def sliders(
    model: FamilyModel, attributes: Sequence[Attribute], people: Sequence[Latents]
) -> dict[str, dict[str, float | str]]:
    """Set every attribute of every person to its `targets` and read all attributes again. Per attribute: `miss`, how
    far the value read is from the one asked; `hit`, the share of values that are less than 0.05 off; `leak`, the mean
    change of the others; `leak_most` and `leaks_to`, the one that changes most. Units are those of `distance`.

    Colours of parts that a person does not wear are not asked for, nor counted.
    """
    by_name = {a.name: a for a in attributes}
    out: dict[str, dict[str, float | str]] = {}
    for attribute in attributes:
        misses: list[float] = []
        leaks: dict[str, list[float]] = {}
        for latents in people:
            before = model.describe(latents)
            if attribute.name not in before or not _settable(attribute, before):
                continue
            for value in targets(attribute):
                after = model.describe(model.edit(latents, {attribute.name: value}))
                if attribute.name in after:
                    misses.append(distance(attribute, after[attribute.name], value))
                for other in before.keys() & after.keys() & by_name.keys() - {attribute.name}:
                    if _settable(by_name[other], before) and not _belongs(other, attribute.name):
                        leaks.setdefault(other, []).append(distance(by_name[other], before[other], after[other]))
        if misses:
            means: Mapping[str, float] = {k: float(np.mean(v)) for k, v in sorted(leaks.items())}
            most = max(means, key=lambda k: means[k], default="")
            out[attribute.name] = {
                "miss": float(np.mean(misses)), "hit": float(np.mean(np.array(misses) < 0.05)),
                "leak": float(np.mean(list(means.values()))) if means else 0.0,
                "leak_most": means.get(most, 0.0), "leaks_to": most,
            }  # fmt: skip
    return out


def _settable(attribute: Attribute, described: Mapping[str, AttributeValue]) -> bool:
    """A garment's colour needs the garment."""
    part = attribute.name.removesuffix("_color")
    return attribute.kind != "color" or described.get(part, "") != "none"


def _belongs(color: str, choice: str) -> bool:
    """A new garment may bring its own colour."""
    return color == f"{choice}_color"


@torch.no_grad()
def color_on_surface(
    model: FamilyModel, people: Sequence[Latents], part: str, value: Sequence[float], grid: int = 96
) -> float | None:
    """Set `PART_color` and look: distance of the part's median visible colour from it, mean over those who wear it."""
    found = []
    for latents in people:
        if f"{part}/tex" not in latents.codes:
            continue
        made = figure(model.decode(model.edit(latents, {f"{part}_color": value}))[0], grid)
        points = made.mesh.points[part_of(made.field, made.mesh.points) == PARTS.index(part)]
        if len(points) > 50:
            median = made.field.color(points).median(0).values.cpu().numpy()
            found.append(float(np.abs(median - np.array(value)).max()))
    return float(np.mean(found)) if found else None
