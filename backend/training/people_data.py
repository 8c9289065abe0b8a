# SPDX-License-Identifier: GPL-3.0-or-later
"""The training set of the `people` family on disk: made once per MakeHuman folder and size, a few minutes of CPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

from backend.families.people.config import BODY_DIM, BROWS, EYES, FRONT, ROUGHNESS, SIZES, Size
from backend.families.people.networks import BodyField, skin_boxes
from backend.networks.volumes import Side
from backend.training.canonical import CONTROL_HELPERS, DM, Canonical, Item, kit_items, open_kit, skin_atlas
from backend.training.casting import Casting, cast
from backend.training.makehuman import BODY, Kit
from backend.training.materials import face_roughness
from backend.training.splat import splat
from backend.training.splits import seeds

log = logging.getLogger(__name__)

ATTRIBUTES = ("gender", "age", "height_m", "muscle", "weight", "african", "asian", "caucasian")
FACE_WEIGHT = 2.5  # of the head's points in the body basis: faces are looked at more than bellies
BASIS_PEOPLE = 1500  # bodies that the basis is made from; the template is their mean


def build(kit_folder: Path, out: Path, size_name: str = "small", people: int = 4000) -> None:
    """Write everything that the fit needs to `out`: castings' bodies, the body's field, skins, and an npz per item."""
    kit, size = open_kit(kit_folder), SIZES[size_name]
    out.mkdir(parents=True, exist_ok=True)
    log.info("casting %d people", people)
    castings = [cast(kit, seed) for seed in seeds("train", people)]
    canonical = Canonical(kit, _bodies(kit, castings, out))
    field = _body_field(canonical, size, out)
    if not (out / "skin.npz").exists():
        log.info("skins")
        _skins(canonical, field, size, out)
    (out / "items").mkdir(exist_ok=True)
    listing = []
    for i, (part, name, make) in enumerate(kit_items(canonical, size)):
        listing.append({"part": part, "name": name, "file": f"items/{i:02d}.npz"})
        if not (out / listing[-1]["file"]).exists():  # a killed run goes on here
            log.info("item %s", name)
            _save(out / listing[-1]["file"], **_item_arrays(make(), field, size))
    (out / "items.json").write_text(json.dumps(listing, indent=1), encoding="utf-8")


def _save(path: Path, **arrays: object) -> None:
    """Written beside and renamed, so that what is there is whole."""
    found = {k: np.asarray(v) for k, v in arrays.items()}
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **{k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in found.items()})  # type: ignore[arg-type]
    temporary.replace(path)


# --- bodies -----------------------------------------------------------------------------------------------------------


def control_points(kit: Kit, template: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points that carry the deformation: anchors (base vertices of body, skirt and hair helper) [A] and controls
    as means of four anchors each [P, 4].

    Controls are the anchors themselves plus edge midpoints and centres of large quads: the blend of neighbours'
    displacements is only smooth where control points are dense compared with the limbs.
    """
    groups = kit.base.groups
    quads = np.concatenate([kit.base.quads[groups["body"]]] + [kit.base.quads[groups[g]] for g in CONTROL_HELPERS])
    anchors = np.unique(quads)
    size = np.linalg.norm(template[quads[:, 0]] - template[quads[:, 2]], axis=1)
    large = quads[(size > 0.012) & (quads[:, 0] < BODY.stop)]
    edges = np.unique(np.sort(np.concatenate([large[:, [i, (i + 1) % 4]] for i in range(4)]), 1), axis=0)
    controls = np.concatenate([np.repeat(anchors[:, None], 4, 1), large, edges[:, [0, 0, 1, 1]]])
    return anchors, np.searchsorted(anchors, controls)


def rest_bodies(kit: Kit, castings: list[Casting]) -> np.ndarray:
    """Rest shapes f32 [B, 19158, 3] in metres, barefoot on y = 0."""
    sliders = {k: np.array([c.sliders[k] for c in castings]) for k in castings[0].sliders}
    vertices = kit.people(sliders, np.stack([c.details for c in castings])) * DM
    vertices[..., 1] -= vertices[:, BODY, 1].min(1)[:, None]
    return vertices


