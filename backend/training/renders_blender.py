# SPDX-License-Identifier: GPL-3.0-or-later
"""Meshes of one's own, rendered by a headless Blender into a folder that GET3D or Get3DHuman learns from.

This file needs nothing but Blender: `populace renders --meshes` runs it as a process of its own with the bpy module,
and any Blender runs it alone:

    blender -b --python renders_blender.py -- --meshes FOLDER --out RENDERS --for get3d --views 24 --size 512

It is one of the headless helpers that import bpy; whoever imports this module for its cameras does not. The layout is
documented in README.md beside it. Blender's world, Z up and people facing -Y, becomes ours: Y up, facing +Z.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LAYOUT, INDEX = "populace-renders-1", "cameras.json"
FOV = 2 * math.atan(16 / 35)  # a 35 mm lens before a 32 mm sensor
RADIUS = 1.2
LONGEST = 0.9  # side of an object's box, in units
ELEVATION = (0.0, math.radians(20.0))
SIDES = 4  # views of Get3DHuman's people
HALF_M, CENTRE_M = 1.07789, 0.95  # of the feature pictures' frame: see `families.get3dhuman.config`
AWAY_M = 2.0  # distance of orthographic cameras
DEPTH_UNIT = 1e-4
TALLEST_M, SHORTEST_M = 2.02, 0.5  # of people in the frame
SAMPLES = 32

READERS = {".glb": "import_scene.gltf", ".gltf": "import_scene.gltf", ".fbx": "import_scene.fbx",
           ".obj": "wm.obj_import", ".ply": "wm.ply_import", ".stl": "wm.stl_import"}  # fmt: skip
# ours -> Blender's: (x, y, z) -> (x, -z, y)
TO_BLENDER = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float)


# --- cameras ----------------------------------------------------------------------------------------------------------


def looking_at(target: np.ndarray, azimuth: float, elevation: float, distance: float) -> np.ndarray:
    """c2w f64 [4, 4]; azimuth 0 is in front (+Z), pi/2 at +X; radians."""
    back = np.array([math.sin(azimuth) * math.cos(elevation), math.sin(elevation),
                     math.cos(azimuth) * math.cos(elevation)])  # fmt: skip
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(back, right), back, target + distance * back], 1)
    return c2w


def cameras(purpose: str, views: int, key: Sequence[int]) -> dict[str, np.ndarray]:
    """c2w by view, a function of the key: around the origin (get3d), or in metres around a standing person."""
    rng = np.random.default_rng(list(key))
    if purpose == "get3d":
        angles = zip(rng.uniform(0, 2 * math.pi, views), rng.uniform(*ELEVATION, views))
        return {f"{i:02d}": looking_at(np.zeros(3), a, e, RADIUS) for i, (a, e) in enumerate(angles)}
    centre = np.array([0.0, CENTRE_M, 0.0])
    return {f"{i:02d}": looking_at(centre, 2 * math.pi * i / SIDES, 0.0, AWAY_M) for i in range(SIDES)}


def lens(purpose: str, size: int) -> dict[str, float]:
    """As the index has it. The outermost pixels' centres of Get3DHuman's lie on the frame, as its networks read."""
    return {"fov_y_rad": FOV} if purpose == "get3d" else {"half_height": HALF_M * size / (size - 1)}


# --- the script -------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """A sentence for the user."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="renders_blender.py", description="Render meshes for GET3D or Get3DHuman.")
    parser.add_argument("--meshes", type=Path, required=True, help="folder of GLB, glTF, FBX, OBJ, PLY, STL files")
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--for", dest="purpose", choices=("get3d", "get3dhuman"), default="get3d")
    parser.add_argument("--views", type=int, default=24, help="pictures of each, for get3d")
    parser.add_argument("--size", type=int, default=512, help="pixels along a side")
    parser.add_argument("--seed", type=int, default=0, help="of the cameras")
    parser.add_argument("--height", type=float, help="metres that every person is made high, for get3dhuman")
    parser.add_argument("--lit", action="store_true", help="lit from above instead of flat colours")
    args = parser.parse_args(argv)
    try:
        render(args)
    except Problem as problem:
        print(f"PROBLEM {problem}", file=sys.stderr, flush=True)
        return 1
    return 0


