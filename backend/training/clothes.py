# SPDX-License-Identifier: GPL-3.0-or-later
"""Garments, hair, eyes and brows on a body: kit items that follow it, garments cut from its surface, borders, layering.

Bodies are the kit's 19158 vertices in metres. A border cuts faces where it is exactly zero, at canonical points, so
that the same trims give the same hem on every body.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numba
import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from backend.families.people.cut import borders, slack
from backend.training.makehuman import Kit, Proxy, read_material, read_proxy
from backend.training.person import LUMINANCE, smooth_normals, texels_at

DM = 0.1  # metres per MakeHuman unit
HIDE = 0.015  # metres behind a border from where on a garment hides the skin
NECK_TOP = 1.50  # canonical height above which no cut garment goes


@dataclass(frozen=True)
class Wearable:
    """An item of the kit: a mesh bound to the base mesh, of which only some faces are worn."""

    name: str
    part: str
    proxy: Proxy  # restricted to the worn faces' vertices
    faces: np.ndarray  # i64 [F, 3]
    uvs: np.ndarray  # f32 [T, 2]
    face_uvs: np.ndarray  # i64 [F, 3]
    canonical: np.ndarray  # f32 [V, 3] on the mean person
    weights: np.ndarray  # f32 [V, J]
    hides: np.ndarray  # bool [19158]
    texture: Path | None
    shading: Path | None  # ambient occlusion
    transparent: bool

    @cached_property
    def texels(self) -> np.ndarray:
        """u8 [H, W, 4]; folds of the occlusion map are multiplied in."""
        if self.texture is None:
            return np.full((1, 1, 4), 255, np.uint8)
        texels = read_image(self.texture)
        if self.shading is not None:
            with Image.open(self.shading) as image:
                size = (texels.shape[1], texels.shape[0])
                ao = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR), np.float32) / 255
            # black in it is where the outfit's other pieces were: they may not be worn now
            texels[..., :3] = np.rint(texels[..., :3] * np.maximum(ao, 0.6) ** 0.7)
        return texels

    @cached_property
    def typical(self) -> tuple[np.ndarray, float]:
        """Median colour f32 [3] and median luminance over the item's surface; of opaque places."""
        corner = self.canonical[self.faces]
        area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
        rng = np.random.default_rng(0)
        face = rng.choice(len(area), 6000, p=area / area.sum())
        r1, r2 = np.sqrt(rng.random((6000, 1))), rng.random((6000, 1))
        t = self.uvs[self.face_uvs[face]]
        rgba = texels_at(self.texels, ((1 - r1) * t[:, 0] + r1 * (1 - r2) * t[:, 1] + r1 * r2 * t[:, 2]))
        rgb = rgba[rgba[:, 3] > 0.5, :3] if (rgba[:, 3] > 0.5).any() else rgba[:, :3]
        return np.median(rgb, 0), max(float(np.median(rgb @ LUMINANCE)), 0.03)

    def fit(self, body: np.ndarray) -> np.ndarray:
        """Vertices f32 [V, 3] on a body [19158, 3], both metres."""
        # the files' offsets are decimetres
        return (self.proxy.fit(body.astype(np.float64) / DM) * DM).astype(np.float32)


def read_image(path: Path) -> np.ndarray:
    """u8 [H, W, 4], top row first."""
    with Image.open(path) as image:
        return np.array(image.convert("RGBA"))


def load(
    kit: Kit, path: Path, part: str, template: np.ndarray, rig_weights: np.ndarray, name: str,
    quads: np.ndarray | None = None, hides: np.ndarray | None = None, material: Path | None = None,
) -> Wearable:  # fmt: skip
    """Read a .mhclo file; of its faces only `quads`. `hides`: base vertices, by default the file's own list."""
    proxy = read_proxy(path)
    faces, face_uvs = proxy.mesh.triangles(quads)
    used, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3)
    if len(proxy.mesh.vertices) > len(proxy.refs):
        raise ValueError(f"{path.name} binds {len(proxy.refs)} of {len(proxy.mesh.vertices)} vertices.")
    kept = Proxy(proxy.name, proxy.folder, proxy.mesh, proxy.refs[used], proxy.weights[used], proxy.offsets[used],
                 proxy.scales, proxy.delete, proxy.material)  # fmt: skip
    # negative weights are right for positions, but would turn bones around
    weights = np.einsum("vk,vkj->vj", np.maximum(kept.weights, 0), rig_weights[kept.refs])
    hidden = np.zeros(len(kit.base.vertices), bool)
    hidden[proxy.delete if hides is None else hides] = True
    facts = read_material(material or proxy.material) if (material or proxy.material) else {}

    def image(key: str) -> Path | None:
        return Path(facts[key]) if key in facts and Path(facts[key]).is_file() else None

    return Wearable(
        name, part, kept, faces, proxy.mesh.uvs.astype(np.float32), face_uvs,
        (kept.fit(template / DM) * DM).astype(np.float32),
        (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).astype(np.float32),
        hidden, image("diffuseTexture"), image("aomapTexture"),
        transparent=part == "hair" or facts.get("transparent", "False") == "True",
    )  # fmt: skip


