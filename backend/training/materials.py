# SPDX-License-Identifier: GPL-3.0-or-later
"""How rough things are, 0..1 as in glTF: per item of the wardrobe, and over the skin of the face.

MakeHuman's materials were written for a Phong viewer: most clothes share one shininess. They decide where the item's
name does not: what it is made of says more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from backend.families.people.config import CLOTH, ROUGHNESS
from backend.families.people.wardrobe import CUT, SKIRT, word_of
from backend.training.makehuman import BODY, Kit, read_material

FABRIC = {
    "t-shirt": 0.88, "tank top": 0.88, "sweater": 0.92, "shirt": 0.78, "blouse": 0.62, "jacket": 0.72,
    "suit jacket": 0.74, "trousers": 0.76, "jeans": 0.82, "shorts": 0.82, "overalls": 0.84, "skirt": 0.74,
    "long skirt": 0.74, "leather shoes": 0.38, "sneakers": 0.6, "hat": 0.9, "afro": 0.62, "short": 0.46, "bob": 0.42,
    "long": 0.42, "ponytail": 0.42, "braid": 0.44,
}  # fmt: skip
"""Jersey and wool scatter, leather and smooth hair shine."""

POLISHED, GLOSS = 0.2, -0.08  # specular colour from which on a file means polish, and what that takes away
SKIN, OILY, LIPS = 0.55, 0.42, 0.30  # of cheeks, of forehead and nose, of lips
LIP_TARGETS = ("mouth-upperlip-volume-incr", "mouth-lowerlip-volume-incr")
NOSE_TARGETS = ("nose-volume-incr", "nose-point-up")
FOREHEAD = (0.0, 1.625), (0.035, 0.03)  # middle and half axes of its shiny part, seen from the front


def item_material(part: str, name: str, material: Path | None) -> tuple[float, float]:
    """Roughness and metallic of an item: of its fabric if its name is known, else of its file, else of its part."""
    facts = read_material(material) if material is not None and material.is_file() else {}
    specular = float(np.mean([float(x) for x in facts.get("specularColor", "0").split()]))
    word = SKIRT if name == SKIRT else word_of(part, name) if name != CUT else None
    if word in FABRIC:
        return FABRIC[word] + (GLOSS if POLISHED < specular < 0.9 else 0.0), 0.0  # 1 is the viewer's default
    shine = float(facts.get("shininess", 0)) * min(4 * specular, 1.0)
    return ROUGHNESS[part] * (1 - 0.6 * shine), 0.0


def face_roughness(kit: Kit, template: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Roughness [N] of skin at canonical points [N, 3]: lips and nose are where the targets that swell them move
    the template f64 [19158, 3]."""
    (x, y), (wide, high) = FOREHEAD
    brow = np.clip(1.5 - ((points[:, 0] - x) / wide) ** 2 - ((points[:, 1] - y) / high) ** 2, 0, 1)
    oily = np.maximum(brow * (points[:, 2] > 0.05), _moved(kit, template, points, NOSE_TARGETS))
    out = SKIN + oily * (OILY - SKIN)
    return (out + _moved(kit, template, points, LIP_TARGETS) * (LIPS - out)).astype(np.float32)


def _moved(kit: Kit, template: np.ndarray, points: np.ndarray, targets: tuple[str, ...]) -> np.ndarray:
    """0..1 [N]: how much the points belong to what these targets move; 0 where the kit has none of them."""
    share = np.zeros(BODY.stop)
    for name in targets:
        if name in kit.target_paths:
            index, delta = kit.target(name)
            size = np.linalg.norm(delta, axis=1)
            body = index < BODY.stop
            share[index[body]] = np.maximum(share[index[body]], size[body] / max(size.max(initial=0), 1e-9))
    distance, near = cKDTree(template[BODY]).query(points, k=4, workers=2)
    weight = 1 / (distance + 1e-4) ** 2
    value = (share[near] * weight).sum(1) / weight.sum(1)
    return np.clip((value - 0.2) / 0.35, 0, 1)


def materials(facts: Mapping[str, list], kit: Kit, part: str) -> np.ndarray:
    """f32 [items, 2] of one part's items in the order of the code, in clothes the cut garment after them."""
    files = _files(kit)
    rows = [item_material(part, item["name"], files.get(item["name"].partition("/")[0])) for item in facts[part]]
    return np.array([*rows, *[item_material(part, CUT, None)] * (part in CLOTH)], np.float32).reshape(-1, 2)


def _files(kit: Kit) -> dict[str, Path]:
    """Asset -> its material file."""
    return {path.stem: path for folder in ("clothes", "hair") for path in sorted((kit.root / folder).rglob("*.mhmat"))}
