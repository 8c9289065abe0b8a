# SPDX-License-Identifier: GPL-3.0-or-later
"""Reader of MakeHuman's native asset formats: base mesh, targets, mhclo assets, materials, rigs.

Works on MakeHuman's or MPFB's `data` folder and on any folder with the same layout. Lengths are decimetres as in the
files (y up, facing +z); the sampler turns them into metres. All indices are 0-based.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from backend.protocol import PopulaceError

log = logging.getLogger(__name__)

BODY = slice(0, 13380)  # hm08: the vertices of group "body"
CHEST = (-2.0, 6.0)  # heights on the base mesh between which breast targets move skin
# ends of the names of opposite targets
PAIRS = {"decr": "incr", "down": "up", "in": "out", "backward": "forward", "concave": "convex",
         "compress": "uncompress", "pointed": "triangle", "square": "round"}  # fmt: skip


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
                name = path.name.removesuffix(".gz").removesuffix(".target")
                if name.endswith(("-minheight", "-maxheight")) and path.stat().st_size < 4096:
                    log.warning("%s is nearly empty, a known defect: the average one is used", path.name)
                    continue
                paths.setdefault(name, path)
        return paths

    def check(self) -> Kit:
        """The kit itself, if people can be made of it. Raises PopulaceError("not_found") that says what is missing."""
        if not (self.root / "3dobjs" / "base.obj").is_file():
            raise PopulaceError("not_found", f"{self.root} holds no MakeHuman assets: 3dobjs/base.obj is missing.",
                                "Name the data folder of MakeHuman or of MPFB.")  # fmt: skip
        wanted = {"targets": "*.target*", "skins": "*.mhmat", "eyes/materials": "*.mhmat", "eyes": "*.mhclo",
                  "eyebrows": "*.mhclo", "hair": "*.mhclo"}  # fmt: skip
        missing = [f for f, files in wanted.items() if next((self.root / f).rglob(files), None) is None]
        missing += [] if self._rig_files() else ["rigs (game_engine)"]
        if missing:
            raise PopulaceError("not_found", f"{self.root} lacks {', '.join(missing)}.",
                                "MPFB keeps skins, hair, eyes and clothes in a user folder of its own, MakeHuman "
                                "compiles its targets: bring all of it together in one folder.")  # fmt: skip
        return self

    def _rig_files(self) -> tuple[Path, Path] | None:
        """Bones and weights: MakeHuman's files or MPFB's."""
        for bones, weights in (("game_engine.mhskel", "default_weights.mhw"),
                               ("standard/rig.game_engine.json", "standard/weights.game_engine.json")):  # fmt: skip
            found = self.root / "rigs" / bones, self.root / "rigs" / weights
            if all(path.is_file() for path in found):
                return found
        return None

    @cached_property
    def details(self) -> list[tuple[str | None, str]]:
        """Detail sliders as (target for negative values or None, target for positive values)."""
        path = self.root / "modifiers" / "modeling_modifiers.json"
        if not path.is_file():
            return self._paired_targets()
        out = []
        listing = json.loads(path.read_text(encoding="utf-8"))
        for group in listing:
            for m in group["modifiers"]:
                if "target" not in m:
                    continue
                low = f"{m['target']}-{m['min']}" if m.get("min") else None
                high = f"{m['target']}-{m['max']}" if m.get("max") else m["target"]
                if high in self.target_paths and (low is None or low in self.target_paths):
                    out.append((low, high))
        return out

    def _paired_targets(self) -> list[tuple[str | None, str]]:
        """The detail sliders by the names of the files: MPFB has no list in MakeHuman's form."""
        folders = {"macrodetails", "expression", "breast", "genitals", "pelvis", "bodyparts"}
        names = {n for n, p in self.target_paths.items() if not folders & set(p.parts) and "nipple" not in n}
        out: list[tuple[str | None, str]] = []
        for name in sorted(names):
            stem, _, end = name.rpartition("-")
            if end in PAIRS and f"{stem}-{PAIRS[end]}" in names:
                out.append((name, f"{stem}-{PAIRS[end]}"))
        return out

    def target(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._targets:
            self._targets[name] = self._sound(name, *read_target(self.target_paths[name]))
        return self._targets[name]

    def _sound(self, name: str, index: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The target, unless it is a breast target that moves head or feet (MPFB ships one): then its neighbour."""
        if not name.startswith("female-") or "cup-" not in name:
            return index, delta
        height = self.base.vertices[index, 1]
        astray = (index < BODY.stop) & ((height < CHEST[0]) | (height > CHEST[1]))
        if not len(index) or np.abs(delta[astray]).max(initial=0) < 0.05:
            return index, delta
        stem, muscle, weight = name.split("-")[:2], name.split("-")[2], name.split("-")[3]
        rest = name.split("-")[4:]
        other = "-".join([*stem, muscle, "averageweight", *rest])
        log.warning("%s moves head or feet, a known defect: %s", name, f"{other} is used" if weight != "averageweight"
                    and other in self.target_paths else "it is left out")  # fmt: skip
        if weight == "averageweight" or other not in self.target_paths:
            return index[:0], delta[:0]
        return self.target(other)

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
        files = self._rig_files()
        if files is None:
            raise PopulaceError("not_found", f"{self.root} lacks the rig game_engine.", "It belongs into rigs/.")
        data = json.loads(files[0].read_text(encoding="utf-8"))
        return (data["bones"], data["joints"]) if "joints" in data else self._mpfb_rig(data.get("bones", data))

    def _mpfb_rig(self, data: dict) -> tuple[dict, dict]:
        """MPFB's form of a rig: each end of a bone says how it follows the mesh."""
        bones, joints = {}, {}
        for name, bone in data.items():
            bones[name] = {"parent": bone["parent"] or None}
            for end in ("head", "tail"):
                how, joint = bone[end], f"{name}____{end}"
                match how["strategy"]:
                    case "CUBE":
                        group = self.base.quads[self.base.groups[how["cube_name"]]]
                        joints[joint] = np.unique(group).tolist()
                    case "VERTEX":
                        joints[joint] = [how["vertex_index"]]
                    case _:
                        joints[joint] = list(how["vertex_indices"])
                bones[name][end] = joint
        return bones, joints

    @cached_property
    def _rig_table(self) -> tuple[list[str], list[int], np.ndarray]:
        bones, _ = self.rig
        files = self._rig_files()
        assert files is not None
        source = json.loads(files[1].read_text(encoding="utf-8"))["weights"]
        names: list[str] = []
        pending = sorted(bones)
        while pending:
            ready = [b for b in pending if bones[b]["parent"] is None or bones[b]["parent"] in names]
            if not ready:
                raise PopulaceError("invalid_request", f"{files[0].name} has bones without parents: {pending[0]}.")
            names += ready
            pending = [b for b in pending if b not in ready]
        dense = np.zeros((len(self.base.vertices), len(names)), np.float32)
        for j, name in enumerate(names):
            own = [name] if files[1].suffix == ".json" else []  # MPFB's weights are per bone of this very rig
            refs = bones[name].get("weights_reference") or bones[name].get("reference") or own
            for ref in refs:
                for vertex, w in source.get(ref, []):
                    dense[vertex, j] += w
        total = dense.sum(1, keepdims=True)
        parents = [-1 if bones[b]["parent"] is None else names.index(bones[b]["parent"]) for b in names]
        return names, parents, dense / np.where(total > 0, total, 1)

    def rig_weights(self) -> tuple[list[str], list[int], np.ndarray]:
        """The game_engine rig: bone names (parents first), parents, and skin weights f32 [19158, J], rows sum to 1."""
        return self._rig_table

    @cached_property
    def _garments(self) -> dict[str, dict]:
        path = self.root / "garments.json"
        if not path.exists():
            from backend.training.wardrobe import classify

            return classify(self)
        return {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if not k.startswith("_")}

    def garments(self) -> dict[str, dict]:
        """Semantic parts of the outfits: `garments.json`, our own metadata, or what `wardrobe.classify` finds."""
        return self._garments