# --- exact borders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Faces clipped to where a scalar is negative, as linear combinations of the old vertices and UVs."""

    faces: np.ndarray  # i64 [F', 3] into `pairs`
    pairs: np.ndarray  # i64 [V', 2] old vertices: new vertex = (1 - t) first + t second
    t: np.ndarray  # f64 [V']
    face_uvs: np.ndarray  # i64 [F', 3] into the rows of `uv_pairs`
    uv_pairs: np.ndarray  # i64 [T', 2]
    uv_t: np.ndarray  # f64 [T']
    source: np.ndarray  # i64 [F'] the old face

    def vertices(self, table: np.ndarray) -> np.ndarray:
        """A table [V, C] of the old vertices at the new ones."""
        t = self.t[:, None].astype(table.dtype)
        return (1 - t) * table[self.pairs[:, 0]] + t * table[self.pairs[:, 1]]

    def uvs(self, table: np.ndarray) -> np.ndarray:
        t = self.uv_t[:, None].astype(table.dtype)
        return (1 - t) * table[self.uv_pairs[:, 0]] + t * table[self.uv_pairs[:, 1]]


def clip(faces: np.ndarray, face_uvs: np.ndarray, canonical: np.ndarray, border, steps: int = 12) -> Cut:
    """Cut faces [F, 3] along `border(points [N, 3]) = 0`, keeping where it is negative.

    On every edge that crosses the border the crossing is found by bisection, not by interpolating between the ends:
    borders have corners. Neighbours share the new vertices, so the cut has no cracks.
    """
    value = border(canonical)
    inside = value < 0
    count = inside[faces].sum(1)
    whole, mixed = np.flatnonzero(count == 3), np.flatnonzero((count > 0) & (count < 3))
    # turn mixed faces so that the odd vertex comes first
    f, u = faces[mixed], face_uvs[mixed]
    lone = inside[f] == (count[mixed] == 1)[:, None]
    turn = (np.argmax(lone, 1)[:, None] + np.arange(3)) % 3
    f, u = np.take_along_axis(f, turn, 1), np.take_along_axis(u, turn, 1)
    edges = np.concatenate([f[:, [0, 1]], f[:, [0, 2]]])
    ends, slot = np.unique(np.sort(edges, 1), axis=0, return_inverse=True)
    slot = slot.reshape(-1)
    t = _crossing(canonical[ends[:, 0]], canonical[ends[:, 1]], inside[ends[:, 0]], border, steps)

    old = len(canonical)
    new = (old + slot).reshape(2, -1)
    edge_t = np.where(edges[:, 0] == ends[slot, 0], t[slot], 1 - t[slot])  # from the face's own first vertex
    rows = int(face_uvs.max(initial=0)) + 1
    uv_new = rows + np.arange(2 * len(f)).reshape(2, -1)
    one = count[mixed] == 1
    tip = [f[one, 0], new[0, one], new[1, one]]
    tip_uv = [u[one, 0], uv_new[0, one], uv_new[1, one]]
    two = ~one
    quad = [new[0, two], f[two, 1], f[two, 2], new[1, two]]
    quad_uv = [uv_new[0, two], u[two, 1], u[two, 2], uv_new[1, two]]

    def triangles(base, tips, quads):
        a, b, c, d = quads
        return np.concatenate([base[whole], np.stack(tips, 1), np.stack([a, b, c], 1), np.stack([a, c, d], 1)])

    out, out_uv = triangles(faces, tip, quad), triangles(face_uvs, tip_uv, quad_uv)
    source = np.concatenate([whole, mixed[one], mixed[two], mixed[two]])
    plain = np.repeat(np.arange(old)[:, None], 2, 1)
    pairs, ts = np.concatenate([plain, ends]), np.concatenate([np.zeros(old), t])
    used, out = np.unique(out, return_inverse=True)
    uv_plain = np.repeat(np.arange(rows)[:, None], 2, 1)
    uv_pairs = np.concatenate([uv_plain, u[:, [0, 1]], u[:, [0, 2]]])
    return Cut(out.reshape(-1, 3), pairs[used], ts[used], out_uv, uv_pairs,
               np.concatenate([np.zeros(rows), edge_t]), source)  # fmt: skip


def _crossing(a: np.ndarray, b: np.ndarray, a_inside: np.ndarray, border, steps: int) -> np.ndarray:
    """Where between a (t = 0) and b (t = 1) the border is crossed, f64 [N], within 2^-steps, then one secant step."""
    low, high = np.zeros(len(a)), np.ones(len(a))
    if not len(a):
        return low
    a, b = a.astype(np.float64), b.astype(np.float64)
    for _ in range(steps):
        middle = (low + high) / 2
        same = (border(a + middle[:, None] * (b - a)) < 0) == a_inside
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    va, vb = border(a + low[:, None] * (b - a)), border(a + high[:, None] * (b - a))
    return low + (high - low) * np.clip(va / np.where(va == vb, 1, va - vb), 0, 1)


