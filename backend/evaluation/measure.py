# SPDX-License-Identifier: GPL-3.0-or-later
"""What people measure, as a tailor and a photographer would: on meshes and visible colours, never on codes.

A slider leaks if it changes what it does not name. Read back from the codes that it sets, some leaks cannot show; here
everything is estimated anew from the surface. And every object of a person taken apart is one piece, or a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from backend.evaluation import health
from backend.evaluation.parts import targets
from backend.evaluation.portraits import PARTS, figure, part_of
from backend.families.base import Attribute, FamilyModel, Latents
from backend.geometry.clean import clean
from backend.geometry.mesh import signed_volume
from backend.geometry.tetgrid import extract_surface
from backend.pipeline import PIECE
from backend.protocol import PopulaceError

GRID = 96
PAIRS = {"shoes": 2}  # pieces of an object, if not one
SEEN = 50  # vertices from which on a part's colour can be told
SHOULDERS, HIPS = (0.80, 0.84), (0.49, 0.53)  # heights of the slices that are measured, as parts of the person's

Measures = dict[str, np.ndarray]


@torch.no_grad()
def measures(model: FamilyModel, latents: Latents, grid: int = GRID) -> Measures:
    """Of the naked, bald body: height (metres), bulk (litres by height squared, as a body mass index has it) and the
    depth of hips by that of the shoulders; of the clothed person: median sRGB colour of every visible part."""
    bare = Latents(latents.family, {k: v for k, v in latents.codes.items() if k.partition("/")[0] == "body"})
    mesh = figure(model.decode(bare if bare.codes else latents)[0], grid).mesh
    vertices, height = mesh.vertices.double().numpy(), float(mesh.vertices[:, 1].max())

    def depth(band: tuple[float, float]) -> float:
        slab = (vertices[:, 1] > band[0] * height) & (vertices[:, 1] < band[1] * height)
        middle = slab & (np.abs(vertices[:, 0]) < 0.1 * height)
        return float(np.ptp(vertices[middle, 2])) if middle.any() else 0.0

    out: Measures = {
        "height_m": np.array(height),
        "bulk": np.array(float(signed_volume(mesh.vertices.double(), mesh.faces)) * 1000 / height**2),
        "hips_by_shoulders": np.array(depth(HIPS) / max(depth(SHOULDERS), 1e-3)),
    }  # fmt: skip
    made = figure(model.decode(latents)[0], grid)
    part, color = part_of(made.field, made.mesh.points).numpy(), made.field.color(made.mesh.points).cpu().numpy()
    for i, name in enumerate(PARTS):
        if (part == i).sum() > SEEN:
            out[f"{name}_color"] = np.median(color[part == i], 0)
    return out


def change(a: Measures, b: Measures, spread: Measures) -> dict[str, float]:
    """How far measures differ, in standard deviations of the population; of colours the mean of the channels."""
    return {k: float(np.mean(np.abs(a[k] - b[k]) / spread[k])) for k in a.keys() & b.keys() & spread.keys()}


def spreads(people: Sequence[Measures]) -> Measures:
    """Standard deviation of each measure over those who have it."""
    names = sorted({k for person in people for k in person})
    found = {k: np.std([person[k] for person in people if k in person], 0) for k in names}
    return {k: v.clip(1e-4) for k, v in found.items()}


def slider_effects(
    model: FamilyModel, attributes: Sequence[Attribute], people: Sequence[Latents], grid: int = GRID
) -> dict[str, Any]:
    """Per numeric attribute: how every measure changes, in standard deviations of these people, when the slider goes
    from a fifth above its lower end to a fifth below its upper end; of `height_m` also the largest error in metres."""
    spread = spreads([measures(model, latents, grid) for latents in people])
    out: dict[str, Any] = {}
    for attribute in attributes:
        if attribute.kind != "number":
            continue
        effects: dict[str, list[float]] = {}
        for latents in people:
            low, high = (measures(model, model.edit(latents, {attribute.name: v}), grid) for v in targets(attribute))
            for name, value in change(low, high, spread).items():
                effects.setdefault(name, []).append(value)
            if attribute.name == "height_m":
                asked = np.array(targets(attribute), np.float64)
                got = np.stack([low["height_m"], high["height_m"]])
                effects.setdefault("error_m", []).append(float(np.abs(got - asked).max()))
        out[attribute.name] = {
            k: float(np.max(v) if k == "error_m" else np.mean(v)) for k, v in sorted(effects.items())
        }
    return out


@torch.no_grad()
def object_pieces(model: FamilyModel, people: Sequence[Latents], grid: int) -> dict[str, dict[str, float]] | None:
    """People taken apart: per part the share of objects that are one piece (a pair of shoes: two), and closed. None
    where the family cannot take people apart."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    for latents in people:
        try:
            fields = model.decode(latents, separate=True)
        except TypeError:
            return None
        for field in fields:
            try:
                mesh = clean(extract_surface(field, grid), PIECE)
            except PopulaceError:  # wholly hidden under others
                continue
            facts = health.topology(mesh.faces.cpu().numpy())
            whole = facts["components"] == PAIRS.get(field.name, 1)
            found.setdefault(field.name, []).append((whole, bool(facts["closed"])))
    return {name: {"objects": float(len(rows)), "whole": float(np.mean([w for w, _ in rows])),
                   "closed": float(np.mean([c for _, c in rows]))} for name, rows in found.items()}  # fmt: skip