def render(args: argparse.Namespace) -> None:
    """All meshes of a folder. Raises Problem."""
    if not args.meshes.is_dir():
        raise Problem(f"There is no folder {args.meshes}.")
    files = sorted(p for p in args.meshes.rglob("*") if p.suffix.lower() in READERS)
    if not files:
        raise Problem(f"{args.meshes} holds no meshes: files that end in {', '.join(READERS)}.")
    if args.out.exists() and any(args.out.iterdir()):
        raise Problem(f"{args.out} is not empty. Renders go to a folder of their own.")
    bpy: Any = importlib.import_module("bpy")
    items: dict[str, Any] = {}
    for i, path in enumerate(files):
        name = _item_name(path.relative_to(args.meshes), items)
        bpy.ops.wm.read_factory_settings(use_empty=True)
        try:
            group, call = READERS[path.suffix.lower()].split(".")
            getattr(getattr(bpy.ops, group), call)(filepath=str(path))
        except RuntimeError as error:
            raise Problem(f"Blender cannot read {path}: {' '.join(str(error).split())}") from None
        items[name] = _item(bpy, path, args.out / name, args)
        print(f"RENDERED {i + 1} {len(files)} {name}", file=sys.stderr, flush=True)
    index = {"layout": LAYOUT, "resolution": args.size, **lens(args.purpose, args.size), "items": items}
    if args.purpose == "get3dhuman":
        index["depth_unit"] = DEPTH_UNIT
    temporary = args.out / f"{INDEX}.tmp"
    temporary.write_text(json.dumps(index), "utf-8")
    temporary.replace(args.out / INDEX)


def _item_name(path: Path, taken: dict[str, Any]) -> str:
    """Of letters, digits, dot, dash, underscore; the same for the same path."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in path.with_suffix("").as_posix())
    stem = stem.lstrip("._-")[:48] or "item"
    return stem if stem not in taken else f"{stem}_{zlib.crc32(str(path).encode()):08x}"


def _item(bpy: Any, path: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Render what is in the scene; returns its entry in the index."""
    vertices, triangles = _triangles(bpy)
    if not len(triangles):
        raise Problem(f"{path} holds no faces.")
    low, high = vertices.min(0), vertices.max(0)
    if args.purpose == "get3d":
        unit, centre = float((high - low).max()) / LONGEST, (low + high) / 2
    else:
        unit = 1.0 if args.height is None else float(high[1] - low[1]) / args.height
        tall = float(high[1] - low[1]) / unit
        if not SHORTEST_M <= tall <= TALLEST_M:
            raise Problem(f"{path.name} is {tall:.3g} m high, and the frame is {TALLEST_M} m. --height 1.75 scales it.")
        centre = np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])
    _studio(bpy, args, unit)
    folder.mkdir(parents=True)
    tree = None
    if args.purpose == "get3dhuman":
        tree = importlib.import_module("mathutils.bvhtree").BVHTree.FromPolygons(vertices.tolist(), triangles.tolist())
    found = cameras(args.purpose, args.views, [args.seed, zlib.crc32(folder.name.encode()), 12])
    for view, c2w in found.items():
        placed = c2w.copy()
        placed[:3, 3] = placed[:3, 3] * unit + centre
        _shoot(bpy, folder / f"{view}.png", placed)
        if tree is not None:
            _maps(tree, folder / view, placed, unit, lens(args.purpose, args.size)["half_height"], args.size)
    return {"views": {view: np.round(c2w, 7).tolist() for view, c2w in found.items()},
            **({"unit_m": unit} if args.purpose == "get3d" else {})}  # fmt: skip


def _triangles(bpy: Any) -> tuple[np.ndarray, np.ndarray]:
    """All surfaces of the scene as they are posed, in our axes: f64 [V, 3], i64 [F, 3]."""
    depsgraph, vertices, triangles, start = bpy.context.evaluated_depsgraph_get(), [], [], 0
    for original in bpy.context.scene.objects:
        if original.type != "MESH" or original.hide_render:
            continue
        made = original.evaluated_get(depsgraph)
        mesh = made.to_mesh()
        mesh.calc_loop_triangles()
        points, corners = np.empty(3 * len(mesh.vertices), np.float32), np.empty(3 * len(mesh.loop_triangles), np.int32)
        mesh.vertices.foreach_get("co", points)
        mesh.loop_triangles.foreach_get("vertices", corners)
        world = np.linalg.inv(TO_BLENDER) @ np.array(made.matrix_world)
        vertices.append(points.reshape(-1, 3) @ world[:3, :3].T + world[:3, 3])
        triangles.append(corners.reshape(-1, 3).astype(np.int64) + start)
        start += len(vertices[-1])
        made.to_mesh_clear()
    if not vertices:
        return np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    return np.concatenate(vertices), np.concatenate(triangles)


