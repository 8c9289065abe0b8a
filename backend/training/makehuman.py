# SPDX-License-Identifier: GPL-3.0-or-later
"""Reader of MakeHuman's native asset formats: base mesh, targets, mhclo assets, materials, rigs.

Works on MakeHuman's or MPFB's `data` folder and on any folder with the same layout. Lengths are decimetres as in the
files (y up, facing +z); `families.people` turns them into metres. All indices are 0-based.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

BODY = slice(0, 13380)  # hm08: the vertices of group "body"
_AGE_CHILD = 3 / 16  # break point of the age slider between baby and child


@dataclass(frozen=True)
class ObjMesh:
    """A polygon mesh as its .obj lists it; triangles are quads with the last corner repeated."""

    vertices: np.ndarray  # f64 [V, 3]
    uvs: np.ndarray  # f64 [T, 2], origin bottom-left
    quads: np.ndarray  # i64 [Q, 4] into vertices
    quad_uvs: np.ndarray  # i64 [Q, 4] into uvs
    groups: Mapping[str, np.ndarray]  # name -> indices into quads

    def triangles(self, which: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Quads split (0,1,2),(0,2,3) -> faces [F, 3] and their uv indices [F, 3], without collapsed ones."""
        q = self.quads if which is None else self.quads[which]
        t = self.quad_uvs if which is None else self.quad_uvs[which]
        faces = np.concatenate([q[:, [0, 1, 2]], q[:, [0, 2, 3]]])
        uvs = np.concatenate([t[:, [0, 1, 2]], t[:, [0, 2, 3]]])
        keep = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
        return faces[keep], uvs[keep]


def read_obj(path: Path) -> ObjMesh:
    """Parse the subset of OBJ that MakeHuman writes (v, vt, f with v/vt, g)."""
    vertices, uvs, quads, quad_uvs = [], [], [], []
    groups: dict[str, list[int]] = {}
    group = groups.setdefault("", [])
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(" ")
        if key == "v":
            vertices.append(rest.split()[:3])
        elif key == "vt":
            uvs.append(rest.split()[:2])
        elif key == "g":
            group = groups.setdefault(rest.strip(), [])
        elif key == "f":
            corners = [c.split("/") for c in rest.split()]
            corners += corners[-1:] * (4 - len(corners))
            group.append(len(quads))
            quads.append([int(c[0]) - 1 for c in corners])
            quad_uvs.append([int(c[1]) - 1 if len(c) > 1 and c[1] else 0 for c in corners])
    return ObjMesh(
        np.array(vertices, np.float64).reshape(-1, 3),
        np.array(uvs, np.float64).reshape(-1, 2),
        np.array(quads, np.int64).reshape(-1, 4),
        np.array(quad_uvs, np.int64).reshape(-1, 4),
        {name: np.array(v, np.int64) for name, v in groups.items() if v},
    )


