# SPDX-License-Identifier: GPL-3.0-or-later
"""People from a folder of textured meshes, a scan data set say: the same `SampledPerson` as from the kit's sampler.

GLB, glTF, OBJ and PLY, with textures or vertex colours. Files of one person that are several objects, or have several
materials, become layers by name ("hair", "top_shirt", "Shoes.001", ...); what has no such name is body.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from backend.protocol import PopulaceError
from backend.training.person import Layer, Paint, SampledPerson, grounded
from backend.training.splits import Split, split_of

log = logging.getLogger(__name__)

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
UNITS = {"m": 1.0, "dm": 0.1, "cm": 0.01, "mm": 0.001, "in": 0.0254}
HEIGHT = (1.0, 2.5)  # metres: what people measure, also sitting ones

WORDS = {
    "hair": ("hair", "beard", "wig"), "accessory": ("hat", "cap", "accessory", "helmet"),
    "shoes": ("shoe", "shoes", "boot", "boots", "sneaker", "sneakers", "footwear"),
    "top": ("top", "shirt", "tshirt", "jacket", "coat", "sweater", "blouse", "upper", "dress"),
    "bottom": ("bottom", "trousers", "pants", "jeans", "skirt", "shorts", "lower"),
    "eyes": ("eye", "eyes", "eyeball", "eyeballs"),
}  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """What was read of one file, or why nothing was."""

    path: Path
    split: Split
    unit: str = ""  # the file's, as given or guessed
    up: str = ""  # its axis that points up
    height_m: float = 0.0
    faces: int = 0
    parts: tuple[str, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.path.name}: {self.problem}"
        return (f"{self.path.name}: {self.height_m:.2f} m high, {self.faces} faces, {' '.join(self.parts)}; "
                f"in {self.unit}, {self.up} up, {self.split}")  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How the files of a folder are meant; what is None is guessed for each file."""

    unit: str | None = None  # a key of UNITS
    up: Literal["y", "z"] | None = None
    facing: Literal["+x", "-x", "+y", "-y", "+z", "-z"] | None = None  # in the file; +z when Y is up, -y when Z is


def scan_seed(path: Path) -> int:
    """A person's seed from the name of the file, whatever folder it lies in and whenever it is read."""
    return zlib.crc32(path.name.encode())


def files(folder: Path) -> list[Path]:
    """All mesh files below `folder`, by name. Raises PopulaceError("not_found") if there are none."""
    if not folder.is_dir():
        raise PopulaceError("not_found", f"There is no folder {folder}.", "Name the folder that holds the scans.")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise PopulaceError("not_found", f"{folder} holds no meshes.",
                            f"Meshes are files that end in {', '.join(SUFFIXES)}.")  # fmt: skip
    return found


def people(folder: Path, split: Split | None = None, reading: Reading | None = None) -> Iterator[SampledPerson]:
    """The readable people of a folder, of one split or all; files that cannot be used are logged and left out."""
    for path in files(folder):
        if split is None or split_of(scan_seed(path)) == split:
            try:
                yield read(path, reading)[0]
            except PopulaceError as e:
                log.warning("%s", e)


def listing(folder: Path, reading: Reading | None = None) -> list[Scan]:
    """What every file of the folder is read as, for people to check; unusable files say why."""
    out = []
    for path in files(folder):
        try:
            out.append(read(path, reading)[1])
        except PopulaceError as e:
            out.append(Scan(path, split_of(scan_seed(path)), problem=str(e)))
    return out


def read(path: Path, reading: Reading | None = None) -> tuple[SampledPerson, Scan]:
    """One person: metres, Y up, facing +Z, standing on y = 0 in the middle of its box.

    Raises PopulaceError("invalid_request") for files that cannot be read, hold no faces, have no colours, or whose
    unit cannot be guessed.
    """
    reading = reading or Reading()
    layers = [layer for name, mesh in _meshes(path) if (layer := _layer(path, name, mesh)) is not None]
    if not layers:
        raise PopulaceError("invalid_request", f"{path.name} holds no faces.", "Point clouds have to be meshed first.")
    points = np.concatenate([layer.vertices[np.unique(layer.faces)] for layer in layers]).astype(np.float64)
    if not np.isfinite(points).all():
        raise PopulaceError("invalid_request", f"{path.name} has vertices that are not numbers.", "Export it again.")
    size = np.ptp(points, axis=0)
    up = reading.up or _guess_up(path, size)
    unit = reading.unit or _guess_unit(path, float(size["xyz".index(up)]))
    if unit not in UNITS:
        raise PopulaceError("invalid_request", f"{unit!r} is no unit.", f"Choose one of: {', '.join(UNITS)}.")
    turn = _turn(up, reading.facing or ("+z" if up == "y" else "-y")) * UNITS[unit]
    middle = (points.min(0) + points.max(0)) / 2 @ turn.T * [1, 0, 1]
    seed = scan_seed(path)
    moved = tuple(
        Layer(layer.part, (layer.vertices @ turn.T - middle).astype(np.float32), layer.faces, layer.uvs,
              layer.face_uvs, layer.paint, colors=layer.colors, cutout=layer.cutout, name=layer.name)
        for layer in layers
    )  # fmt: skip
    person = grounded(SampledPerson(seed, moved, None, None, {}, split_of(seed)))
    height = float(person.bounds[1, 1])
    person.attributes["height_m"] = height  # type: ignore[index]
    parts = tuple(sorted({layer.part for layer in layers}))
    return person, Scan(path, split_of(seed), unit, up, height, sum(len(m.faces) for m in layers), parts)


