# SPDX-License-Identifier: GPL-3.0-or-later
"""People as files for other programs: formats, and presets of units, axes and bone names for game engines.

GLB, OBJ and the packet are written here. USD, FBX and .blend are Blender's: a process of its own with the bpy module
makes them (`interchange_blender`), so that neither its memory nor its faults are ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final, Literal, get_args

import numpy as np

from backend import exports, packet
from backend.packet import HumanAsset
from backend.protocol import PopulaceError

Format = Literal["glb", "obj", "usd", "fbx", "blend", "packet"]
PresetName = Literal["none", "unreal", "unity", "godot"]
FORMATS: Final = get_args(Format)
BLENDERS: Final = frozenset({"usd", "fbx", "blend"})  # formats that need the bpy module
_SUFFIXES: Final[Mapping[Format, str]] = {"usd": ".usda", "fbx": ".fbx", "blend": ".blend"}
_TIMEOUT_S: Final = 600.0
_MEDIA: Final[Mapping[Format, str]] = {"glb": "model/gltf-binary", "packet": "application/octet-stream",
                                       "blend": "application/x-blender"}  # fmt: skip
_writing: set[subprocess.Popen[bytes]] = set()  # the Blenders at work


def _humanoid(thumb: tuple[str, str, str]) -> dict[str, str]:
    """Our bones by the names of Unity's HumanBodyBones and Godot's SkeletonProfileHumanoid, which differ in thumbs."""
    names = {"pelvis": "Hips", "spine_01": "Spine", "spine_02": "Chest", "spine_03": "UpperChest", "neck_01": "Neck",
             "head": "Head"}  # fmt: skip
    limbs = {"clavicle": "Shoulder", "upperarm": "UpperArm", "lowerarm": "LowerArm", "hand": "Hand",
             "thigh": "UpperLeg", "calf": "LowerLeg", "foot": "Foot", "ball": "Toes"}  # fmt: skip
    fingers = {"index": "Index", "middle": "Middle", "ring": "Ring", "pinky": "Little"}
    for side, ours in (("Left", "l"), ("Right", "r")):
        names |= {f"{bone}_{ours}": side + name for bone, name in limbs.items()}
        for i, joint in enumerate(("Proximal", "Intermediate", "Distal"), 1):
            names |= {f"{bone}_0{i}_{ours}": f"{side}{name}{joint}" for bone, name in fingers.items()}
            names[f"thumb_0{i}_{ours}"] = f"{side}Thumb{thumb[i - 1]}"
    return names


@dataclass(frozen=True)
class Preset:
    """What an engine expects. GLB is metres and Y up by its standard; USD is in metres and FBX in centimetres, and
    both say so; OBJ knows no unit."""

    title: str
    formats: tuple[Format, ...]  # when none are asked for
    up: Literal["Y", "Z"] = "Y"  # of OBJ, USD and FBX. Y: the person faces +Z, Z: -Y
    metres_per_unit: float = 1.0  # of OBJ
    bones: Mapping[str, str] = field(default_factory=dict)  # names that differ from ours


PRESETS: Final[Mapping[PresetName, Preset]] = {
    "none": Preset("Metres, Y up, our bone names", ("glb",)),
    "unreal": Preset("Unreal Engine: centimetres, Z up, bones of the Mannequin", ("fbx",), "Z", 0.01, {"Root": "root"}),
    "unity": Preset("Unity: Y up, bones of the Humanoid avatar", ("fbx",),
                    bones=_humanoid(("Proximal", "Intermediate", "Distal"))),
    "godot": Preset("Godot: metres, Y up, bones of SkeletonProfileHumanoid", ("glb",),
                    bones=_humanoid(("Metacarpal", "Proximal", "Distal"))),
}  # fmt: skip


def default_formats(preset: PresetName) -> tuple[Format, ...]:
    return PRESETS[preset].formats


def check(formats: Iterable[Format]) -> None:
    """Raise `invalid_request` if a format needs Blender's module and it is not here."""
    need = sorted(BLENDERS & set(formats))
    if need and importlib.util.find_spec("bpy") is None:
        raise PopulaceError(
            "invalid_request", f"Writing {', '.join(need)} needs Blender as a Python module, which is not here.",
            'Install it with: pip install ".[blender]" (Python 3.11), or ask for glb or obj.'
        )  # fmt: skip


def write(asset: HumanAsset, folder: Path, name: str, form: Format, preset: PresetName = "none") -> list[Path]:
    """Write one person into `folder`, in one format, and return the files that hold it, the full detail first.

    GLB and OBJ have a file (folder) per level of detail, USD, FBX and .blend hold all levels as objects <name>_LOD0,
    <name>_LOD1, ... Raises `invalid_request` when the bpy module is missing.
    """
    chosen, levels = PRESETS[preset], len({asset.lod(i) for i in range(len(asset.parts))})
    asset = _with_bones(asset, chosen.bones)
    if form in BLENDERS:
        return [_through_blender(asset, folder, name, form, chosen)]
    if form == "packet":
        path = folder / f"{name}.safetensors"
        packet.write(path, asset)
        return [path]
    paths = []
    for lod in range(levels):
        stem = f"{name}_LOD{lod}" if lod or (preset != "none" and levels > 1) else name
        if form == "obj":
            paths.append(packet.to_obj(_placed(asset, chosen), folder / stem, lod))
        else:
            paths.append(folder / f"{stem}.glb")
            packet.write_file(paths[-1], packet.to_glb(asset, lod))
    return paths


