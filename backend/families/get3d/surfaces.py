# SPDX-License-Identifier: GPL-3.0-or-later
"""From fields to meshes to pictures with gradients all the way: what inversion and adaptation look through.

    fields --lattice--> values, offsets --DMTet or FlexiCubes--> mesh --rasterise--> points --texture field--> picture

Cameras are GET3D's: on a sphere of radius 1.2 about the origin, looking at it, +Y up, 35 mm lens on a 32 mm sensor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.families.get3d.config import Config
from backend.families.get3d.dmtet import TetGrid, march, repair, sign_cross_entropy
from backend.families.get3d.fields import planes_on_axis, separated, to_unit
from backend.families.get3d.networks import Decoded, UnifiedSynthesis
from backend.geometry import flexicubes
from backend.geometry.mesh import vertex_normals
from backend.render.camera import look_at, perspective, to_clip
from backend.render.gaussian_light import Light, shade
from backend.render.rasterize import rasterize, sample
from backend.render.shade import to_linear, to_srgb
from backend.render.silhouette import antialias

RADIUS = 1.2
FOV_Y = 2 * math.atan(16 / 35)
NEAR, FAR = 0.1, 1000.0


@dataclass(frozen=True)
class Shapes:
    """The meshes of B shapes, in the generator's cube, and what regularises them: means over the shapes."""

    meshes: Sequence[tuple[Float[Tensor, "V 3"], Int[Tensor, "F 3"]]]
    values: Float[Tensor, "B N"]  # at the lattice's nodes, before any repair, positive inside
    cross: Tensor  # cross entropy of signs on the lattice's edges
    empty: Tensor  # mean |sdf| of shapes without a surface, 0 of others: they have no other gradient
    deviation: Tensor  # FlexiCubes' L_dev; 0 with DMTet
    weights: Tensor  # mean square of FlexiCubes' weights; 0 with DMTet

    def regulariser(self) -> Tensor:
        """As the published training weighs them."""
        return 0.01 * self.cross + self.empty + 0.5 * self.deviation + 0.1 * self.weights


class Surfacer:
    """Extraction as in training, on one lattice of `cells` along a side."""

    def __init__(self, config: Config, cells: int, device: torch.device) -> None:
        self.config, self.cells = config, cells
        self.grid = TetGrid.cubic(cells, config.scale).to(device)
        self.axis = self.grid.vertices[: cells + 1, 2]  # nodes come in lexicographic order

    @functools.cached_property
    def cubic_edges(self) -> Int[Tensor, "E 2"]:
        """Edges of the lattice's cubes."""
        count = self.cells + 1
        number = torch.arange(count**3, device=self.axis.device).reshape(count, count, count)
        pairs = [(number.narrow(k, 0, self.cells), number.narrow(k, 1, self.cells)) for k in range(3)]
        return torch.cat([torch.stack([a.flatten(), b.flatten()], 1) for a, b in pairs])

    @functools.cached_property
    def rim(self) -> Int[Tensor, " K"]:
        """The two outermost layers of nodes."""
        index = torch.arange(self.cells + 1, device=self.axis.device)
        outer = (index < 2) | (index > self.cells - 2)
        return (outer[:, None, None] | outer[:, None] | outer).flatten().nonzero()[:, 0]

    def values(self, decoded: Decoded) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N 3"]]:
        """Raw values (positive inside) and offsets at the nodes. The unified generator's planes separate there."""
        synthesis = decoded.synthesis
        if isinstance(synthesis, UnifiedSynthesis):
            parts = planes_on_axis(decoded.geometry[0], to_unit(self.axis, self.config.scale))
            sdf = separated(parts, synthesis.generator.mlp_synthesis_sdf, decoded.geo_rows)[..., 0]
            deform = separated(parts, synthesis.generator.mlp_synthesis_def, decoded.geo_rows)
            return sdf, torch.tanh(deform) * self.config.reach
        points = self.grid.vertices.expand(len(decoded.texture), -1, -1)
        return decoded.sdf(points), decoded.offset(points)

    def __call__(self, decoded: Decoded) -> Shapes:
        """The meshes, by the method that the weights were made for."""
        raw, offset = self.values(decoded)
        flexible = self.config.surface == "flexicubes"
        border, edges = (self.rim, self.cubic_edges) if flexible else (self.grid.border, self.grid.edges)
        sdf, empty = repair(raw, self.grid.centre, border, interior=flexible)
        cross = torch.stack([sign_cross_entropy(values, edges) for values in sdf]).mean()
        moved, none = self.grid.vertices + offset, sdf.new_zeros(())
        if not flexible:
            meshes = [march(places, values, self.grid.tets) for places, values in zip(moved, sdf)]
            return Shapes(meshes, raw, cross, empty.mean(), none, none)
        duals = [self._dual(one(decoded, i), moved[i], values) for i, values in enumerate(sdf)]
        deviation = torch.stack([surface.deviation.mean() for surface, _ in duals]).mean()
        weights = torch.stack([weights.square().mean() for _, weights in duals]).mean()
        return Shapes([(s.vertices, s.faces) for s, _ in duals], raw, cross, empty.mean(), deviation, weights)

    def _dual(
        self, decoded: Decoded, places: Float[Tensor, "N 3"], values: Float[Tensor, " N"]
    ) -> tuple[flexicubes.Dual, Float[Tensor, "C 21"]]:
        side = self.cells + 1
        crossed = flexicubes.find(-values.detach().reshape(side, side, side))
        at = (crossed.nodes * crossed.nodes.new_tensor([side * side, side, 1])).sum(1)
        weights = decoded.weights(self.grid.vertices[at][None], crossed.corners)[0]
        return flexicubes.dual(crossed, places[at], -values[at], weights, training=True), weights