# --- garments cut from the body ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cloth:
    """The surface that garments are cut from."""

    faces: np.ndarray  # i64 [F, 3] base vertices
    uvs: np.ndarray  # f32 [T, 2]
    face_uvs: np.ndarray  # i64 [F, 3]


def body_cloth(kit: Kit, template: np.ndarray, part: str, head: np.ndarray) -> Cloth:
    """Body faces below the head; `head` bool [19158]."""
    faces, face_uvs = kit.base.triangles(kit.base.groups["body"])
    y = template[faces, 1]
    keep = ~head[faces].any(1) & (y.max(1) < NECK_TOP) & (y.min(1) > (0.6 if part == "top" else 0.0))
    return Cloth(faces[keep], kit.base.uvs.astype(np.float32), face_uvs[keep])


def skirt_cloth(kit: Kit, template: np.ndarray) -> Cloth:
    """The kit's skirt helper, with UVs around its axis: its own are tiny patches."""
    faces, _ = kit.base.triangles(kit.base.groups["helper-skirt"])
    p = template[faces]
    u = np.arctan2(p[..., 0], p[..., 2]) / (2 * np.pi) + 0.5
    u = np.where((u.max(1) - u.min(1) > 0.5)[:, None] & (u < 0.5), u + 1, u) / 1.25
    v = (p[..., 1] - p[..., 1].min()) / np.ptp(p[..., 1])
    return Cloth(faces, np.stack([u, v], -1).reshape(-1, 2).astype(np.float32), np.arange(faces.size).reshape(-1, 3))


def stand_off(part: str, skirt: bool, thickness: float, loose: float, template: np.ndarray) -> np.ndarray:
    """How far cut cloth is from what it is cut from, metres [V]."""
    if skirt:
        return np.full(len(template), max(0.002, 0.6 * thickness))
    return thickness + loose * slack(part, template)


def border_of(part: str, trims: tuple[float, ...]):
    """The border function of trims, of points [N, 3]."""
    return lambda points: np.asarray(borders(part, trims, points))


# --- layering ---------------------------------------------------------------------------------------------------------


def push_out(
    outer: np.ndarray, inner: np.ndarray, inner_normals: np.ndarray, gap: float, reach: float = 0.03
) -> np.ndarray:
    """`outer` vertices [V, 3] moved so that they lie at least `gap` in front of `inner` vertices [W, 3] where those
    are within `reach`; deeper than `reach` inside nothing is done."""
    if not len(inner) or not len(outer):
        return outer
    low, high = inner.min(0) - reach, inner.max(0) + reach
    near = np.flatnonzero(((outer > low) & (outer < high)).all(1))
    if not len(near):
        return outer
    distance, index = cKDTree(inner).query(outer[near], k=min(3, len(inner)), distance_upper_bound=2 * reach)
    distance, index = distance.reshape(len(near), -1), index.reshape(len(near), -1)
    ok = np.isfinite(distance)
    index = np.where(ok, index, 0)
    weight = np.where(ok, 1 / (distance + 1e-4) ** 2, 0)
    total = weight.sum(1, keepdims=True)
    weight = weight / np.maximum(total, 1e-12)
    normal = (inner_normals[index] * weight[..., None]).sum(1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    delta = outer[near] - (inner[index] * weight[..., None]).sum(1)
    depth = (delta * normal).sum(1)
    beside = np.linalg.norm(delta - depth[:, None] * normal, axis=1)
    move = np.where((total[:, 0] > 0) & (depth > -reach) & (beside < reach), np.maximum(gap - depth, 0), 0)
    move *= np.clip((reach - beside) / (0.4 * reach), 0, 1)  # fade out beyond the inner one's rim
    out = outer.copy()
    out[near] += (move[:, None] * normal).astype(outer.dtype)
    return out


@numba.njit(cache=True, nogil=True)
def tuck(inner, centre, outer, faces, gap):  # pragma: no cover (compiled)
    """`inner` vertices f64 [V, 3] drawn towards `centre` until they lie `gap` behind the `outer` mesh seen from there:
    hair under a hat. What no face is in front of stays."""
    out = inner.copy()
    for i in range(len(inner)):
        d = inner[i] - centre
        length = np.sqrt((d * d).sum())
        d = d / max(length, 1e-9)
        nearest = np.inf
        for f in range(len(faces)):  # Moeller and Trumbore 1997
            a = outer[faces[f, 0]]
            e1, e2 = outer[faces[f, 1]] - a, outer[faces[f, 2]] - a
            p = np.cross(d, e2)
            det = (e1 * p).sum()
            if abs(det) < 1e-14:
                continue
            s = centre - a
            u = (s * p).sum() / det
            if u < 0 or u > 1:
                continue
            q = np.cross(s, e1)
            v = (d * q).sum() / det
            t = (e2 * q).sum() / det
            if v >= 0 and u + v <= 1 and 0 < t < nearest:
                nearest = t
        if length > nearest - gap:
            out[i] = centre + d * (nearest - gap)
    return out


def body_normals(kit_faces: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Unit normals f64 [19158, 3] of body or helper faces."""
    return smooth_normals(body.astype(np.float64), kit_faces)
