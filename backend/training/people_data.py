# SPDX-License-Identifier: GPL-3.0-or-later
"""The training set of the `people` family on disk: made once per MakeHuman folder, a few minutes of CPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from backend.families.people.config import BODY_DIM
from backend.training.canonical import (
    CONTROL_HELPERS,
    Canonical,
    Grid,
    kit_items,
    open_kit,
    sample_bodies,
    skin_atlas,
    skirt_distance,
)
from backend.training.makehuman import BODY, Kit

log = logging.getLogger(__name__)

ATTRIBUTES = ("gender", "age", "height_m", "muscle", "weight")


def build(kit_folder: Path, out: Path, people: int = 1500, seed: int = 0) -> None:
    """Write everything training needs to `out`: body.npz, skin.npz, skirt.npz and one npz per garment or hair style."""
    kit = open_kit(kit_folder)
    out.mkdir(parents=True, exist_ok=True)
    log.info("sampling %d bodies", people)
    bodies = sample_bodies(kit, people, seed)
    template = bodies.vertices.mean(0).astype(np.float64)
    template[:, 1] -= template[BODY, 1].min()
    _body_file(kit, bodies.vertices, bodies.attributes, template, out)
    del bodies
    log.info("canonical body")
    canonical = Canonical(kit, template)
    fields = ("lo", "step", "values")
    _save(out / "grids.npz", **{f"{n}/{k}": getattr(g, k) for n, g in canonical.grids.items() for k in fields})
    log.info("skins")
    skin = skin_atlas(canonical)
    _save(out / "skin.npz", **{k: np.asarray(v) for k, v in vars(skin).items()})
    skirt = skirt_distance(canonical)
    _save(out / "skirt.npz", lo=skirt.lo, step=skirt.step, values=skirt.values)
    pool = canonical.skin.points[np.random.default_rng(1).permutation(len(canonical.skin.points))[:200_000]]
    _save(out / "pool.npz", skin=pool)
    (out / "items").mkdir(exist_ok=True)
    names = []
    for i, item in enumerate(kit_items(canonical)):
        names.append({"part": item.part, "name": item.name, "gender": item.gender, "file": f"items/{i:02d}.npz"})
        _save(
            out / names[-1]["file"], points=item.points, sdf=item.sdf, body=canonical.sdf(item.points),
            surface=item.surface, color=item.color,
        )  # fmt: skip
    (out / "items.json").write_text(json.dumps(names, indent=1), encoding="utf-8")


def _save(path: Path, **arrays: np.ndarray) -> None:
    np.savez(
        path, **{k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in map(_as_array, arrays.items())}
    )


def _as_array(item: tuple[str, object]) -> tuple[str, np.ndarray]:
    return item[0], np.asarray(item[1])


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


def _body_file(kit: Kit, vertices: np.ndarray, attributes: dict, template: np.ndarray, out: Path) -> None:
    """PCA of control points and joints; skin weights and bones of the game_engine rig."""
    names, parents, weights = kit.rig_weights()
    bones, joints = kit.rig
    body_w = weights[BODY]
    empty = body_w.sum(1) == 0
    if empty.any():  # a few vertices have weights only in bones that the small rig lacks
        from scipy.spatial import cKDTree

        nearest = cKDTree(template[BODY][~empty]).query(template[BODY][empty])[1]
        body_w[empty] = body_w[~empty][nearest]
    anchors, controls = control_points(kit, template)

    def bone_ends(v: np.ndarray) -> np.ndarray:
        ends = [[v[..., joints[bones[n][end]], :].mean(-2) for n in names] for end in ("head", "tail")]
        return np.stack(ends[0] + ends[1], -2)

    rest = np.concatenate([template[anchors], bone_ends(template)])
    count = len(vertices)
    flat = np.empty((count, rest.size), np.float32)
    for i in range(count):
        flat[i] = (np.concatenate([vertices[i][anchors], bone_ends(vertices[i])]) - rest).ravel()
    flat -= flat.mean(0)
    gram = flat @ flat.T
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    order = np.argsort(values)[::-1][:BODY_DIM]
    scale = np.sqrt(values[order] / count)
    coefficients = (vectors[:, order] * np.sqrt(count)).astype(np.float32)  # unit variance
    basis = (vectors[:, order].T @ flat) / np.sqrt(values[order])[:, None] * scale[:, None]
    error = np.abs(flat - coefficients @ basis)
    log.info(
        "body basis: %.3f mm mean, %.2f mm 99.9%% error", error.mean() * 1e3, np.quantile(error[:200], 0.999) * 1e3
    )
    skin = np.zeros((len(kit.base.vertices), len(names)), np.float32)
    skin[BODY] = body_w
    helpers = np.arange(BODY.stop, len(kit.base.vertices))
    skin[helpers] = weights[helpers]
    control_skin = skin[anchors][controls].mean(1)
    control_skin[control_skin.sum(1) == 0, 0] = 1
    top = np.argsort(-control_skin, 1)[:, :4]
    top_w = np.take_along_axis(control_skin, top, 1)
    _save(
        out / "body.npz",
        rest=rest, basis=basis.reshape(BODY_DIM, -1, 3), controls=controls.astype(np.int32), coefficients=coefficients,
        attributes=np.stack([attributes[a] for a in ATTRIBUTES], 1),
        races=np.stack([attributes[a] for a in ("african", "asian", "caucasian")], 1),
        skin_indices=top.astype(np.uint8), skin_weights=top_w / top_w.sum(1, keepdims=True),
        parents=np.array(parents), names=np.array(names), height=np.float32(template[BODY, 1].max()),
    )  # fmt: skip


def load_grids(folder: Path) -> dict[str, Grid]:
    """The canonical body's distance grids."""
    data = np.load(folder / "grids.npz")
    names = sorted({k.split("/")[0] for k in data.files})
    return {n: Grid(data[f"{n}/lo"], float(data[f"{n}/step"]), data[f"{n}/values"]) for n in names}