def one(decoded: Decoded, i: int) -> Decoded:
    """The fields of shape i alone."""
    pick = slice(i, i + 1)
    return dataclasses.replace(
        decoded, geometry=tuple(planes[pick] for planes in decoded.geometry), texture=decoded.texture[pick],
        geo_rows=[w[pick] for w in decoded.geo_rows], tex_rows=[w[pick] for w in decoded.tex_rows],
        color_row=decoded.color_row[pick],
    )  # fmt: skip


def see(
    decoded: Decoded,
    shapes: Shapes,
    mvp: Float[Tensor, "B V 4 4"],
    size: int,
    eyes: Float[Tensor, "B V 3"] | None = None,
    lights: Sequence[Light] = (),
) -> tuple[Float[Tensor, "B V 3 S S"], Float[Tensor, "B V 1 S S"]]:
    """Colours (sRGB, about -1..1, not antialiased) and antialiased coverage (0..1) of B shapes by V cameras each.

    Generators with materials may be seen in light: `lights` is one environment per shape, `eyes` where the cameras are.
    Pixels without a surface have the colour of no features, the bias of `to_rgb`.
    """
    count = mvp.shape[1]
    points, pixels, masks, normals = [], [], [], []
    for (vertices, faces), matrices in zip(shapes.meshes, mvp, strict=True):
        clip = to_clip(vertices, matrices)
        raster = rasterize(clip, faces, (size, size))
        covered = raster.mask[..., None].to(clip.dtype)
        masks.append(antialias(covered, raster, clip, faces).permute(0, 3, 1, 2))
        points.append(sample(vertices, raster, faces))
        pixels.append(raster.pixels)
        if lights:
            normals.append(functional.normalize(sample(vertex_normals(vertices, faces), raster, faces), dim=1))
    longest = max(1, *(len(p) for p in points))
    asked = torch.stack([functional.pad(p, (0, 0, 0, longest - len(p))) for p in points])
    features = decoded.features(asked)
    if lights:
        assert eyes is not None, "light is seen from somewhere"
        rgb, (surface, bend) = decoded.to_rgb(features), decoded.to_material(features)
        colors = decoded.to_rgb(features.new_zeros(len(mvp), 1, features.shape[2])).expand(-1, count * size * size, -1)
        lit = []
        for i, (p, at) in enumerate(zip(points, pixels)):
            seen = slice(0, len(p))
            base = to_linear(((rgb[i, seen] + 1) / 2).clamp(0, 1))
            normal = functional.normalize(normals[i] + bend[i, seen], dim=1)
            to_eye = functional.normalize(eyes[i][torch.div(at, size * size, rounding_mode="floor")] - p, dim=1)
            shown = shade(base, surface[i, seen, 0], surface[i, seen, 1], normal, to_eye, lights[i].to(p))
            lit.append(colors[i].index_copy(0, at, to_srgb(shown) * 2 - 1))
        image = torch.stack(lit)
    else:
        empty = features.new_zeros(count * size * size, features.shape[2])
        image = decoded.to_rgb(torch.stack([empty.index_copy(0, p, f[: len(p)]) for p, f in zip(pixels, features)]))
    return image.unflatten(1, (count, size, size)).permute(0, 1, 4, 2, 3), torch.stack(masks)


def c2w_of(azimuth: Float[Tensor, " N"], polar: Float[Tensor, " N"], radius: float = RADIUS) -> Float[Tensor, "N 4 4"]:
    """Cameras by the authors' angles in radians, polar from +Y: position = r (sin t cos c, cos t, sin t sin c) with
    c = -azimuth - pi/2. Differentiable."""
    c = -azimuth - math.pi / 2
    eye = radius * torch.stack([polar.sin() * c.cos(), polar.cos(), polar.sin() * c.sin()], 1)
    return look_at(eye, torch.zeros_like(eye))


def projection(device: torch.device, fov_y: float = FOV_Y) -> Float[Tensor, "4 4"]:
    """Of a square picture, camera space to clip space."""
    return perspective(fov_y, 1.0, NEAR, FAR).to(device)