def read_target(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A morph target -> vertex indices i64 [N] and displacements f64 [N, 3] in decimetres."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        rows = [line.split() for line in stream if line.strip() and not line.startswith("#")]
    table = np.array(rows, np.float64).reshape(-1, 4)
    return table[:, 0].astype(np.int64), table[:, 1:]


@dataclass(frozen=True)
class Proxy:
    """A .mhclo asset: a mesh bound to the base mesh."""

    name: str
    folder: Path
    mesh: ObjMesh
    refs: np.ndarray  # i64 [V, 3] base vertices
    weights: np.ndarray  # f64 [V, 3], may be negative
    offsets: np.ndarray  # f64 [V, 3] decimetres, before scaling
    scales: np.ndarray  # [3, 3]: per axis A, B, reference distance
    delete: np.ndarray  # i64: base vertices hidden below this asset
    material: Path | None

    def fit(self, base: np.ndarray) -> np.ndarray:
        """Vertices [V, 3] on the morphed rest shape `base` [19158, 3]."""
        a, b = self.scales[:, 0].astype(int), self.scales[:, 1].astype(int)
        axis = np.arange(3)
        factor = np.abs(base[a, axis] - base[b, axis]) / self.scales[:, 2]
        return np.einsum("vk,vkc->vc", self.weights, base[self.refs]) + factor * self.offsets


def read_proxy(path: Path) -> Proxy:
    """Parse a .mhclo file and the .obj it names."""
    header: dict[str, str] = {}
    rows: list[list[str]] = []
    deleted: list[str] = []
    section = ""
    for raw in path.read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line[0].isalpha():
            key, _, rest = line.partition(" ")
            if key in ("verts", "delete_verts"):
                section = key
            else:  # header keys may also come later, between the rows
                header[key] = rest.strip()
        elif section == "verts":
            rows.append(line.split())
        elif section == "delete_verts":
            deleted.append(line)
    refs = np.array([[int(r[0])] * 3 if len(r) == 1 else [int(x) for x in r[:3]] for r in rows], np.int64)
    weights = np.array([[1, 0, 0] if len(r) == 1 else [float(x) for x in r[3:6]] for r in rows], np.float64)
    offsets = np.array([[0, 0, 0] if len(r) == 1 else [float(x) for x in r[6:9]] for r in rows], np.float64)
    scales = np.array(
        [[float(x) for x in header.get(f"{axis}_scale", "0 1 0").split()[:3]] for axis in "xyz"], np.float64
    )
    if not scales[:, 2].all():  # no reference distance: offsets are absolute
        scales[:, 2] = np.inf
    return Proxy(
        name=header.get("name", path.stem),
        folder=path.parent,
        mesh=read_obj(path.parent / header["obj_file"]),
        refs=refs,
        weights=weights,
        offsets=offsets,
        scales=scales,
        delete=_runs(" ".join(deleted)),
        material=path.parent / header["material"] if "material" in header else None,
    )


def _runs(text: str) -> np.ndarray:
    """'3 - 5 9' -> [3, 4, 5, 9]."""
    tokens = text.replace("-", " - ").split()
    out: list[int] = []
    i = 0
    while i < len(tokens):
        if i + 2 < len(tokens) and tokens[i + 1] == "-":
            out.extend(range(int(tokens[i]), int(tokens[i + 2]) + 1))
            i += 3
        else:
            out.append(int(tokens[i]))
            i += 1
    return np.array(out, np.int64)


def read_material(path: Path) -> dict[str, str]:
    """A .mhmat -> {key: text}; texture paths become absolute."""
    out: dict[str, str] = {}
    for raw in path.read_text(encoding="utf-8").splitlines():
        key, _, rest = raw.strip().partition(" ")
        if key and not key.startswith(("#", "//")):
            out[key] = str(path.parent / rest.strip()) if key.endswith("Texture") else rest.strip()
    return out


def macro_weights(sliders: Mapping[str, np.ndarray], exists: set[str]) -> dict[str, np.ndarray]:
    """MakeHuman's product rule: sliders [B] -> weight [B] for each macro target that exists.

    `sliders` holds gender, age, muscle, weight, height, proportions, cup, firmness in [0, 1] and the races african,
    asian, caucasian (any non-negative scale). A missing height or proportions file falls back to average build.
    """
    s = {k: np.asarray(v, np.float64) for k, v in sliders.items()}
    total = sum(s[r] for r in ("african", "asian", "caucasian"))
    races = {r: s[r] / total for r in ("african", "asian", "caucasian")}
    genders = {"male": s["gender"], "female": 1 - s["gender"]}
    a = s["age"]
    if (a < 0.5).any():
        raise ValueError("This kit holds adults only: use age >= 0.5.")
    ages = {"young": 2 - 2 * a, "old": 2 * a - 1}

    def levels(x: np.ndarray, low: str, mid: str, high: str) -> dict[str, np.ndarray]:
        lo, hi = np.maximum(0, 1 - 2 * x), np.maximum(0, 2 * x - 1)
        return {low: lo, mid: 1 - lo - hi, high: hi}

    muscles = levels(s["muscle"], "minmuscle", "averagemuscle", "maxmuscle")
    weights = levels(s["weight"], "minweight", "averageweight", "maxweight")
    out: dict[str, np.ndarray] = {}

    def add(name: str, value: np.ndarray, fallback: str | None = None) -> None:
        if name not in exists and fallback is not None:
            name = fallback
        if name in exists:
            out[name] = out.get(name, 0) + value

    for gender, g in genders.items():
        for age, ag in ages.items():
            for race, r in races.items():
                add(f"{race}-{gender}-{age}", r * g * ag)
            for muscle, m in muscles.items():
                for weight, w in weights.items():
                    build = g * ag * m * w
                    stem, plain = f"{gender}-{age}-{muscle}-{weight}", f"{gender}-{age}-averagemuscle-averageweight"
                    add(f"universal-{stem}", build)
                    for level, h in levels(s["height"], "minheight", "", "maxheight").items():
                        if level:
                            add(f"{stem}-{level}", build * h, f"{plain}-{level}")
                    for level, p in levels(s["proportions"], "uncommonproportions", "", "idealproportions").items():
                        if level:
                            add(f"{stem}-{level}", build * p, f"{plain}-{level}")
                    if gender == "female":
                        for cup, c in levels(s["cup"], "mincup", "averagecup", "maxcup").items():
                            firm = levels(s["firmness"], "minfirmness", "averagefirmness", "maxfirmness")
                            for firmness, f in firm.items():
                                add(f"{stem}-{cup}-{firmness}", build * c * f)
    return {n: v for n, v in out.items() if np.any(v != 0)}


@dataclass(frozen=True)
class Kit:
    """A MakeHuman data folder."""

    root: Path
    _targets: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @cached_property
    def base(self) -> ObjMesh:
        return read_obj(self.root / "3dobjs" / "base.obj")

    @cached_property
    def target_paths(self) -> dict[str, Path]:
        """Base name -> file; expression units are left out, their names occur once per race."""
        paths = {}
        for path in sorted((self.root / "targets").rglob("*.target*")):
            if "units" not in path.parts:
                paths.setdefault(path.name.removesuffix(".gz").removesuffix(".target"), path)
        return paths

    @cached_property
    def details(self) -> list[tuple[str | None, str]]:
        """Detail sliders as (target for negative values or None, target for positive values)."""
        out = []
        listing = json.loads((self.root / "modifiers" / "modeling_modifiers.json").read_text(encoding="utf-8"))
        for group in listing:
            for m in group["modifiers"]:
                if "target" not in m:
                    continue
                low = f"{m['target']}-{m['min']}" if m.get("min") else None
                high = f"{m['target']}-{m['max']}" if m.get("max") else m["target"]
                if high in self.target_paths and (low is None or low in self.target_paths):
                    out.append((low, high))
        return out

    def target(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._targets:
            self._targets[name] = read_target(self.target_paths[name])
        return self._targets[name]

    def morph(self, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """Target weights [B] -> rest shapes f32 [B, 19158, 3] in decimetres: base + sum of weight x displacement."""
        count = len(next(iter(weights.values())))
        flat = np.zeros((count, self.base.vertices.size), np.float32)
        flat += self.base.vertices.ravel().astype(np.float32)
        for name, w in weights.items():
            index, delta = self.target(name)
            columns = (index[:, None] * 3 + np.arange(3)).ravel()
            flat[:, columns] += np.outer(w, delta.ravel()).astype(np.float32)
        return flat.reshape(count, -1, 3)

    def people(self, sliders: Mapping[str, np.ndarray], details: np.ndarray | None = None) -> np.ndarray:
        """Macro sliders [B] and detail sliders [B, len(details)] in [-1, 1] -> rest shapes f32 [B, 19158, 3]."""
        return self.morph(self.weights(sliders, details))

    def weights(self, sliders: Mapping[str, np.ndarray], details: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Weight [B] of each target that macro sliders [B] and detail sliders [B, len(details)] call for."""
        weights = macro_weights(sliders, set(self.target_paths))
        if details is not None:
            for column, (low, high) in zip(details.T, self.details, strict=True):
                if low is not None:
                    weights[low] = weights.get(low, 0) + np.maximum(0, -column)
                weights[high] = weights.get(high, 0) + np.maximum(0, column)
        return weights

    @cached_property
    def rig(self) -> tuple[dict, dict]:
        """game_engine bones {name: {...}} and its joints {joint: [vertex, ...]}."""
        data = json.loads((self.root / "rigs" / "game_engine.mhskel").read_text(encoding="utf-8"))
        return data["bones"], data["joints"]

    def rig_weights(self) -> tuple[list[str], list[int], np.ndarray]:
        """The game_engine rig: bone names (parents first), parents, and skin weights f32 [19158, J], rows sum to 1."""
        bones, _ = self.rig
        source = json.loads((self.root / "rigs" / "default_weights.mhw").read_text(encoding="utf-8"))["weights"]
        names: list[str] = []
        pending = sorted(bones)
        while pending:
            ready = [b for b in pending if bones[b]["parent"] is None or bones[b]["parent"] in names]
            names += ready
            pending = [b for b in pending if b not in ready]
        dense = np.zeros((len(self.base.vertices), len(names)), np.float32)
        for j, name in enumerate(names):
            refs = bones[name].get("weights_reference") or bones[name].get("reference") or []
            for ref in refs:
                for vertex, w in source.get(ref, []):
                    dense[vertex, j] += w
        total = dense.sum(1, keepdims=True)
        parents = [-1 if bones[b]["parent"] is None else names.index(bones[b]["parent"]) for b in names]
        return names, parents, dense / np.where(total > 0, total, 1)

    def garments(self) -> dict[str, dict]:
        """Semantic parts of the outfits (`garments.json`, our own metadata; empty if the folder has none)."""
        path = self.root / "garments.json"
        if not path.exists():
            return {}
        return {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if not k.startswith("_")}