def _bodies(kit: Kit, castings: list[Casting], out: Path) -> np.ndarray:
    """body.npz: basis of control points and joints, everybody's coefficients and attributes, skin weights. Returns
    the template f64 [19158, 3]."""
    if (out / "body.npz").exists():
        return np.load(out / "body.npz")["template"].astype(np.float64)
    names, parents, weights = kit.rig_weights()
    bones, joints = kit.rig
    basis_people = min(BASIS_PEOPLE, len(castings))
    batches = [rest_bodies(kit, castings[i : min(i + 250, basis_people)]) for i in range(0, basis_people, 250)]
    template = np.mean([b.mean(0, dtype=np.float64) * len(b) for b in batches], 0) * len(batches)
    template /= sum(len(b) for b in batches)
    template[:, 1] -= template[BODY, 1].min()
    anchors, controls = control_points(kit, template)

    def points_of(v: np.ndarray) -> np.ndarray:
        ends = [[v[..., joints[bones[n][end]], :].mean(-2) for n in names] for end in ("head", "tail")]
        return np.concatenate([v[..., anchors, :], np.stack(ends[0] + ends[1], -2)], -2)

    rest = points_of(template)
    flat, heights = [], []
    for i in range(0, len(castings), 250):
        batch = batches[i // 250] if i < basis_people else rest_bodies(kit, castings[i : i + 250])
        heights.append(batch[:, BODY, 1].max(1))
        flat.append((points_of(batch) - rest).astype(np.float32).reshape(len(batch), -1))
    del batches
    delta = np.concatenate(flat)
    basis_of = delta[:basis_people]
    importance = np.where(np.arange(len(rest)) < len(anchors), 1.0, 1.0)
    importance[: len(anchors)][(template[anchors, 1] > 1.40) & (np.abs(template[anchors, 0]) < 0.13)] = FACE_WEIGHT
    w = np.repeat(importance, 3).astype(np.float32)
    mean = basis_of.mean(0)
    centred = (basis_of - mean) * w
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    order = np.argsort(values)[::-1][:BODY_DIM]
    spread = np.sqrt(values[order] / len(centred))
    axes = (vectors[:, order] / np.sqrt(values[order])).T @ centred  # orthonormal in weighted space
    coefficients = ((delta - mean) * w) @ axes.T / spread
    basis = axes * spread[:, None] / w
    rest = rest + mean.reshape(-1, 3)
    error = np.abs(delta[:200] - mean - coefficients[:200] @ basis)
    log.info("body basis: %.3f mm mean, %.2f mm 99.9%% error", error.mean() * 1e3, np.quantile(error, 0.999) * 1e3)
    sliders = {k: np.array([c.sliders[k] for c in castings]) for k in castings[0].sliders}
    attributes = sliders | {"height_m": np.concatenate(heights)}
    skin_indices, skin_weights = _control_skin(weights, template, anchors, controls)
    _save(
        out / "body.npz",
        rest=rest, basis=basis.reshape(BODY_DIM, -1, 3), controls=controls.astype(np.int32), coefficients=coefficients,
        attributes=np.stack([attributes[a] for a in ATTRIBUTES], 1), body_anchors=int((anchors < BODY.stop).sum()),
        skin_indices=skin_indices, skin_weights=skin_weights, parents=np.array(parents), names=np.array(names),
        seeds=np.array([c.seed for c in castings]), template=template,
    )  # fmt: skip
    return template


def _control_skin(
    weights: np.ndarray, template: np.ndarray, anchors: np.ndarray, controls: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Four bones and weights per control point."""
    skin = weights.copy()
    empty = skin[BODY].sum(1) == 0
    if empty.any():  # a few vertices have weights only in bones that the small rig lacks
        nearest = cKDTree(template[BODY][~empty]).query(template[BODY][empty])[1]
        skin[BODY][empty] = skin[BODY][~empty][nearest]
    dense = skin[anchors][controls].mean(1)
    dense[dense.sum(1) == 0, 0] = 1
    top = np.argsort(-dense, 1)[:, :4]
    values = np.take_along_axis(dense, top, 1)
    return top.astype(np.uint8), (values / values.sum(1, keepdims=True)).astype(np.float32)


# --- the canonical body -----------------------------------------------------------------------------------------------


def _body_field(canonical: Canonical, size: Size, out: Path) -> BodyField:
    """field.npz: the body's distance and facing, at the nodes of the size's grids."""
    field = BodyField(size)
    with torch.no_grad():
        for bank, (volume, step) in zip(field.distance, size.body, strict=True):
            nodes = volume.nodes(step).reshape(-1, 3).numpy()
            bank.basis.copy_(torch.from_numpy(canonical.sdf(nodes)).reshape(bank.basis.shape))
        for bank, (volume, step) in zip(field.guide, size.guide, strict=True):
            # smoothed well beyond features such as noses, so that neighbours face alike
            fine = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape(step)), indexing="ij"), -1)
            values = canonical.sdf(volume.nodes(step).reshape(-1, 3).numpy()).reshape(fine.shape[:3])
            smooth = ndimage.gaussian_filter(values, 1.5)
            bank.basis.copy_(torch.from_numpy(np.stack(np.gradient(smooth, step)).astype(np.float32)))
    _save(out / "field.npz", **{k: v.numpy() for k, v in field.state_dict().items()},
          bounds_low=canonical.template[BODY].min(0), bounds_high=canonical.template[BODY].max(0))  # fmt: skip
    return field


def facing_of(field: BodyField, points: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return field.facing(torch.from_numpy(points.astype(np.float32))).numpy()


def _skins(canonical: Canonical, field: BodyField, size: Size, out: Path) -> None:
    """skin.npz: planes of every skin, brow and iris."""
    atlas = skin_atlas(canonical)
    skin = ~atlas.is_eye
    points, facing = atlas.points, facing_of(field, atlas.points)
    means = np.stack([s[skin].mean(0) / 255 for s in atlas.skins])
    first = skin & in_front(points)
    tones = [
        [
            p
            for volume, sides in skin_boxes(size)
            for at in (first if volume is FRONT else skin,)
            for p in splat(volume, sides, points[at], facing[at], s[at] / 255 / m - 1)
        ]
        for s, m in zip(atlas.skins, means, strict=True)
    ]
    arrays: dict[str, np.ndarray] = {"skin_palettes": means}
    arrays |= {f"skin_{i}": np.stack(planes) for i, planes in enumerate(zip(*tones, strict=True))}
    front = (Side(2, 1, size.brow),)
    arrays["brow_0"] = np.stack(
        [splat(BROWS, front, points[first], facing[first], b[first, None] / 255)[0] for b in atlas.brows]
    )
    front = (Side(2, 1, size.eye),)
    eye = atlas.is_eye
    irises = [
        splat(EYES, front, points[eye], facing[eye], _natural(str(name), c[eye] / 255))[0]
        for name, c in zip(atlas.iris_names, atlas.irises, strict=True)
    ]
    arrays["iris_0"] = np.stack(irises)
    seen = in_front(points)
    arrays["eye_0"] = splat(EYES, front, points[seen], facing[seen], eye[seen, None].astype(np.float32))[0][None]
    lashes = lash_line(points[seen], eye[seen])[:, None]
    arrays["lash_0"] = splat(EYES, front, points[seen], facing[seen], lashes)[0][None]
    rough = face_roughness(canonical.kit, canonical.template, points[first])[:, None] - ROUGHNESS["body"]
    arrays["gloss_0"] = splat(FRONT, (Side(2, 1, size.gloss),), points[first], facing[first], rough)[0][None]
    _save(out / "skin.npz", **arrays, skin_names=np.array(atlas.skin_names), iris_names=np.array(atlas.iris_names),
          brow_names=np.array(atlas.brow_names))  # fmt: skip


def _natural(name: str, rgb: np.ndarray) -> np.ndarray:
    """Iris colours; the kit's brown is blood red."""
    if name != "brown":
        return rgb
    red = np.clip((rgb[:, :1] - 2 * rgb[:, 1:2]) * 8, 0, 1)
    return rgb * (1 - red) + red * (1.5 * rgb.mean(1, keepdims=True) + 0.02) * [1.35, 0.9, 0.6]


def lash_line(points: np.ndarray, eye: np.ndarray, wide: float = 0.0016) -> np.ndarray:
    """Opacity [N] of lashes at points [N, 3] seen from the front, of which `eye` [N] are eyeball: dark along the upper
    lid, faint along the lower one, and a shadow on the eyeball below the upper lid."""
    out = np.zeros(len(points), np.float32)
    for here, there, reach, upper, lower in ((~eye, eye, wide, 0.85, 0.3), (eye, ~eye, 1.5 * wide, 0.45, 0.1)):
        sought, other = points[here, :2], points[there, :2]
        distance, index = cKDTree(other).query(sought, distance_upper_bound=1.5 * reach, workers=2)
        rise = sought[:, 1] - other[np.minimum(index, len(other) - 1), 1]
        over = (rise if there is eye else -rise) > 0.3 * np.minimum(distance, 1)
        out[here] = np.clip(1.25 - distance / reach, 0, 1) * np.where(over, upper, lower)
    return out


def in_front(points: np.ndarray, texel: float = 0.0008, depth: float = 0.002) -> np.ndarray:
    """bool [N]: nothing lies more than `depth` before the point, seen from the front: no insides of lids and lips."""
    at = np.floor((points[:, :2] - points[:, :2].min(0)) / texel).astype(np.int64) + 1
    nearest = np.full(at.max(0) + 2, -np.inf)
    np.maximum.at(nearest, (at[:, 0], at[:, 1]), points[:, 2])
    nearest = ndimage.maximum_filter(nearest, 3)
    return points[:, 2] > nearest[at[:, 0], at[:, 1]] - depth


# --- items ------------------------------------------------------------------------------------------------------------


def _item_arrays(item: Item, field: BodyField, size: Size) -> dict[str, np.ndarray]:
    """Volumes as they are; colours as tone (light and dark about the median) and hue (what that leaves)."""
    luminance = item.color @ np.array([0.3, 0.59, 0.11], np.float32)
    median = max(float(np.median(luminance)), 0.03)
    tone = np.clip(luminance / median, 0.15, 1.8)
    if item.part == "hair":  # as the sampler tints it
        tone = np.clip((luminance + 0.05) / (median + 0.05), 0.15, 1.8) ** 0.8
    palette = np.concatenate([np.median(item.color, 0), np.quantile(item.color, 0.2, axis=0)])
    hue = item.color - tone[:, None] * palette[:3]
    facing = facing_of(field, item.surface)
    arrays = {"palette": palette}
    for kind, values in (("tone", tone[:, None] - 1), ("hue", hue)):
        planes = [
            p for c in size.tex[item.part] for p in splat(c.volume, getattr(c, kind), item.surface, facing, values)
        ]
        arrays |= {f"{kind}_{i}": p for i, p in enumerate(planes)}
    for kind in ("base", "edge"):
        arrays |= {f"{kind}_{i}": v for i, v in enumerate(getattr(item, kind))}
    return arrays
