# SPDX-License-Identifier: GPL-3.0-or-later
"""One sampled person: textured layers on a skeleton, and how their colours are looked up.

Person space: metres, Y up, facing +Z, the lowest point of the shod person at y = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numba
import numpy as np

from backend import poses
from backend.families.people.cut import pattern_mask

PARTS = ("body", "eyes", "brows", "hair", "top", "bottom", "shoes", "accessory")
"""Of layers."""

LABELS = ("body", "hair", "top", "bottom", "shoes", "accessory")
"""Of points and pixels; eyes and brows belong to the body."""

LUMINANCE = np.array([0.3, 0.59, 0.11], np.float32)
SHADE = (0.15, 1.8)  # a recoloured texel is so much darker or brighter than its garment: logos do not shine
BAKED = 512  # pixels along the side of a texture that had none


def label_of(part: str) -> int:
    """Index into LABELS of a layer's part."""
    return LABELS.index("body" if part in ("eyes", "brows") else part)


# --- colour -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tint:
    """Recolouring: folds and seams of the texture stay, as its luminance relative to a typical one."""

    palette: np.ndarray  # f32 [6]: primary and secondary sRGB
    typical: float = 1.0  # luminance that becomes exactly the palette's colour
    power: float = 1.0  # below 1: flatter
    pattern: str = "plain"  # or one of `cut.PATTERNS`
    scale: float = 0.0
    soft: float = 0.0  # luminance added to both sides of the ratio: black textures would turn into speckles

    def __call__(self, rgb: np.ndarray, canonical: np.ndarray | None) -> np.ndarray:
        """Colours f32 [N, 3] of texels [N, 3] at canonical points [N, 3] (needed by patterns only)."""
        shade = np.clip((rgb @ LUMINANCE + self.soft) / np.float32(self.typical + self.soft), *SHADE)[:, None]
        if self.power != 1:
            shade = shade**self.power
        color = self.palette[None, :3]
        if self.pattern != "plain" and canonical is not None:
            second = pattern_mask(self.pattern, canonical, self.scale)[:, None].astype(np.float32)
            color = (1 - second) * color + second * self.palette[None, 3:]
        return np.clip(shade * color, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Paint:
    """The colour of a surface as a function of its UVs, and of canonical points where it has a pattern."""

    texels: np.ndarray  # u8 [H, W, 4] sRGB and opacity, top row first
    gain: np.ndarray | None = None  # f32 [3], a factor on the colours
    tint: Tint | None = None

    def __call__(self, uvs: np.ndarray, canonical: np.ndarray | None = None) -> np.ndarray:
        """sRGB and opacity f32 [N, 4], 0..1, at uvs [N, 2] (origin bottom-left), bilinear."""
        return self._of(texels_at(self.texels, np.ascontiguousarray(uvs, np.float32)), canonical)

    def _of(self, rgba: np.ndarray, canonical: np.ndarray | None) -> np.ndarray:
        if self.gain is not None:
            rgba[:, :3] = np.clip(rgba[:, :3] * self.gain, 0, 1)
        if self.tint is not None:
            rgba[:, :3] = self.tint(rgba[:, :3], canonical)
        return rgba

    @property
    def patterned(self) -> bool:
        return self.tint is not None and self.tint.pattern != "plain"

    def flat(self) -> np.ndarray:
        """The whole texture f32 [H, W, 4] without its pattern."""
        rgba = self.texels.reshape(-1, 4).astype(np.float32) / 255
        return self._of(rgba, None).reshape(self.texels.shape)


@numba.njit(cache=True, nogil=True)
def texels_at(texels, uvs):  # pragma: no cover (compiled)
    """Bilinear look-up with clamped edges: u8 [H, W, 4] at uvs f32 [N, 2] -> f32 [N, 4] in 0..1."""
    height, width = texels.shape[:2]
    out = np.empty((len(uvs), 4), np.float32)
    for i in range(len(uvs)):
        x = min(max(uvs[i, 0] * width - 0.5, 0.0), width - 1.0)
        y = min(max((1 - uvs[i, 1]) * height - 0.5, 0.0), height - 1.0)
        x0, y0 = int(x), int(y)
        x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
        fx, fy = x - x0, y - y0
        for c in range(4):
            top = texels[y0, x0, c] * (1 - fx) + texels[y0, x1, c] * fx
            low = texels[y1, x0, c] * (1 - fx) + texels[y1, x1, c] * fx
            out[i, c] = (top * (1 - fy) + low * fy) / 255
    return out


@numba.njit(cache=True, nogil=True)
def smooth_normals(vertices, faces):  # pragma: no cover (compiled)
    """Unit vertex normals f64 [V, 3], faces weighted by area; (0, 1, 0) where there are none."""
    out = np.zeros((len(vertices), 3))
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in range(3):
            out[faces[f, k], 0] += nx
            out[faces[f, k], 1] += ny
            out[faces[f, k], 2] += nz
    for i in range(len(out)):
        length = np.sqrt(out[i, 0] ** 2 + out[i, 1] ** 2 + out[i, 2] ** 2)
        if length > 1e-12:
            out[i] /= length
        else:
            out[i, 1] = 1.0
    return out


# --- layers and people ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One textured triangle mesh of a person."""

    part: str  # one of PARTS
    vertices: np.ndarray  # f32 [V, 3] metres
    faces: np.ndarray  # i64 [F, 3], counter-clockwise seen from outside
    uvs: np.ndarray  # f32 [T, 2], origin bottom-left
    face_uvs: np.ndarray  # i64 [F, 3] into uvs
    paint: Paint | None  # None: `colors`
    weights: np.ndarray | None = None  # f32 [V, J] skin weights, rows sum to 1
    canonical: np.ndarray | None = None  # f32 [V, 3] the same vertices on the mean person
    colors: np.ndarray | None = None  # f32 [V, 4] sRGB and opacity
    cutout: bool = False  # opacity counts: below 0.5 there is no surface
    name: str = ""  # of the item

    @cached_property
    def normals(self) -> np.ndarray:
        """Smooth vertex normals f32 [V, 3]."""
        return smooth_normals(self.vertices.astype(np.float64), self.faces).astype(np.float32)

    def at(self, table: np.ndarray, face: np.ndarray, corners: np.ndarray, index: np.ndarray | None = None):
        """Rows of a table [V, C] interpolated on faces [N] with barycentric coordinates [N, 3] -> f32 [N, C]."""
        rows = (self.faces if index is None else index)[face]
        return sum(table[rows[:, k]] * corners[:, k, None] for k in range(3)).astype(np.float32)

    def color(self, face: np.ndarray, corners: np.ndarray) -> np.ndarray:
        """sRGB and opacity f32 [N, 4] on faces [N] at barycentric coordinates [N, 3]: exact, patterns included."""
        if self.paint is None:
            assert self.colors is not None
            return self.at(self.colors, face, corners)
        where = self.at(self.canonical, face, corners) if self.paint.patterned and self.canonical is not None else None
        return self.paint(self.at(self.uvs, face, corners, self.face_uvs), where)

    @cached_property
    def texture(self) -> np.ndarray:
        """Colours as one image u8 [H, W, 4], top row first; a pattern is baked in where the UVs show it."""
        if self.paint is None or not (self.paint.patterned and self.canonical is not None):
            flat = self.paint.flat() if self.paint is not None else np.ones((1, 1, 4), np.float32)
        else:
            flat = self._baked()
        return np.rint(flat * 255).astype(np.uint8)

    def _baked(self) -> np.ndarray:
        import torch
        from scipy import ndimage

        from backend.render.rasterize import rasterize

        assert self.paint is not None
        size = max(BAKED, *self.paint.texels.shape[:2])
        clip = np.concatenate([self.uvs * 2 - 1, np.zeros((len(self.uvs), 1)), np.ones((len(self.uvs), 1))], 1)
        raster = rasterize(torch.from_numpy(clip[None]), torch.from_numpy(self.face_uvs), (size, size))
        seen = raster.mask[0].numpy()
        out = np.zeros((size, size, 4), np.float32)
        out[seen] = self.color(raster.face_id[0].numpy()[seen], raster.barycentrics[0].numpy()[seen])
        nearest = ndimage.distance_transform_edt(~seen, return_distances=False, return_indices=True)
        return out[tuple(nearest)]  # colours run on beyond the seams


@dataclass(frozen=True)
class SampledPerson:
    """A person as it is seen: what clothes hide of the body is in `filler`, which blocks sight and is never seen."""

    seed: int
    layers: tuple[Layer, ...]
    filler: Layer | None  # hidden skin, moved inwards
    bones: poses.Bones | None  # rest skeleton; names, parents, heads and tails
    attributes: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""

    @property
    def joints(self) -> np.ndarray:
        """Heads and tails of the bones f32 [2, J, 3] in rest, metres."""
        assert self.bones is not None
        return np.stack([self.bones.heads, self.bones.tails])

    @cached_property
    def bounds(self) -> np.ndarray:
        """Lowest and highest corner f32 [2, 3] of all layers."""
        used = [layer.vertices[np.unique(layer.faces)] for layer in self.layers if len(layer.faces)]
        return np.stack([np.min([u.min(0) for u in used], 0), np.max([u.max(0) for u in used], 0)])

    def layer(self, part: str) -> Layer | None:
        """The layer of a part, None if there is none."""
        return next((layer for layer in self.layers if layer.part == part), None)


def posed(person: SampledPerson, rotations: Any, translation: Sequence[float] | np.ndarray = (0, 0, 0)):
    """The resting person with bone rotations [J, 4] (wxyz, see `poses`), standing on y = 0 again, joints where they
    have gone."""
    assert person.bones is not None
    matrices = poses.bone_matrices(person.bones, rotations, translation).astype(np.float32)

    def moved(layer: Layer) -> Layer:
        if layer.weights is None:
            return layer
        blended = (layer.weights @ matrices.reshape(len(matrices), 12)).reshape(-1, 3, 4)
        vertices = np.einsum("vij,vj->vi", blended[:, :, :3], layer.vertices) + blended[:, :, 3]
        return replace(layer, vertices=vertices.astype(np.float32))

    heads, tails = (
        np.einsum("jik,jk->ji", matrices[:, :, :3], ends) + matrices[:, :, 3]
        for ends in (person.bones.heads, person.bones.tails)
    )
    return grounded(replace(person, layers=tuple(map(moved, person.layers)),
                            filler=moved(person.filler) if person.filler else None,
                            bones=replace(person.bones, heads=heads, tails=tails)))  # fmt: skip


def grounded(person: SampledPerson) -> SampledPerson:
    """The person moved up or down until the lowest visible vertex is at y = 0."""
    drop = np.array([0, person.bounds[0, 1], 0], np.float32)

    def lowered(layer: Layer) -> Layer:
        return replace(layer, vertices=layer.vertices - drop)

    bones = person.bones and replace(person.bones, heads=person.bones.heads - drop, tails=person.bones.tails - drop)
    return replace(person, layers=tuple(map(lowered, person.layers)), bones=bones,
                   filler=lowered(person.filler) if person.filler else None)  # fmt: skip
