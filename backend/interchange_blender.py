# SPDX-License-Identifier: GPL-3.0-or-later
"""USD, FBX and .blend of one person, by a headless Blender. Run as a process of its own by `interchange`; `studio`
imports bpy for it, and the add-on inserts the person.

    USD     metres; Z up as Blender, or Y up by a turn of the root; textures in files beside it
    FBX     centimetres, no object with rotation or scale of its own; textures inside, and ORM maps, for which FBX has
            no place, beside it
    .blend  as the add-on leaves it
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from backend import studio
from backend.protocol import Error, PopulaceError

_AXES = {"Y": ("-Z", "Y"), "Z": ("Y", "Z")}  # forward and up, as Blender's FBX exporter names them


def main(argv: Sequence[str]) -> int:
    """`argv` is one JSON object: packet, path, name, form, up, trouble. Returns the exit code."""
    order = json.loads(argv[0])
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        _write(**order)
    except PopulaceError as error:
        Path(order["trouble"]).write_text(Error.of(error).model_dump_json(), "utf-8")
        return 1
    return 0


def _end_with_stdin() -> None:
    """Whoever started this process holds the other end of its stdin: when they are gone, nobody wants the file."""
    os.read(0, 1)
    os._exit(1)


def _write(packet: str, path: str, name: str, form: str, up: str, trouble: str) -> None:
    bpy = studio.start()
    from blender_addon.packet import read

    human = read(Path(packet).read_bytes())
    bpy.context.scene.unit_settings.scale_length = 0.01 if form == "fbx" else 1.0  # the add-on scales by it
    studio.insert(bpy, human, 0, 1)
    root = _rename(bpy, name, human)
    if form == "blend":
        studio.save(bpy, Path(path))
        return
    for made in bpy.data.objects:  # exporters leave out what is hidden
        made.hide_viewport = made.hide_render = False
    (_write_usd if form == "usd" else _write_fbx)(bpy, Path(path), up, root)


def _rename(bpy: Any, name: str, human: Any) -> Any:
    """Everything by the person's name; meshes end in _LOD0, _LOD1, ... if there are several levels, as Unity and
    Unreal expect. Returns the topmost object."""
    meshes = [made for made in bpy.data.objects if made.type == "MESH"]
    levels = len({part.lod for part in human.parts})
    by_name = {made.populace.part: made for made in meshes}
    for part in human.parts:
        own = part.name.removesuffix(f"_LOD{part.lod}")
        made = by_name[part.name]
        made.name = name if len(human.parts) == levels else f"{name}_{own}"
        if levels > 1:
            made.name += f"_LOD{part.lod}"
        made.data.name = made.active_material.name = made.name
        for node in made.active_material.node_tree.nodes:
            if node.type == "TEX_IMAGE":
                node.image.name = f"{made.name}_{node.name.lower().replace(' ', '_')}"
                node.image.filepath = f"//{node.image.name}.png"
                for packed in node.image.packed_files:  # the USD exporter's name for the file
                    packed.filepath = node.image.filepath
    root = meshes[0].parent or meshes[0]
    if root.type == "ARMATURE":
        root.name = root.data.name = "Armature"  # Unreal takes a node of this name for no bone
    return root


def _write_usd(bpy: Any, path: Path, up: str, root: Any) -> None:
    with studio.quiet():
        bpy.ops.wm.usd_export(
            filepath=str(path), convert_orientation=up == "Y", export_global_forward_selection="NEGATIVE_Z",
            export_global_up_selection="Y", export_textures_mode="NEW", overwrite_textures=True, export_lights=False,
            export_cameras=False, convert_world_material=False, export_custom_properties=False, merge_parent_xform=True,
        )  # fmt: skip
    with open(path, encoding="utf-8", newline="") as file:
        lines = file.read().split("\n")
    path.write_text("\n".join(_in_order(lines)), encoding="utf-8", newline="")


def _in_order(lines: list[str]) -> list[str]:
    """Prims that stand side by side by their names: the exporter takes them as they lie in memory, which is never the
    same, and a batch promises the same bytes. It writes a prim from an indented `def` to its lone closing brace."""
    out: list[str] = []
    prims: list[list[str]] = []
    at = 0
    while at < len(lines):
        body = lines[at].lstrip(" ")
        if body.startswith("def "):
            close = " " * (len(lines[at]) - len(body)) + "}"
            end = lines.index(close, at)
            opening = next(i for i in range(at, end) if lines[i].lstrip(" ") == "{")
            prims.append([*lines[at : opening + 1], *_in_order(lines[opening + 1 : end]), close])
            at = end
        elif body or not prims:  # empty lines stand between prims
            out += [*_joined(prims), lines[at]]
            prims = []
        at += 1
    return out + _joined(prims)


def _joined(prims: list[list[str]]) -> list[str]:
    return [line for prim in sorted(prims, key=lambda prim: prim[0]) for line in ("", *prim)]


def _write_fbx(bpy: Any, path: Path, up: str, root: Any) -> None:
    exporter: Any = importlib.import_module("io_scene_fbx.export_fbx_bin")
    # Time of day and folder would make every file another one.
    exporter.fbx_header_elements = partial(exporter.fbx_header_elements, time=datetime(1970, 1, 1))
    exporter._gen_vid_path = lambda image, _: (f"{image.name}.png", f"{image.name}.png")
    if up == "Y":
        _turn(root)
    forward, upwards = _AXES[up]
    with studio.quiet():
        bpy.ops.export_scene.fbx(
            filepath=str(path), object_types={"EMPTY", "ARMATURE", "MESH"}, axis_forward=forward, axis_up=upwards,
            mesh_smooth_type="FACE", use_tspace=True, add_leaf_bones=False, bake_anim=False,
            path_mode="COPY", embed_textures=True,
        )  # fmt: skip
    for image in bpy.data.images:
        if image.name.endswith("_orm") and image.packed_file is not None:
            (path.parent / f"{image.name}.png").write_bytes(image.packed_file.data)


def _turn(root: Any) -> None:
    """Data into Y up and the root back: the exporter, which turns roots into its axes, then finds nothing to turn."""
    matrix = importlib.import_module("mathutils").Matrix(((1, 0, 0, 0), (0, 0, 1, 0), (0, -1, 0, 0), (0, 0, 0, 1)))
    for made in (root, *root.children_recursive):
        if made.type == "MESH":
            made.data.transform(matrix, shape_keys=True)
        elif made.type == "ARMATURE":
            made.data.transform(matrix)
    root.matrix_world = root.matrix_world @ matrix.inverted()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