def _studio(bpy: Any, args: argparse.Namespace, unit: float) -> None:
    """Camera, film and light; flat colours unless lit."""
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.device, scene.cycles.samples, scene.cycles.use_denoising = "CPU", SAMPLES, False
    scene.cycles.max_bounces = 4
    scene.render.film_transparent = True
    scene.render.resolution_x = scene.render.resolution_y = args.size
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format, scene.render.image_settings.color_mode = "PNG", "RGBA"
    scene.render.image_settings.color_depth = "8"
    scene.view_settings.view_transform = "Standard"
    scene.view_settings.look = "None"
    data = bpy.data.cameras.new("Camera")
    data.clip_start, data.clip_end = 0.05 * unit, 20 * unit
    if args.purpose == "get3d":
        data.sensor_fit, data.angle = "VERTICAL", FOV
    else:
        data.type, data.ortho_scale = "ORTHO", 2 * lens(args.purpose, args.size)["half_height"] * unit
    scene.camera = bpy.data.objects.new("Camera", data)
    scene.collection.objects.link(scene.camera)
    world = scene.world = bpy.data.worlds.new("World")
    background = _node(world, "BACKGROUND")
    background.inputs["Color"].default_value = (1, 1, 1, 1)
    background.inputs["Strength"].default_value = 0.7 if args.lit else 0.0
    if args.lit:
        lamp = bpy.data.lights.new("Above", "SUN")
        lamp.energy, lamp.angle = 1.5, math.pi / 2
        scene.collection.objects.link(bpy.data.objects.new("Above", lamp))
        return
    for obj in scene.objects:
        if obj.type == "MESH":
            if not any(slot.material for slot in obj.material_slots):
                obj.data.materials.clear()
                obj.data.materials.append(_plain(bpy, obj.data))
            for slot in obj.material_slots:
                if slot.material is not None:
                    _flatten(slot.material)


def _plain(bpy: Any, mesh: Any) -> Any:
    """A material for a mesh that has none: its vertex colours, or grey."""
    material = bpy.data.materials.new("Plain")
    shader = _node(material, "BSDF_PRINCIPLED")
    shader.inputs["Base Color"].default_value = (0.5, 0.5, 0.5, 1)
    if mesh.color_attributes:
        colors = material.node_tree.nodes.new("ShaderNodeVertexColor")
        colors.layer_name = mesh.color_attributes[0].name
        material.node_tree.links.new(colors.outputs["Color"], shader.inputs["Base Color"])
    return material


def _flatten(material: Any) -> None:
    """Show the base colour as it is, and keep the opacity."""
    if not material.node_tree:
        material.use_nodes = True
    tree = material.node_tree
    shader = next((n for n in tree.nodes if n.type == "BSDF_PRINCIPLED"), None)
    output = next((n for n in tree.nodes if n.type == "OUTPUT_MATERIAL" and n.is_active_output), None)
    if shader is None or output is None:
        return  # a material of another kind is seen as it is
    glow, clear = tree.nodes.new("ShaderNodeEmission"), tree.nodes.new("ShaderNodeBsdfTransparent")
    mix = tree.nodes.new("ShaderNodeMixShader")
    for source, target in ((shader.inputs["Base Color"], glow.inputs["Color"]),
                           (shader.inputs["Alpha"], mix.inputs[0])):  # fmt: skip
        if source.is_linked:
            tree.links.new(source.links[0].from_socket, target)
        else:
            target.default_value = source.default_value
    tree.links.new(clear.outputs[0], mix.inputs[1])
    tree.links.new(glow.outputs[0], mix.inputs[2])
    tree.links.new(mix.outputs[0], output.inputs["Surface"])


def _node(datablock: Any, kind: str) -> Any:
    if not datablock.node_tree:
        datablock.use_nodes = True
    return next(node for node in datablock.node_tree.nodes if node.type == kind)


def _shoot(bpy: Any, path: Path, c2w: np.ndarray) -> None:
    scene = bpy.context.scene
    scene.camera.matrix_world = importlib.import_module("mathutils").Matrix((TO_BLENDER @ c2w).tolist())
    scene.render.filepath = str(path.resolve())
    bpy.ops.render.render(write_still=True)


def _maps(tree: Any, stem: Path, c2w: np.ndarray, unit: float, half: float, size: int) -> None:
    """Depth and normals of an orthographic view, by one ray through each pixel's centre."""
    depth, normal = np.zeros((size, size)), np.zeros((size, size, 3))
    right, up, back, eye = c2w[:3].T
    line = ((np.arange(size) + 0.5) / size * 2 - 1) * half * unit
    for row in range(size):
        for column in range(size):
            start = eye + line[column] * right - line[row] * up
            place, facing, _, distance = tree.ray_cast(start.tolist(), (-back).tolist())
            if place is not None:
                depth[row, column] = distance / unit
                seen = np.array([right, up, back]) @ np.array(facing)
                normal[row, column] = seen if seen[2] >= 0 else -seen
    _write_png(stem.with_name(f"{stem.name}_depth.png"), np.rint(depth / DEPTH_UNIT).clip(0, 65535).astype(">u2"), 0)
    _write_png(stem.with_name(f"{stem.name}_normal.png"), np.rint((normal + 1) * 127.5).clip(0, 255).astype("u1"), 2)


def _write_png(path: Path, pixels: np.ndarray, color: int) -> None:
    """Grey (0) of 16 bits or RGB (2) of 8: Blender's own writer would change the numbers."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:]))
