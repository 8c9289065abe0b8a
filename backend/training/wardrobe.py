# SPDX-License-Identifier: GPL-3.0-or-later
"""What a folder's clothes are, told by where they sit on an average person: for folders without `garments.json`.

Whole suits are split into their connected pieces; what covers both halves in one piece (overalls, a dress) is a
`onepiece`. What fits no part (gloves, rings) is left out.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from backend.training.makehuman import BODY, Kit, Proxy, read_proxy

log = logging.getLogger(__name__)

AVERAGE = dict.fromkeys(("gender", "muscle", "weight", "height", "proportions", "cup", "firmness"), 0.5) | {
    "age": 0.6, "african": 1.0, "asian": 1.0, "caucasian": 1.0,
}  # fmt: skip
# heights as fractions of the body's: 0 soles, 1 crown
HAT = 0.83  # hats, glasses and masks stay above the neck
SHOE = 0.30
BOTTOM = 0.68  # trousers and skirts stay below the chest
TOP = 0.40  # tops stay above the thighs
LOW_TOP, MIDDLE = 0.28, 0.55  # tunics and coats may reach to here if most of them is above the middle
TRUNK = 0.4  # decimetres from the middle plane that clothes of the trunk reach, and gloves do not
CRUMB = 0.03  # pieces with a smaller share of an outfit's faces (buttons, buckles) go with their neighbours


def classify(kit: Kit) -> dict[str, dict[str, Any]]:
    """Parts of all clothes of a kit in the form of `garments.json`: asset -> {file, gender, parts}."""
    folder = kit.root / "clothes"
    if not folder.is_dir():
        return {}
    body = kit.people({k: np.array([v]) for k, v in AVERAGE.items()})[0].astype(np.float64)
    found = {}
    for path in sorted(folder.rglob("*.mhclo")):
        try:
            proxy = read_proxy(path)
            parts = pieces(proxy, body)
        except (OSError, ValueError, KeyError, IndexError) as e:
            log.warning("%s cannot be worn: %s", path.name, e)
            continue
        if parts:
            found[path.stem] = {"file": path.relative_to(kit.root).as_posix(), "gender": _gender(path), "parts": parts}
        else:
            log.info("%s fits no part of a person and is left out", path.stem)
    return found


def pieces(proxy: Proxy, body: np.ndarray) -> list[dict[str, Any]]:
    """Parts [{label, faces, hides}] of one asset on a body [19158, 3] in decimetres; runs are inclusive."""
    vertices = proxy.fit(body)
    deleted = proxy.delete[proxy.delete < BODY.stop]
    piece = _components(proxy.mesh.quads, len(vertices))
    centre = vertices[proxy.mesh.quads].mean(1)
    big = {p: label_of(vertices[np.unique(proxy.mesh.quads[piece == p])], body)
           for p in np.unique(piece) if (piece == p).mean() >= CRUMB}  # fmt: skip
    big = {p: label for p, label in big.items() if label is not None}
    if len(set(big.values())) < 2:
        whole = label_of(vertices[np.unique(proxy.mesh.quads)], body)
        every = [[0, len(proxy.mesh.quads) - 1]]
        return [] if whole is None else [{"label": whole, "faces": every, "hides": _runs(deleted)}]
    own = np.flatnonzero(np.isin(piece, list(big)))
    nearest = own[cKDTree(centre[own]).query(centre)[1]]  # crumbs go where their nearest large piece goes
    label = np.array([big[p] for p in piece[nearest]])
    share = label[cKDTree(centre).query(body[deleted])[1]] if len(deleted) else label[:0]
    return [
        {"label": part, "faces": _runs(np.flatnonzero(label == part)), "hides": _runs(deleted[share == part])}
        for part in ("top", "bottom", "onepiece", "shoes", "hat") if (label == part).any()
    ]  # fmt: skip


def label_of(vertices: np.ndarray, body: np.ndarray) -> str | None:
    """top, bottom, shoes, hat or onepiece, by where vertices [N, 3] lie on a body; None for what is none of them."""
    low, size = body[BODY, 1].min(), np.ptp(body[BODY, 1])
    height = (vertices[:, 1] - low) / size
    bottom, top = np.quantile(height, [0.01, 0.99])  # a lace or a feather decides nothing
    if bottom > HAT:
        return "hat"
    if top < SHOE:
        return "shoes"
    if np.abs(vertices[:, 0]).min() > TRUNK:
        return None  # gloves, bracelets, earrings
    if top < BOTTOM:
        return "bottom"
    if bottom > TOP or (bottom > LOW_TOP and np.median(height) > MIDDLE):
        return "top"
    return "onepiece"


def _components(quads: np.ndarray, count: int) -> np.ndarray:
    """Connected component of each face [Q]."""
    a, b = quads.ravel(), np.roll(quads, 1, 1).ravel()
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(count, count))
    return connected_components(graph, directed=False)[1][quads[:, 0]]


def _gender(path: Path) -> str:
    words = path.stem.lower().replace("-", "_").split("_")
    return "female" if "female" in words else "male" if "male" in words else "any"


def _runs(numbers: np.ndarray) -> list[list[int]]:
    """[3, 4, 5, 9] -> [[3, 5], [9, 9]]."""
    numbers = np.unique(numbers)
    if not len(numbers):
        return []
    ends = np.flatnonzero(np.diff(numbers) > 1)
    first, last = np.concatenate([[0], ends + 1]), np.concatenate([ends, [len(numbers) - 1]])
    return [[int(a), int(b)] for a, b in zip(numbers[first], numbers[last], strict=True)]
