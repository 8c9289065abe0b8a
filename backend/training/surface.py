# SPDX-License-Identifier: GPL-3.0-or-later
"""The visible outer surface of a person as points, and signed distances around it.

Outside is what can be seen: a point from which at least a few of many directions lead into the open. So slits, skirts
and what lies below clothes close as they do in scans, however many open and overlapping sheets a person is made of.
Hair counts where its texture is opaque; brows are paint on the skin; hidden skin blocks sight and is never seen.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from backend.protocol import PopulaceError
from backend.training.person import SampledPerson
from backend.training.portrait import DECAL, OPAQUE, Soup, split_decals

DIRECTIONS = 128  # over the whole sphere
LOWEST = math.radians(-20)  # nobody looks up skirts; what stands on the floor is seen from below as well
FLOOR = 0.02  # metres of height that count as standing on the floor
SEEN, OUTSIDE = 0.03, 0.05  # fraction of directions that make a surface visible, and a point in space outside
LIFT = 2e-4  # metres off the surface from where it looks around
SHEET = 0.0025  # metres: half the thickness given to sheets, behind the side that is seen
LAYERS = 32  # transparent faces that one ray may pass
HEAD = 0.30  # metres below the top of the mean person where the head begins


class Surface(NamedTuple):
    """Points of the visible surface."""

    points: np.ndarray  # f32 [N, 3] metres
    normals: np.ndarray  # f32 [N, 3] unit, to the side that is seen
    colors: np.ndarray  # f32 [N, 3] sRGB
    labels: np.ndarray  # i64 [N] into `person.LABELS`


class Distances(NamedTuple):
    """Points around a person."""

    points: np.ndarray  # f32 [N, 3]
    distances: np.ndarray  # f32 [N] metres, negative inside


class Sight:
    """Who sees what: rays through the layers of a person."""

    def __init__(self, person: SampledPerson) -> None:
        solid, decals = split_decals(person)
        self.soup = Soup([layer for layer in solid if layer is not person.filler])
        self.opaque = _scene([layer for layer in solid if not layer.cutout])
        veil = [layer for layer in solid if layer.cutout]
        self.veil_soup = Soup(veil) if veil else None
        self.veil = _scene(veil)
        self.decal_soup = Soup(decals) if decals else None
        self.decals = _scene(decals)

    def free(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """bool [N]: rays f32 [N, 3] that meet nothing opaque."""
        free = np.ones(len(origins), bool)
        if self.opaque is not None:
            free = self.opaque.run(origins, directions, query="OCCLUDED") < 0
        if self.veil is None or self.veil_soup is None:
            return free
        active, start = np.flatnonzero(free), origins[free]
        for _ in range(LAYERS):
            if not len(active):
                break
            face, corners, distance = _hits(self.veil, start, directions[active])
            hit = face >= 0
            opacity = self.veil_soup.color(face[hit], corners[hit])[:, 3]
            free[active[hit][opacity >= OPAQUE]] = False
            on = np.flatnonzero(hit)[opacity < OPAQUE]
            start = start[on] + (distance[on, None] + 1e-5) * directions[active[on]]
            active = active[on]
        free[active] = False  # lost in a thicket
        return free

    def open(self, points: np.ndarray, fraction: float, normals: np.ndarray | None = None) -> np.ndarray:
        """bool [N]: points f32 [N, 3] from which at least `fraction` of the directions are free; with `normals`, of
        those in front."""
        points = points.astype(np.float32)
        count = np.zeros(len(points), np.int64)
        grounded = points[:, 1] < FLOOR
        directions = _directions()
        needed = math.ceil(fraction * len(directions) * (1 + math.sin(-LOWEST)) / 2)
        for direction in directions:
            asks = count < needed
            if direction[1] < math.sin(LOWEST):
                asks &= grounded
            if normals is not None:
                asks &= normals @ direction > 0.02
            who = np.flatnonzero(asks)
            if len(who):
                count[who] += self.free(points[who], np.broadcast_to(direction, (len(who), 3)).copy())
        return count >= needed

    def paint(self, points: np.ndarray, normals: np.ndarray, colors: np.ndarray) -> None:
        """Put brows on the colours [N, 3] of skin points, in place."""
        if self.decals is None or self.decal_soup is None or not len(points):
            return
        face, corners, distance = _hits(self.decals, points + DECAL * normals, -normals)
        at = np.flatnonzero((face >= 0) & (distance < 2 * DECAL))
        rgba = self.decal_soup.color(face[at], corners[at])
        colors[at] += rgba[:, 3:] * (rgba[:, :3] - colors[at])


def visible_surface(person: SampledPerson, count: int, seed: int, face: float = 1.0) -> Surface:
    """`count` points, evenly over the visible surface; the head's skin `face` times as densely as the rest.

    Raises PopulaceError("empty_surface") if nothing can be seen.
    """
    rng = np.random.default_rng(seed)
    sight = Sight(person)
    soup = sight.soup
    corner = soup.vertices[soup.faces].astype(np.float64)
    cross = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    area = np.linalg.norm(cross, axis=1)
    weight = area * np.where(_on_head(soup), face, 1.0)
    if not weight.sum() > 0:
        raise PopulaceError("empty_surface", "This person has no surface.", "Are there faces in its meshes?")
    # a sampled body is closed; cloth, hair and scans may be sheets
    open_sheet = [layer.part not in ("body", "eyes") or layer.weights is None for layer in soup.layers]
    two_sided = np.repeat(open_sheet, np.diff(soup.first))
    found: list[tuple[np.ndarray, ...]] = []
    total = tried = 0
    while total < count:
        batch = int(min(max(1.3 * (count - total) * (tried / total if total else 2.0), 1000), 400_000))
        which = rng.choice(len(area), batch, p=weight / weight.sum())
        r1, r2 = np.sqrt(rng.random(batch)), rng.random(batch)
        bary = np.stack([1 - r1, r1 * (1 - r2), r1 * r2], 1).astype(np.float32)
        rgba = soup.color(which, bary)
        keep = ~_cutout(soup, which) | (rgba[:, 3] >= OPAQUE)
        which, bary, rgba = which[keep], bary[keep], rgba[keep]
        points = np.einsum("nk,nkc->nc", bary, corner[which]).astype(np.float32)
        flat = (cross[which] / np.maximum(area[which, None], 1e-20)).astype(np.float32)
        side = np.where(sight.open(points + LIFT * flat, SEEN, flat), 1.0, 0.0).astype(np.float32)
        behind = np.flatnonzero((side == 0) & two_sided[which])
        side[behind[sight.open(points[behind] - LIFT * flat[behind], SEEN, -flat[behind])]] = -1
        smooth = np.einsum("nk,nkc->nc", bary, soup.normals[soup.faces[which]])
        smooth *= np.where((smooth * flat).sum(1) < 0, -1, 1)[:, None]  # meshes of unknown make may disagree
        smooth /= np.linalg.norm(smooth, axis=1, keepdims=True) + 1e-12
        ok = side != 0
        normals, colors = (smooth * side[:, None])[ok].astype(np.float32), rgba[ok, :3]
        labels = soup.label[which[ok]]
        skin = labels == 0
        painted = colors[skin]
        sight.paint(points[ok][skin], normals[skin], painted)
        colors[skin] = painted
        found.append((points[ok], normals, colors, labels))
        total, tried = total + int(ok.sum()), tried + batch
        if tried > 30 * (total + 1000):
            raise PopulaceError("empty_surface", "Hardly anything of this person can be seen from outside.",
                                "Are its faces turned outwards?")  # fmt: skip
    return Surface(*(np.concatenate(parts)[:count] for parts in zip(*found, strict=True)))


def signed_distance_samples(
    person: SampledPerson, count: int, seed: int, surface_points: int = 60_000, margin: float = 0.1
) -> Distances:
    """`count` points with their signed distance: two thirds close to the surface, the rest in its box with `margin`."""
    rng = np.random.default_rng(seed)
    surface = visible_surface(person, surface_points, seed)
    near = 2 * count // 3
    spread = rng.choice([0.003, 0.01, 0.03], (near, 1), p=[0.5, 0.3, 0.2])
    points = surface.points[rng.integers(len(surface.points), size=near)] + spread * rng.normal(size=(near, 3))
    low, high = surface.points.min(0) - margin, surface.points.max(0) + margin
    points = np.concatenate([points, rng.uniform(low, high, (count - near, 3))]).astype(np.float32)
    return Distances(points, signed_distances(person, surface, points))


def signed_distances(person: SampledPerson, surface: Surface, points: np.ndarray) -> np.ndarray:
    """Signed distance f32 [N] of points [N, 3] to the visible surface, given dense samples of it.

    Close by it is the distance to the samples' tangent planes, which removes the sampling error. Sheets that are seen
    from both sides become `SHEET` thick behind the side that was sampled.
    """
    tree = cKDTree(surface.points)
    some = surface.points[:: max(1, len(surface.points) // 2000)]
    spacing = float(np.median(tree.query(some, k=2)[0][:, 1]))  # about half the samples' mean distance
    distance, index = tree.query(points, k=4, workers=-1)
    delta = points[:, None] - surface.points[index]
    plane = np.einsum("nkc,nkc->nk", delta, surface.normals[index])
    agree = np.einsum("nkc,nc->nk", surface.normals[index], surface.normals[index[:, 0]]) > 0.8
    mean = (plane * agree).sum(1) / agree.sum(1)
    nearest = distance[:, 0]
    inside = ~Sight(person).open(points, OUTSIDE)
    behind = surface.points[index] - SHEET * surface.normals[index]
    inside |= (np.linalg.norm(points[:, None] - behind, axis=2) < SHEET).any(1)
    flat = (np.abs(mean) < 0.008) & (nearest**2 - mean**2 < (5 * spacing) ** 2)  # over the sheet, not beside its rim
    return (np.where(inside, -1, 1) * np.where(flat, np.abs(mean), nearest)).astype(np.float32)


def _on_head(soup: Soup) -> np.ndarray:
    """bool [F]: skin and eyes of the head, told by where they are on the mean person."""
    out = np.zeros(len(soup.faces), bool)
    for layer, low, high in zip(soup.layers, soup.first, soup.first[1:], strict=False):
        if layer.part == "body":
            where = layer.vertices if layer.canonical is None else layer.canonical
            out[low:high] = where[layer.faces, 1].min(1) > where[:, 1].max() - HEAD
        elif layer.part == "eyes":
            out[low:high] = True
    return out


def _cutout(soup: Soup, face: np.ndarray) -> np.ndarray:
    per_layer = np.array([layer.cutout for layer in soup.layers])
    return per_layer[np.searchsorted(soup.first, face, side="right") - 1]


@functools.cache
def _directions() -> np.ndarray:
    """Unit directions f32 [D, 3] evenly over the sphere (Fibonacci), in an order in which any first few spread."""
    i = np.arange(DIRECTIONS) + 0.5
    y, turn = 1 - 2 * i / DIRECTIONS, np.pi * (1 + 5**0.5) * i
    r = np.sqrt(1 - y**2)
    out = np.stack([r * np.sin(turn), y, r * np.cos(turn)], 1).astype(np.float32)
    return out[np.random.default_rng(0).permutation(DIRECTIONS)]


def _scene(layers: list):
    """Embree's scene of layers in `Soup`'s order of faces; None if there is nothing."""
    if not sum(len(layer.faces) for layer in layers):
        return None
    try:
        from embreex import rtcore_scene
        from embreex.mesh_construction import TriangleMesh
    except ImportError as e:
        raise PopulaceError("internal_error", "Looking at training people needs the package embreex.",
                            "Install it: pip install populace[train]") from e  # fmt: skip
    soup = Soup(layers)
    scene = rtcore_scene.EmbreeScene()
    TriangleMesh(scene, np.ascontiguousarray(soup.vertices, np.float32), np.ascontiguousarray(soup.faces, np.int32))
    return scene


def _hits(scene, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First faces [N] (-1: none), barycentric coordinates f32 [N, 3] and distances f32 [N]."""
    found = scene.run(
        np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32), output=True
    )
    u, v = found["u"], found["v"]
    return found["primID"].astype(np.int64), np.stack([1 - u - v, u, v], 1).astype(np.float32), found["tfar"]
