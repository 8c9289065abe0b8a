# SPDX-License-Identifier: GPL-3.0-or-later
"""Supervision for the `people` family, made from a MakeHuman folder, in its canonical space.

All persons share one canonical rest body (the mean of the sampled bodies). A person's own shape is a displacement of
that body, so garments, hair and skin need to be seen only once, on the mean: everything here is expressed in the
canonical space, in metres, Y up, facing +Z, barefoot floor at y = 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_array, csgraph
from scipy.spatial import cKDTree

from backend.families.people.config import Grids, Size
from backend.families.people.networks import BAND
from backend.training.casting import SKIRT
from backend.training.makehuman import BODY, Kit, Proxy, read_material, read_proxy

log = logging.getLogger(__name__)

DM = 0.1  # metres per MakeHuman unit
CURVED = 0.6  # of the skin, see `sample_surface`
CONTROL_HELPERS = ("helper-skirt", "helper-hair")  # helpers that carry the deformation away from the skin


# --- surfaces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Points on a surface with what is known there."""

    points: np.ndarray  # f32 [N, 3]
    normals: np.ndarray  # f32 [N, 3]
    uvs: np.ndarray  # f32 [N, 2]
    rim: np.ndarray  # f32 [N, 3]: at an open border the direction that leaves the surface, else 0
    area: float  # m^2 of the whole surface
    cap_points: np.ndarray  # f32 [M, 3] on discs that close the borders
    cap_vectors: np.ndarray  # f32 [M, 3] their normals times area


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray, face_uvs: np.ndarray, count: int, seed: int,
    curved: float = 0.0,
) -> Samples:  # fmt: skip
    """Area-uniform samples; open borders are sampled densely and marked by `rim`. With `curved` the points leave the
    flat faces by that share of Phong tessellation (Boubekeur and Alexa 2008): cheeks have no facets."""
    rng = np.random.default_rng(seed)
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    cross = np.cross(b - a, c - a)
    area = np.linalg.norm(cross, axis=1)
    pick = rng.choice(len(faces), count, p=area / area.sum())
    r1, r2 = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    bary = np.concatenate([1 - r1, r1 * (1 - r2), r1 * r2], 1)
    points = np.einsum("nk,nkc->nc", bary, vertices[faces[pick]])
    # smooth normals: plane distances to faceted garments would print the facets into the field
    vertex_normals = np.zeros_like(vertices)
    for i in range(3):
        np.add.at(vertex_normals, faces[:, i], cross)
    if curved:
        vertex_normals /= np.linalg.norm(vertex_normals, axis=1, keepdims=True) + 1e-12
        corner, normal = vertices[faces[pick]], vertex_normals[faces[pick]]
        height = ((points[:, None] - corner) * normal).sum(2)
        points = points - curved * np.einsum("nk,nk,nkc->nc", bary, height, normal)
    normals = np.einsum("nk,nkc->nc", bary, vertex_normals[faces[pick]])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    uv = np.einsum("nk,nkc->nc", bary, uvs[face_uvs[pick]])
    rim = np.zeros_like(points)
    cap_points, cap_vectors = np.zeros((0, 3)), np.zeros((0, 3))

    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    third = np.concatenate([faces[:, 2], faces[:, 0], faces[:, 1]])
    owner = np.tile(np.arange(len(faces)), 3)
    # border edges are found on positions, so that uv or part cuts that merely touch do not count
    _, weld = np.unique(np.round(vertices / 1e-5).astype(np.int64), axis=0, return_inverse=True)
    key = np.sort(weld.reshape(-1)[edges], 1)
    _, first, counts = np.unique(key, axis=0, return_index=True, return_counts=True)
    border = first[counts == 1]
    if len(border):
        p, q, t = (vertices[i] for i in (edges[border, 0], edges[border, 1], third[border]))
        out = (p + q) / 2 - t
        along = (q - p) / (np.linalg.norm(q - p, axis=1, keepdims=True) + 1e-12)
        out -= along * (out * along).sum(1, keepdims=True)
        out /= np.linalg.norm(out, axis=1, keepdims=True) + 1e-12
        steps = 12
        s = (np.arange(steps) + 0.5)[None, :, None] / steps
        edge_points = (p[:, None] * (1 - s) + q[:, None] * s).reshape(-1, 3)
        n = cross[owner[border]] / (area[owner[border], None] + 1e-12)
        points = np.concatenate([points, edge_points])
        normals = np.concatenate([normals, np.repeat(n, steps, 0)])
        rim = np.concatenate([rim, np.repeat(out, steps, 0)])
        uv = np.concatenate([uv, np.repeat(uvs[face_uvs[owner[border], 0]], steps, 0)])
        cap_points, cap_vectors = _caps(p, q, weld.reshape(-1)[edges[border]])
    return Samples(*(x.astype(np.float32) for x in (points, normals, uv, rim)), 0.5 * float(area.sum()),
                   cap_points.astype(np.float32), cap_vectors.astype(np.float32))  # fmt: skip