def part_of(name: str) -> str:
    """The part that an object's or a material's name speaks of, "body" if none: whole words only, any case."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name.replace("-", "")).lower())
    return next((part for word in words for part, known in WORDS.items() if word in known), "body")


def _meshes(path: Path) -> list[tuple[str, Any]]:
    """Objects of a file with their names, in the file's own units, transforms applied."""
    try:
        import trimesh
    except ImportError as e:
        raise PopulaceError("internal_error", "Reading scans needs the package trimesh.",
                            "Install it: pip install populace[train]") from e  # fmt: skip
    try:
        scene = trimesh.load_scene(path, process=False, **({"split_object": True} if path.suffix == ".obj" else {}))
        found = []
        for node in scene.graph.nodes_geometry:
            matrix, name = scene.graph[node]
            mesh = scene.geometry[name]
            if isinstance(mesh, trimesh.Trimesh):
                mesh = mesh.copy()
                mesh.apply_transform(matrix)
                material = getattr(getattr(mesh.visual, "material", None), "name", None) or ""
                names = (node, name, material)
                found.append((next((n for n in names if part_of(str(n)) != "body"), name), mesh))
    except PopulaceError:
        raise
    except Exception as e:  # readers of foreign files fail in many ways
        raise PopulaceError("invalid_request", f"{path.name} cannot be read as a mesh ({type(e).__name__}).",
                            "Open it in Blender and export it as GLB.") from e  # fmt: skip
    return found


def _layer(path: Path, name: str, mesh: Any) -> Layer | None:
    """One object as a layer, None if it has no faces."""
    faces = np.asarray(mesh.faces, np.int64)
    if not len(faces):
        return None
    visual, vertices = mesh.visual, np.asarray(mesh.vertices, np.float32)
    uvs = getattr(visual, "uv", None)
    image, factor, cutout = _image(getattr(visual, "material", None))
    if uvs is not None and image is not None and len(uvs) == len(vertices):
        paint = Paint(image, gain=factor)
        return Layer(
            part_of(name), vertices, faces, np.asarray(uvs, np.float32), faces, paint, cutout=cutout, name=name
        )
    no_uvs = np.zeros((1, 2), np.float32)
    colors = _vertex_colors(visual, len(vertices))
    if colors is None and factor is not None:  # a material of one colour
        colors = np.tile(np.append(factor, 1).astype(np.float32), (len(vertices), 1))
    if colors is None:
        raise PopulaceError("invalid_request", f"{path.name} has neither a texture nor vertex colours.",
                            "Keep the texture images beside it, or export it as GLB, which holds them.")  # fmt: skip
    return Layer(part_of(name), vertices, faces, no_uvs, np.zeros_like(faces), None, colors=colors, name=name)


def _image(material: Any) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
    """A material's texture u8 [H, W, 4], the factor f32 [3] on it (None for 1), and whether its opacity counts."""
    if material is None:
        return None, None, False
    image, factor = getattr(material, "baseColorTexture", None), getattr(material, "baseColorFactor", None)
    if hasattr(material, "image"):  # OBJ
        image, factor = material.image, getattr(material, "diffuse", None) if material.image is None else None
    # OBJ readers make up a grey material where the file names none
    if getattr(material, "name", None) in (None, "") and image is None and not hasattr(material, "baseColorFactor"):
        factor = None
    gain = None
    if factor is not None:
        scale = 255.0 if np.asarray(factor).dtype.kind in "iu" else 1.0
        gain = np.asarray(factor, np.float32)[:3] / np.float32(scale)
        gain = gain if image is None or (gain != 1).any() else None
    cutout = getattr(material, "alphaMode", None) in ("MASK", "BLEND")
    if image is None:
        return None, gain, cutout
    return np.array(image.convert("RGBA")), gain, cutout


def _vertex_colors(visual: Any, count: int) -> np.ndarray | None:
    if getattr(visual, "kind", None) not in ("vertex", "face"):
        return None
    colors = np.asarray(visual.vertex_colors)
    return colors.astype(np.float32) / 255 if len(colors) == count else None


def _guess_up(path: Path, size: np.ndarray) -> Literal["y", "z"]:
    """glTF says Y. Else the longer of Y and Z: a person is higher than deep, lying or not."""
    if path.suffix.lower() in (".glb", ".gltf"):
        return "y"
    return "y" if size[1] >= size[2] else "z"


def _guess_unit(path: Path, height: float) -> str:
    """The unit in which `height` is a person's. Metres for GLB by definition, unless that gives no person."""
    for unit in ("m", "cm", "mm", "dm", "in"):
        if HEIGHT[0] <= height * UNITS[unit] <= HEIGHT[1]:
            return unit
    raise PopulaceError("invalid_request", f"{path.name} is {height:.3g} units high: no unit makes that a person.",
                        f"Say the unit ({', '.join(UNITS)}) and which axis points up.")  # fmt: skip


def _turn(up: str, facing: str) -> np.ndarray:
    """Rotation f64 [3, 3] that brings `up` to +Y and `facing` to +Z."""
    axes = {"x": np.array([1.0, 0, 0]), "y": np.array([0, 1.0, 0]), "z": np.array([0, 0, 1.0])}
    y, z = axes[up], axes[facing[-1]] * (-1 if facing[0] == "-" else 1)
    if abs(y @ z) > 0.5:
        raise PopulaceError("invalid_request", f"A person with {up} up cannot face {facing}.", "Choose another axis.")
    return np.stack([np.cross(y, z), y, z])