def packed(asset: HumanAsset, form: Format, preset: PresetName = "none", lod: int = 0) -> tuple[bytes, str, str]:
    """One person in one format as one file: its bytes, media type and ending.

    GLB, packet and .blend are single files. OBJ, USD and FBX have textures beside them and come as a zip, the same for
    the same person. GLB and OBJ hold the level of detail `lod`, the others all. Raises `invalid_request` when the
    person has no such level or the bpy module is missing.
    """
    check([form])
    asset.at_lod(lod)
    chosen = PRESETS[preset]
    if form == "glb":
        return packet.to_glb(_with_bones(asset, chosen.bones), lod), _MEDIA[form], ".glb"
    if form == "packet":
        return packet.dumps(_with_bones(asset, chosen.bones)), _MEDIA[form], ".safetensors"
    with tempfile.TemporaryDirectory(prefix="populace-") as folder:
        if form == "obj":
            packet.to_obj(_placed(asset, chosen), Path(folder), lod)
        else:
            (path,) = write(asset, Path(folder), "human", form, preset)
            if form == "blend":
                return path.read_bytes(), _MEDIA[form], ".blend"
        return _zip(Path(folder)), "application/zip", ".zip"


def _zip(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_STORED if path.suffix == ".png" else zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    return out.getvalue()


def end_all() -> None:
    """End the Blenders that are writing; whoever waits for one gets an error."""
    for child in list(_writing):
        child.kill()


def _with_bones(asset: HumanAsset, names: Mapping[str, str]) -> HumanAsset:
    bones = [names.get(bone, bone) for bone in asset.meta.get("bones", ())]
    return replace(asset, meta={**asset.meta, "bones": bones}) if bones else asset


def _placed(asset: HumanAsset, preset: Preset) -> HumanAsset:
    """For a format that knows neither units nor axes nor joints: the mesh as it stands, in those of the preset."""
    if preset.up == "Y" and preset.metres_per_unit == 1:
        return asset
    turn = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]] if preset.up == "Z" else np.eye(3), np.float32)
    parts = []
    for part in asset.parts:
        vertices, normals = exports.posed(asset, part)
        scaled = (vertices @ turn.T / np.float32(preset.metres_per_unit)).astype(np.float32)
        parts.append(replace(part, vertices=scaled, normals=normals @ turn.T, skin_indices=None, skin_weights=None))
    return replace(asset, parts=tuple(parts), rig=None)


def _through_blender(asset: HumanAsset, folder: Path, name: str, form: Format, preset: Preset) -> Path:
    """In a fresh process with a fixed hash seed, because Blender's FBX exporter makes its ids with Python's hash(), and
    with one thread for USD, whose files else differ in the order of their sections. It ends when its stdin does: should
    we be killed, it goes as well."""
    check([form])
    path = folder / f"{name}{_SUFFIXES[form]}"
    with tempfile.TemporaryDirectory(prefix="populace-") as private:
        parcel, trouble, log = (Path(private) / name for name in ("person.safetensors", "error.json", "errors.txt"))
        parcel.write_bytes(packet.dumps(asset))
        order = {"packet": str(parcel), "path": str(path.absolute()), "name": name, "form": form, "up": preset.up,
                 "trouble": str(trouble)}  # fmt: skip
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "BLENDER_USER_RESOURCES": private,
                       "PXR_WORK_THREAD_LIMIT": "1"}  # fmt: skip
        command = [sys.executable, "-m", "backend.interchange_blender", json.dumps(order)]
        try:
            with log.open("wb") as errors, _running(command, environment, errors) as child:
                returned = child.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise PopulaceError("deadline_exceeded", f"Blender needs over {_TIMEOUT_S:.0f} s to write {path.name}.",
                                "Ask for fewer triangles or smaller textures.") from None  # fmt: skip
        if returned != 0 or not path.is_file():
            if trouble.is_file():
                raise PopulaceError(**json.loads(trouble.read_text("utf-8")))
            said = " ".join(log.read_text("utf-8", "replace").split())[-300:]
            raise PopulaceError("internal_error", f"Blender could not write {path.name}: {said or returned}",
                                "Run it again; ask for glb if it stays so.")  # fmt: skip
    return path


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
    _writing.add(child)
    try:
        with child:
            try:
                yield child
            finally:
                if child.poll() is None:
                    child.kill()
    finally:
        _writing.discard(child)