def _caps(p: np.ndarray, q: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fans that close border loops, sampled: border edges p -> q [E, 3] with welded vertex ids `ends` [E, 2]."""
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(ends.max() + 1,) * 2)
    loop = csgraph.connected_components(graph, directed=False)[1][ends[:, 0]]
    centre = np.stack([np.bincount(loop, p[:, i]) for i in range(3)], 1) / np.bincount(loop).clip(1)[:, None]
    c = centre[loop]
    vector = 0.5 * np.cross(p - q, c - q)  # wound against the surface's border
    rng = np.random.default_rng(0)
    parts = 24
    r1, r2 = np.sqrt(rng.random((1, parts, 1))), rng.random((1, parts, 1))
    points = (1 - r1) * c[:, None] + r1 * (1 - r2) * p[:, None] + r1 * r2 * q[:, None]
    return points.reshape(-1, 3), np.repeat(vector / parts, parts, 0)


def signed_distance(
    samples: Samples, queries: np.ndarray, far_inside: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Distance [N] to a sampled sheet: negative behind it, positive in front of it and beyond its rim.

    Near the sheet the distance to the tangent planes of the nearest samples is used, which removes the sampling error.
    Far from it one normal says little; there `far_inside(queries)` decides, by default the winding number.
    """
    stride = max(1, len(samples.points) // 12_000)  # far away a thinned set answers: a dense tree is slow there
    far, thin = cKDTree(samples.points[::stride]).query(queries, workers=2)
    index = np.repeat(thin[:, None] * stride, 4, 1)
    distance = np.repeat(far[:, None], 4, 1)
    near = far < 0.04
    distance[near], index[near] = cKDTree(samples.points).query(queries[near], k=4, workers=2)
    delta = queries[:, None] - samples.points[index]
    plane = np.einsum("nkc,nkc->nk", delta, samples.normals[index])
    nearest = distance[:, 0]
    sign = np.where(plane[:, 0] >= 0, 1.0, -1.0)
    agree = np.einsum("nkc,nc->nk", samples.normals[index], samples.normals[index[:, 0]]) > 0.8
    smooth = (plane * agree).sum(1) / agree.sum(1)
    use_plane = (nearest < 0.008) & (np.sign(smooth) == sign)
    out = np.where(use_plane, smooth, sign * nearest)
    rim = samples.rim[index[:, 0]]
    beyond = np.einsum("nc,nc->n", delta[:, 0], rim) > 0.25 * np.abs(plane[:, 0]) + 1e-4
    out = np.where(beyond & (np.abs(rim).sum(1) > 0), nearest, out)
    if far_inside is None:
        enclosed = winding_number(samples, queries[~near]) > 0.5
    else:
        enclosed = far_inside(queries[~near])
    out[~near] = np.where(enclosed, -nearest[~near], nearest[~near])
    return out.astype(np.float32)


def winding_number(samples: Samples, queries: np.ndarray, count: int = 3000) -> np.ndarray:
    """Generalised winding number [N] (Jacobson et al. 2013) of the sheet with its borders capped, by a sum over sampled
    dipoles: about 1 inside, 0 outside; good at distances well above the spacing of `count` samples."""
    inner = np.flatnonzero(np.abs(samples.rim).sum(1) == 0)
    inner = inner[:: max(1, len(inner) // count)]
    vectors = samples.normals[inner] * (samples.area / len(inner))
    points = np.concatenate([samples.points[inner], samples.cap_points])
    return _dipoles(points, np.concatenate([vectors, samples.cap_vectors]), queries.astype(np.float32)) / (4 * np.pi)


@numba.njit(cache=True)
def _dipoles(points: np.ndarray, normals: np.ndarray, queries: np.ndarray) -> np.ndarray:
    out = np.zeros(len(queries), np.float32)
    for i in range(len(queries)):
        total = 0.0
        for j in range(len(points)):
            x = points[j, 0] - queries[i, 0]
            y = points[j, 1] - queries[i, 1]
            z = points[j, 2] - queries[i, 2]
            r2 = x * x + y * y + z * z + 1e-6
            total += (normals[j, 0] * x + normals[j, 1] * y + normals[j, 2] * z) / (r2 * np.sqrt(r2))
        out[i] = total
    return out


def read_texture(path: str) -> np.ndarray:
    """An image as f32 [H, W, 4] in 0..1, top row first."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA"), np.float32) / 255


def lookup(texture: np.ndarray, uvs: np.ndarray) -> np.ndarray:
    """Bilinear texels [N, 4] at uvs [N, 2] (origin bottom-left)."""
    h, w = texture.shape[:2]
    at = [(1 - uvs[:, 1]) * h - 0.5, uvs[:, 0] * w - 0.5]
    return np.stack([ndimage.map_coordinates(texture[..., c], at, order=1, mode="nearest") for c in range(4)], 1)


# --- the canonical body -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A regular grid of signed distances over a box: values f32 [X, Y, Z] at lo + index * step."""

    lo: np.ndarray
    step: float
    values: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        at = ((points - self.lo) / self.step).T
        return ndimage.map_coordinates(self.values, at, order=1, mode="nearest")

    def nodes(self) -> np.ndarray:
        axes = [self.lo[i] + self.step * np.arange(self.values.shape[i]) for i in range(3)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)

    @staticmethod
    def over(lo: np.ndarray, hi: np.ndarray, step: float) -> Grid:
        shape = np.ceil((np.asarray(hi) - lo) / step).astype(int) + 1
        return Grid(np.asarray(lo, np.float32), step, np.zeros(shape, np.float32))


class Canonical:
    """The canonical body: template vertices, what of it is visible, and its distance field."""

    def __init__(self, kit: Kit, template: np.ndarray) -> None:
        """`template` f64 [19158, 3] metres."""
        self.kit = kit
        self.template = template
        self.eyes = read_proxy(next((kit.root / "eyes" / "low-poly").glob("*.mhclo")))
        self.eye_vertices = self.fit(self.eyes)
        self.body_faces, self.body_face_uvs = self._visible_faces()
        eye_faces, eye_uvs = self.eyes.mesh.triangles()
        self.skin = sample_surface(
            template, self.body_faces, kit.base.uvs, self.body_face_uvs, 350_000, seed=1, curved=CURVED
        )
        head = self.skin.points[:, 1] > template[BODY, 1].max() - 0.30
        fine = sample_surface(  # the face is a small part of the area but most of what people look at
            template, *self._faces_above(template[BODY, 1].max() - 0.30), 250_000, seed=2, curved=CURVED
        )
        self.skin = _join(_take(self.skin, ~head), fine)
        # the sockets' rims touch the eyeballs, so the union of both is closed: rims must not count as borders
        self.skin = replace(self.skin, rim=np.zeros_like(self.skin.rim))
        self.eye = sample_surface(self.eye_vertices, eye_faces, self.eyes.mesh.uvs, eye_uvs, 60_000, seed=3)
        surface = _join(self.skin, self.eye)
        top = template[BODY].max(0)
        bottom = template[BODY].min(0)
        self.grids = {
            "whole": Grid.over(bottom - 0.05, top + 0.05, 0.006),
            "head": Grid.over(np.array([-0.13, top[1] - 0.30, -0.14]), np.array([0.13, top[1] + 0.03, 0.20]), 0.0025),
        }
        for side, sign in (("hand_l", 1), ("hand_r", -1)):
            hand = template[BODY][sign * template[BODY, 0] > 0.72 * top[0]]
            self.grids[side] = Grid.over(hand.min(0) - 0.015, hand.max(0) + 0.015, 0.0022)
        surface, open_air = self._seal(surface, self.grids["head"])
        whole = self.grids["whole"]
        values = signed_distance(surface, whole.nodes(), lambda q: np.zeros(len(q), bool)).reshape(whole.values.shape)
        # what the outside cannot reach through the open is inside
        regions, _ = ndimage.label(values > 0.012)
        values[(regions > 0) & (regions != regions[0, 0, 0])] *= -1
        self.grids["whole"] = whole = replace(whole, values=values)
        for name in ("head", "hand_l", "hand_r"):
            grid = self.grids[name]
            values = signed_distance(surface, grid.nodes(), lambda q: whole(q) < 0)
            values = values.reshape(grid.values.shape)
            if name == "head":  # nothing open may be left behind lips and lids
                values = np.where(open_air, values, -np.abs(values) - 1e-4)
            self.grids[name] = replace(grid, values=values.astype(np.float32))

    def _seal(self, surface: Samples, grid: Grid) -> tuple[Samples, np.ndarray]:
        """Close slits narrower than about 4 mm (between the lips, behind the lids): the samples that face open air,
        and where on the head's grid open air can be."""
        shape = grid.values.shape
        distance = cKDTree(surface.points).query(grid.nodes(), distance_upper_bound=0.012, workers=2)[0].reshape(shape)
        regions, _ = ndimage.label(distance > 0.002)
        reach = ndimage.distance_transform_edt(regions != regions[0, -1, -1]) * grid.step  # front upper corner: open
        probe = ((surface.points + 0.0035 * surface.normals - grid.lo) / grid.step).T
        inside = ((probe.T > 0) & (np.array(shape) - 1 > probe.T)).all(1)
        facing = ndimage.map_coordinates(reach, probe, order=1, mode="nearest") < 0.002
        keep = ~inside | facing
        log.info("sealed: %d of %d samples face no open air", int((~keep).sum()), len(keep))
        is_skin = np.arange(len(surface.points)) < len(self.skin.points)
        self.skin, self.eye = _take(surface, keep & is_skin), _take(surface, keep & ~is_skin)
        return _take(surface, keep), reach < 0.0045

    def fit(self, proxy: Proxy) -> np.ndarray:
        """Vertices in metres. Fitting in decimetres keeps the files' own offsets."""
        return proxy.fit(self.template / DM) * DM

    def _faces_above(self, y: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keep = self.template[self.body_faces, 1].min(1) > y - 0.02
        return self.body_faces[keep], self.kit.base.uvs, self.body_face_uvs[keep]

    def _visible_faces(self) -> tuple[np.ndarray, np.ndarray]:
        """Skin faces that some ray leaves: drops the mouth cavity and the sockets behind the eyeballs."""
        import trimesh
        from trimesh.ray.ray_pyembree import RayMeshIntersector

        faces, uvs = self.kit.base.triangles(self.kit.base.groups["body"])
        eye_faces, _ = self.eyes.mesh.triangles()
        scene = trimesh.Trimesh(
            np.concatenate([self.template, self.eye_vertices]),
            np.concatenate([faces, eye_faces + len(self.template)]),
            process=False,
        )
        rays = RayMeshIntersector(scene)
        centres = self.template[faces].mean(1)
        normals = scene.face_normals[: len(faces)]
        rng = np.random.default_rng(0)
        seen = np.zeros(len(faces), bool)
        for _ in range(48):
            direction = rng.normal(size=centres.shape)
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            direction *= np.where((direction * normals).sum(1, keepdims=True) < 0, -1, 1)
            todo = ~seen
            seen[todo] |= ~rays.intersects_any(centres[todo] + 1e-4 * normals[todo], direction[todo])
        return faces[seen], uvs[seen]

    def sdf(self, points: np.ndarray) -> np.ndarray:
        """Body distance [N] from the finest grid that holds each point."""
        out = self.grids["whole"](points)
        for name in ("head", "hand_l", "hand_r"):
            grid = self.grids[name]
            hi = grid.lo + grid.step * (np.array(grid.values.shape) - 1)
            inside = ((points > grid.lo) & (points < hi)).all(1)
            out[inside] = grid(points[inside])
        return out

    def gradient(self, points: np.ndarray, h: float = 0.004) -> np.ndarray:
        g = np.stack([self.sdf(points + h * e) - self.sdf(points - h * e) for e in np.eye(3)], 1)
        return g / (np.linalg.norm(g, axis=1, keepdims=True) + 1e-9)


def _take(s: Samples, which: np.ndarray) -> Samples:
    return Samples(s.points[which], s.normals[which], s.uvs[which], s.rim[which], s.area * float(which.mean()),
                   s.cap_points, s.cap_vectors)  # fmt: skip


def _join(*many: Samples) -> Samples:
    def joined(field: str) -> np.ndarray:
        return np.concatenate([getattr(s, field) for s in many])

    return Samples(joined("points"), joined("normals"), joined("uvs"), joined("rim"), sum(s.area for s in many),
                   joined("cap_points"), joined("cap_vectors"))  # fmt: skip


# --- items: garments and hair -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One garment or hair style on the canonical body: its distances at the nodes of volumes, and coloured points."""

    part: str  # hair, top, bottom, shoes, accessory
    name: str
    base: list[np.ndarray]  # per volume f32 [X, Y, Z]: distance to the surface, carried on where the cloth ends
    edge: list[
        np.ndarray
    ]  # per volume f32, coarser: distance to the borders, positive beyond; -0.1 where there is none
    surface: np.ndarray  # f32 [M, 3]
    color: np.ndarray  # f32 [M, 3] as in the kit's texture


def cloth_item(
    canonical: Canonical, proxy: Proxy, part: str, faces_kept: np.ndarray, name: str, grids: Sequence[Grids]
) -> Item:
    """A garment of the kit: an open sheet around the body, taken as a solid that reaches into the body."""
    vertices = canonical.fit(proxy)
    faces, uvs = proxy.mesh.triangles(faces_kept)
    centre = vertices[faces].mean(1)
    normal = np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12
    if part != "accessory":  # linings look at the body; the solid has no inside to line
        keep = (normal * canonical.gradient(centre)).sum(1) > -0.35
        faces, uvs = faces[keep], uvs[keep]
    samples = sample_surface(vertices, faces, proxy.mesh.uvs, uvs, 400_000, seed=4)
    material = read_material(proxy.material)
    texture = read_texture(material["diffuseTexture"])
    rgb = lookup(texture, samples.uvs)[:, :3]
    if "aomapTexture" in material:
        ao = read_texture(material["aomapTexture"])[..., :3]
        # black where another piece of the outfit lay
        rgb = rgb * np.maximum(lookup(np.concatenate([ao, ao[..., :1]], -1), samples.uvs)[:, :3], 0.6) ** 0.7
    base, edge = [], []
    for g in grids:
        edge.append(np.full(g.volume.shape(g.edge_step), -0.1, np.float32))
        if part == "accessory":
            nodes = g.volume.nodes(g.step).reshape(-1, 3).numpy()
            values = cKDTree(samples.points).query(nodes, workers=2)[0] - 0.005  # a shell: brims have a body
            base.append(np.clip(values, -BAND, BAND).astype(np.float32).reshape(g.volume.shape(g.step)))
            continue
        base.append(carried_on(canonical, samples, g))
        coarse = g.volume.nodes(g.edge_step).reshape(-1, 3).numpy()
        values = border_distance(samples, coarse, canonical.sdf(coarse)).reshape(edge[-1].shape)
        edge[-1] = np.clip(ndimage.gaussian_filter(values, 0.6), -0.1, 0.1)
    return Item(part, name, base, edge, samples.points, rgb.astype(np.float32))


def border_distance(samples: Samples, queries: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
    """Distance [N] to the rim of a sheet: positive beyond it, negative where the sheet is; -0.3 if it has no rim.

    Which side of the rim a point is on is hard to tell far from the sheet: points above or below all of it are beyond,
    and so are those next to the skin (`body` distance [N]) of head, chest and arms that lie away from it.
    """
    rims = np.flatnonzero(np.abs(samples.rim).sum(1) > 0)
    if len(rims) == 0:
        return np.full(len(queries), -0.3, np.float32)
    rims = rims[:: max(1, len(rims) // 6000)]
    inner = np.flatnonzero(np.abs(samples.rim).sum(1) == 0)
    kept = np.concatenate([inner[:: max(1, len(inner) // 60_000)], rims])
    distance = cKDTree(samples.points[rims]).query(queries, workers=2)[0]
    index = kept[cKDTree(samples.points[kept]).query(queries, workers=2)[1]]
    delta = queries - samples.points[index]
    plane = np.abs((delta * samples.normals[index]).sum(1))
    beyond = (delta * samples.rim[index]).sum(1) > 0.25 * plane + 1e-4
    low, high = samples.points[:, 1].min() - 0.004, samples.points[:, 1].max() + 0.004
    beyond |= (queries[:, 1] > high) | (queries[:, 1] < low)
    if body is not None:
        off = np.linalg.norm(delta, axis=1) > 0.03
        beyond |= off & (np.abs(body) < 0.03) & ((queries[:, 1] > 1.1) | (np.abs(queries[:, 0]) > 0.28))
    return np.where(beyond, distance, -distance).astype(np.float32)


def carried_on(canonical: Canonical, samples: Samples, grids: Grids) -> np.ndarray:
    """Signed distance at grid nodes to a sheet, continued beyond its rim at the thickness that it ends with, so that
    another garment's borders may be put on it; at least 3 mm outside of the skin."""
    shape = grids.volume.shape(grids.step)
    nodes = grids.volume.nodes(grids.step).reshape(-1, 3).numpy()
    body = canonical.sdf(nodes)
    thin = samples.points[:: max(1, len(samples.points) // 15_000)]
    near = np.isfinite(cKDTree(thin).query(nodes, distance_upper_bound=0.045, workers=2)[0]) | (np.abs(body) < 0.04)
    # far from everything only the side counts: inside the body, or enclosed by the sheet as between legs in a skirt
    enclosed = np.zeros(len(nodes))
    far = ~near & (body > 0)
    coarse = grids.volume.nodes(4 * grids.step)
    winding = winding_number(samples, coarse.reshape(-1, 3).numpy()).reshape(coarse.shape[:3])
    local = (grids.volume.local(torch.from_numpy(nodes[far])).numpy() + 1) / 2 * (np.array(winding.shape) - 1)
    enclosed[far] = ndimage.map_coordinates(winding, local.T, order=1, mode="nearest")
    base = np.where((body < 0) | (enclosed > 0.5), -BAND, BAND)

    border, sheet, thickness = np.full(len(nodes), 0.3), np.full(len(nodes), 1.0), np.zeros(len(nodes))
    border[near] = border_distance(samples, nodes[near], body[near])
    rimless = replace(samples, rim=np.zeros_like(samples.rim))
    sheet[near] = signed_distance(rimless, nodes[near], lambda q: canonical.sdf(q) < 0)
    held = border < -0.004
    thickness[held] = (body - sheet)[held]
    known = (held & (np.abs(sheet) < 0.02) & (np.abs(thickness) < 0.06)).reshape(shape)
    at = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    spread = np.clip(thickness.reshape(shape)[tuple(at)], 0.003, 0.03)
    spread = ndimage.gaussian_filter(spread, 2.0).ravel()
    t = np.clip((border - 0.002) / 0.016, 0, 1)
    t = t * t * (3 - 2 * t)
    base[near] = (sheet * (1 - t) + (body - spread) * t)[near]
    return np.clip(np.minimum(base, body - 0.003), -BAND, BAND).astype(np.float32).reshape(shape)


def hair_item(canonical: Canonical, proxy: Proxy, name: str, grids: Sequence[Grids]) -> Item:
    """Alpha-cut cards become one smooth volume around the skull, trimmed where it would hide the eyes."""
    rng = np.random.default_rng(hash_name(name))
    vertices = canonical.fit(proxy)
    head = canonical.template[BODY, 1].max() - 0.10
    centre = np.array([0, head, 0.02])
    vertices = vertices + 0.002 * (vertices - centre) / (
        np.linalg.norm(vertices - centre, axis=1, keepdims=True) + 1e-9
    )
    faces, uvs = proxy.mesh.triangles()
    samples = sample_surface(vertices, faces, proxy.mesh.uvs, uvs, 600_000, seed=5)
    rgba = lookup(read_texture(read_material(proxy.material)["diffuseTexture"]), samples.uvs)
    opaque = rgba[:, 3] > 0.5
    cards, rgb = samples.points[opaque], rgba[opaque, :3]
    tree = cKDTree(cards)
    grid = Grid.over(cards.min(0) - 0.04, cards.max(0) + 0.04, 0.0035)
    nodes = grid.nodes()
    shape = grid.values.shape
    distance, nearest = tree.query(nodes, distance_upper_bound=0.03, workers=2)
    body = canonical.sdf(nodes)
    # hair sits on the scalp: no slit between the skin and cards that are over it
    under = np.zeros(len(nodes), bool)
    at = np.flatnonzero(np.isfinite(distance) & (np.abs(body) < 0.03))
    delta, out = cards[nearest[at]] - nodes[at], canonical.gradient(nodes[at])
    rise = (delta * out).sum(1)
    under[at] = (rise > 0) & (np.linalg.norm(delta - rise[:, None] * out, axis=1) < 0.006)
    solid = (distance < 0.005).reshape(shape)
    grown = ndimage.distance_transform_edt(~solid) * grid.step < 0.009  # close gaps of up to 2 cm
    closed = ndimage.distance_transform_edt(grown) * grid.step > 0.009
    solid = ndimage.binary_fill_holes(solid | closed | under.reshape(shape))
    sdf = (ndimage.distance_transform_edt(~solid) - ndimage.distance_transform_edt(solid)) * grid.step
    near = (distance < 0.02).reshape(shape)  # smooth near the cards, which are no voxels
    sdf = np.where(near & (np.abs(distance.reshape(shape) - 0.005 - sdf) < grid.step),
                   distance.reshape(shape) - 0.005, sdf)  # fmt: skip
    sdf = ndimage.gaussian_filter(sdf, 1.2) + 0.0015
    # fringes end above the brows: an ellipse before the face is kept clear
    across = nodes[:, 0] / 0.062, (nodes[:, 1] - canonical.eye_vertices[:, 1].mean() + 0.035) / 0.062
    clear = np.maximum(np.hypot(*across) - 1, (0.05 - nodes[:, 2]) / 0.07) * 0.07
    sdf = np.maximum(sdf, -clear.reshape(shape))
    field = Grid(grid.lo, grid.step, sdf.astype(np.float32))
    cells = nodes[(np.abs(field.values) < 0.0035).ravel()]
    surface = cells[rng.integers(len(cells), size=600_000)] + rng.uniform(-0.0015, 0.0015, (600_000, 3))
    color = rgb[_outermost(field, tree, surface)]
    base = [
        np.clip(field(g.volume.nodes(g.step).reshape(-1, 3).numpy()), -BAND, BAND).reshape(g.volume.shape(g.step))
        for g in grids
    ]
    edge = [np.full(g.volume.shape(g.edge_step), -0.1, np.float32) for g in grids]
    return Item("hair", name, base, edge, surface.astype(np.float32), color.astype(np.float32))


def _outermost(field: Grid, tree: cKDTree, points: np.ndarray, count: int = 12) -> np.ndarray:
    """Of the cards' samples near each of `points` on the hair's surface the one that is seen: the outermost."""
    h = field.step
    normal = np.stack([field(points + h * e) - field(points - h * e) for e in np.eye(3)], 1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    distance, index = tree.query(points, k=count, workers=2)
    height = np.einsum("nkc,nc->nk", tree.data[index] - points[:, None], normal)
    height[distance > distance[:, :1] + 0.004] = -np.inf
    return np.take_along_axis(index, height.argmax(1)[:, None], 1)[:, 0]


def kit_items(canonical: Canonical, size: Size) -> Iterator[tuple[str, str, Callable[[], Item]]]:
    """Part, name and maker of every garment, shoe, hat and hair style of the kit, and of the skirt that others are cut
    from."""
    kit = canonical.kit
    for name, entry in kit.garments().items():
        for piece in entry["parts"]:
            part = {"hat": "accessory", "outer": "top", "onepiece": "bottom"}.get(piece["label"], piece["label"])
            if name == "male_casualsuit05" and piece["label"] == "top":
                continue  # only a shirt front: taken together with its jacket
            runs = list(piece["faces"])
            if piece["label"] == "outer":
                runs += [r for p in entry["parts"] if p["label"] == "top" for r in p["faces"]]
            kept = np.concatenate([np.arange(a, b + 1) for a, b in runs])
            called = f"{name}/{piece['label']}"
            yield part, called, partial(
                lambda file, *rest: cloth_item(canonical, read_proxy(kit.root / file), *rest),
                entry["file"], part, kept, called, size.shape[part]
            )  # fmt: skip
    for folder in sorted(p for p in (kit.root / "hair").iterdir() if p.is_dir()):
        yield "hair", folder.name, partial(
            lambda folder: hair_item(
                canonical, read_proxy(next(folder.glob("*.mhclo"))), folder.name, size.shape["hair"]
            ), folder
        )  # fmt: skip
    yield "bottom", SKIRT, partial(skirt_item, canonical, size.shape["bottom"])


def skirt_item(canonical: Canonical, grids: Sequence[Grids]) -> Item:
    """The kit's long straight skirt helper; skirts of any length are cut from it."""
    faces, uvs = canonical.kit.base.triangles(canonical.kit.base.groups["helper-skirt"])
    samples = sample_surface(canonical.template, faces, canonical.kit.base.uvs, uvs, 200_000, seed=6)
    base = []
    for g in grids:
        nodes = g.volume.nodes(g.step).reshape(-1, 3).numpy()
        values = np.minimum(signed_distance(samples, nodes), canonical.sdf(nodes) - 0.004)
        base.append(np.clip(values, -BAND, BAND).reshape(g.volume.shape(g.step)))
    edge = [np.full(g.volume.shape(g.edge_step), -BAND, np.float32) for g in grids]
    return Item("bottom", SKIRT, base, edge, samples.points, np.full((len(samples.points), 3), 0.5, np.float32))


# --- skin -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SkinAtlas:
    """Coloured points of the body surface: every skin, iris and brow of the kit at the same points."""

    points: np.ndarray  # f32 [N, 3]
    is_eye: np.ndarray  # bool [N]
    skins: np.ndarray  # u8 [S, N, 3]
    irises: np.ndarray  # u8 [I, N, 3], 0 away from the eyes
    brows: np.ndarray  # u8 [K, N], opacity
    skin_names: tuple[str, ...]
    iris_names: tuple[str, ...]
    brow_names: tuple[str, ...]


def skin_atlas(canonical: Canonical, count: int = 500_000) -> SkinAtlas:
    kit, rng = canonical.kit, np.random.default_rng(7)
    height = canonical.template[BODY, 1].max()
    skin, eye = canonical.skin, canonical.eye
    face = (skin.points[:, 1] > height - 0.26) & (skin.points[:, 2] > -0.02)
    weight = np.where(face, 3.0, np.where(np.abs(skin.points[:, 0]) > 0.35, 1.5, 1.0))
    pick = rng.choice(len(skin.points), count, replace=False, p=weight / weight.sum())
    eye_pick = rng.integers(len(eye.points), size=60_000)
    points = np.concatenate([skin.points[pick], eye.points[eye_pick]])
    uvs = np.concatenate([skin.uvs[pick], eye.uvs[eye_pick]])
    is_eye = np.arange(len(points)) >= count
    textures = {}
    for path in sorted((kit.root / "skins").rglob("*.mhmat")):
        textures[path.stem] = read_material(path)["diffuseTexture"]
    skins = np.stack([to_u8(lookup(read_texture(t), uvs)[:, :3]) for t in textures.values()])
    eyes = {p.stem: read_material(p)["diffuseTexture"] for p in sorted((kit.root / "eyes/materials").glob("*.mhmat"))}
    irises = np.stack([to_u8(lookup(read_texture(t), uvs)[:, :3]) for t in eyes.values()]) * is_eye[None, :, None]
    brows, brow_names = [], []
    for folder in sorted((kit.root / "eyebrows").iterdir()):
        proxy = read_proxy(next(folder.glob("*.mhclo")))
        faces, face_uvs = proxy.mesh.triangles()
        samples = sample_surface(canonical.fit(proxy), faces, proxy.mesh.uvs, face_uvs, 60_000, seed=8)
        alpha = lookup(read_texture(read_material(proxy.material)["diffuseTexture"]), samples.uvs)[:, 3]
        # as a decal is seen from the front
        distance, index = cKDTree(samples.points[:, :2]).query(points[:, :2], distance_upper_bound=0.0012, workers=2)
        depth = points[:, 2] - samples.points[np.minimum(index, len(alpha) - 1), 2]
        hit = np.isfinite(distance) & ~is_eye & (np.abs(depth) < 0.01)
        brows.append(to_u8(np.where(hit, alpha[np.minimum(index, len(alpha) - 1)], 0)))
        brow_names.append(folder.name)
    return SkinAtlas(
        points, is_eye, skins, irises.astype(np.uint8), np.stack(brows), tuple(textures), tuple(eyes), tuple(brow_names)
    )


def to_u8(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


def hash_name(name: str) -> int:
    """A stable seed from a name (Python's own hash differs from run to run)."""
    import zlib

    return zlib.crc32(name.encode())


def open_kit(folder: str | Path) -> Kit:
    """The kit at `folder`; raises FileNotFoundError with advice when it is none."""
    root = Path(folder)
    if not (root / "3dobjs" / "base.obj").exists():
        raise FileNotFoundError(f"{root} holds no MakeHuman assets: 3dobjs/base.obj is missing.")
    return Kit(root)
