# SPDX-License-Identifier: GPL-3.0-or-later
"""Arrays -> Blender data. The only module that writes to bpy.data; called on the main thread, in Object Mode.

A person is built unlinked and linked when complete. If anything fails on the way, every datablock made so far is
removed. The mesh comes in rest pose with the armature posed; coarser levels of detail come hidden. Here, and nowhere
else, the generator's space (Y up, facing +Z) becomes Blender's (Z up, facing -Y), and metres become the scene's units.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Final

import bpy
import numpy as np
from mathutils import Quaternion, Vector

from . import compat, joints
from .packet import Human, Part, Rig
from .posing import posed

log = logging.getLogger(__name__)

SPACING_M: Final = 1.4  # between the people of a batch, who hold their arms away from the body
ROUGHNESS: Final = 0.75  # of people made without a map of it
MIN_BONE_M: Final = 0.005  # Blender deletes bones without length
WEIGHT_STEPS: Final = 8192  # a power of two: weights are rounded to 1/8192 and written bit by bit, one call for each
# bit of a bone. A posed vertex is off by less than 0.1 mm; with 1/512 it was 1 mm.
BATCH_KEY: Final = "populace_batch"
FINGERS: Final = "Fingers"  # a collection of bones that comes hidden: fingertips of few faces are shorter than they
_FINGER_NAMES: Final = ("thumb", "index", "middle", "ring_", "pinky")

Array = np.ndarray[Any, Any]


@dataclass
class Batch:
    """People that were asked for together: they stand in a row, in one collection."""

    name: str
    count: int
    location: tuple[float, float, float]  # of the row's middle, on the floor, in scene units
    with_rig: bool = True
    spacing_m: float = SPACING_M
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    was_made: bool = False  # whether its collection existed once

    def spot(self, index: int, units_per_metre: float) -> tuple[float, float, float]:
        x, y, z = self.location
        return x + (index - (self.count - 1) / 2) * self.spacing_m * units_per_metre, y, z


class Stage:
    """Everything made for one person, so that all of it can be taken back."""

    def __init__(self) -> None:
        self._made: list[bpy.types.ID] = []

    def new(self, collection: Any, *args: Any, **kwargs: Any) -> Any:
        self._made.append(collection.new(*args, **kwargs))
        return self._made[-1]

    def roll_back(self) -> None:
        bpy.data.batch_remove(self._made)


def insert(context: bpy.types.Context, human: Human, batch: Batch, index: int = 0) -> tuple[bpy.types.Object, str]:
    """Put a person into the scene, selected and active. Returns the topmost object and a remark for the user ("").

    Takes about 20 ms, with a rig about 100; coarser levels of detail add their share. Raises whatever goes wrong, with
    nothing left behind.
    """
    stage = Stage()
    try:
        collection, remark = _batch_collection(context, batch, stage)
        root, objects = build(context, stage, human, batch.with_rig)
        root.location = batch.spot(index, units_per_metre(context))
        _link(context, collection, root, objects, batch)
        root.populace.fill(uuid.uuid4().hex, human)  # the last step: what photos showed becomes images of the object
        return root, remark
    except BaseException:
        stage.roll_back()
        raise


def build(
    context: bpy.types.Context, stage: Stage, human: Human, with_rig: bool
) -> tuple[bpy.types.Object, list[bpy.types.Object]]:
    """The objects of a person, not linked to any collection: the topmost one, and one per part of the packet."""
    units = units_per_metre(context)
    root = None
    if human.rig is not None and with_rig:
        root = _armature(context, stage, human.rig, _floor(human), units)
        _pose(root, human.rig, units)
        root.populace.pose_mark = pose_mark(root)
    objects = build_parts(context, stage, human, root)
    joints.follow(root, objects, human.rig, units)
    if root is None and len(objects) > 1:
        root = stage.new(bpy.data.objects, "Human", None)
        root.empty_display_size = 0.3 * units
    root = root or objects[0]
    for made in objects:
        if made is not root:
            made.parent = root
    return root, objects


def build_parts(
    context: bpy.types.Context, stage: Stage, human: Human, armature: bpy.types.Object | None
) -> list[bpy.types.Object]:
    """A mesh per part, bound to the armature if there is one."""
    units, rig = units_per_metre(context), human.rig if armature is not None else None
    objects = [_part_object(stage, part, human, rig, _floor(human), units) for part in human.parts]
    if rig is not None:
        for made, part in zip(objects, human.parts):
            _bind(made, part, rig, armature)
    return objects


def _floor(human: Human) -> float:
    """What of the packet's height is the floor: a pose stands on its y = 0, a person in rest on the lowest point."""
    if human.rig is not None and human.rig.rotations is not None:
        return 0.0
    return min(float(part.vertices[:, 1].min()) for part in human.parts if part.lod == 0)


def units_per_metre(context: bpy.types.Context) -> float:
    return 1.0 / max(context.scene.unit_settings.scale_length, 1e-9)


def to_blender(points: Array, floor: float = 0.0, units: float = 1.0) -> Array:
    """Generator's axes -> Blender's: (x, y, z) -> (x, -z, y - floor), in scene units. Exact when nothing is scaled."""
    turned = np.empty(points.shape, np.float32)
    turned[:, 0] = points[:, 0]
    turned[:, 1] = -points[:, 2]
    turned[:, 2] = points[:, 1] - np.float32(floor)
    return turned * np.float32(units)


# --------------------------------------------------------------------------------------------- mesh, images, material


def _part_object(
    stage: Stage, part: Part, human: Human, rig: Rig | None, floor: float, units: float
) -> bpy.types.Object:
    """The mesh in rest pose if a rig will carry it, else as the person stands. Hidden if a coarser level of detail."""
    name = object_name(part, human)
    vertices = part.vertices if rig is not None else posed(part, human.rig)
    mesh = stage.new(bpy.data.meshes, name)
    mesh.vertices.add(len(part.vertices))
    mesh.loops.add(part.faces.size)
    mesh.polygons.add(len(part.faces))
    compat.set_vertices(mesh, to_blender(vertices, floor, units))
    compat.set_corners(mesh, part.faces)
    uvs = mesh.uv_layers.new(name="UVMap", do_init=False)
    uvs.uv.foreach_set("vector", part.uvs[part.face_uvs_idx.ravel()].ravel())
    mesh.update(calc_edges=True)
    if _has_degenerate(part.faces):
        mesh.validate()  # a triangle with a corner twice would confuse other tools; ours makes none
    mesh.shade_smooth()  # gives the packet's normals; custom ones would not turn with bones and shape keys
    mesh.materials.append(_material(stage, name, part))
    made = stage.new(bpy.data.objects, name, mesh)
    made.populace.part = part.name
    made.hide_viewport = made.hide_render = part.lod > 0
    _add_shape_keys(made, part, None if rig is not None else human.rig, floor, units)
    return made


def _add_shape_keys(made: bpy.types.Object, part: Part, pose: Rig | None, floor: float, units: float) -> None:
    """Basis and one key per shape key of the packet, all at 0; `pose` is of a person without an armature. With one,
    `joints` lets the bones follow."""
    for name, moves in part.shape_keys.items():
        if made.data.shape_keys is None:
            made.shape_key_add(name="Basis", from_mix=False)
            made.data.shape_keys.name = made.name
        vertices = posed(replace(part, vertices=part.vertices + moves), pose and pose.at_key(name))
        key = made.shape_key_add(name=name, from_mix=False)
        key.data.foreach_set("co", to_blender(vertices, floor, units).ravel())
        key.value = 0.0


def object_name(part: Part, human: Human) -> str:
    """Such as Human if the person is one mesh, else Human Top; a coarser level of detail ends in _LOD1."""
    end = f"_LOD{part.lod}" if part.lod else ""
    is_whole = sum(other.lod == part.lod for other in human.parts) == 1
    stem = part.name.removesuffix(end).replace("_", " ").title()
    return ("Human" if is_whole else f"Human {stem}") + end


def _has_degenerate(faces: Array) -> bool:
    a, b, c = faces.T
    return bool(((a == b) | (b == c) | (c == a)).any())


def _material(stage: Stage, name: str, part: Part) -> bpy.types.Material:
    """Principled BSDF with the maps that there are; the base colour's node is active, for Solid mode to show it."""
    material = stage.new(bpy.data.materials, name)
    compat.enable_nodes(material)
    material.roughness = 1.0  # of Solid mode, which shows no maps: cloth and skin are nearer to matt than to plastic
    tree = material.node_tree
    tree.nodes.clear()

    def node(kind: str, label: str, x: float, y: float) -> Any:
        made = tree.nodes.new(kind)
        made.name = made.label = label
        made.location = x, y
        return made

    def image(label: str, png: bytes, y: float, is_data: bool = True) -> Any:
        made = node("ShaderNodeTexImage", label, -560, y)
        made.image = packed_image(stage, f"{name} {label}", png)
        if is_data:
            compat.mark_as_data(made.image)
        return made

    output = node("ShaderNodeOutputMaterial", "Output", 320, 0)
    shader = node("ShaderNodeBsdfPrincipled", "Principled BSDF", 0, 0)
    tree.links.new(shader.outputs["BSDF"], output.inputs["Surface"])
    color = image("Base Color", part.base_color_png, 0, is_data=False)
    tree.links.new(color.outputs["Color"], shader.inputs["Base Color"])
    shader.inputs["Roughness"].default_value = ROUGHNESS
    if part.orm_png is not None:
        channels = node("ShaderNodeSeparateColor", "Roughness and Metallic", -240, -300)
        tree.links.new(image("ORM", part.orm_png, -300).outputs["Color"], channels.inputs["Color"])
        tree.links.new(channels.outputs["Green"], shader.inputs["Roughness"])
        tree.links.new(channels.outputs["Blue"], shader.inputs["Metallic"])
    if part.normal_png is not None:
        bump = node("ShaderNodeNormalMap", "Normal Map", -240, -600)
        bump.uv_map = "UVMap"
        tree.links.new(image("Normal", part.normal_png, -600).outputs["Color"], bump.inputs["Color"])
        tree.links.new(bump.outputs["Normal"], shader.inputs["Normal"])
    tree.nodes.active = color
    return material


def packed_image(stage: Stage, name: str, png: bytes, file: str = "") -> bpy.types.Image:
    """The PNG's own bytes become the packed file (1-5 ms); Blender decodes it when it is first shown. Of another
    format with its `file`, the name that it unpacks to."""
    image = stage.new(bpy.data.images, name, 1, 1)
    image.source = "FILE"
    image.filepath = f"//{file or name + '.png'}"
    image.pack(data=png, data_len=len(png))
    return image


# ---------------------------------------------------------------------------------------------------------------- rig


def _armature(context: bpy.types.Context, stage: Stage, rig: Rig, floor: float, units: float) -> bpy.types.Object:
    """Bones can only be made in Edit Mode, so the armature is in the scene for that moment."""
    data = stage.new(bpy.data.armatures, "Human Rig")
    data.display_type = "WIRE"  # the dots of sticks would show through fingers and toes
    made = stage.new(bpy.data.objects, "Human Rig", data)
    heads, tails = to_blender(rig.heads, floor, units), to_blender(rig.tails, floor, units)
    length = np.linalg.norm(tails - heads, axis=1)
    tails[length < MIN_BONE_M * units, 2] += MIN_BONE_M * units * 2
    view_layer = context.view_layer
    was_active = view_layer.objects.active
    context.scene.collection.objects.link(made)
    view_layer.objects.active = made
    try:
        bpy.ops.object.mode_set(mode="EDIT")
        bones: list[Any] = []
        for name, parent, head, tail in zip(rig.names, rig.parents.tolist(), heads.tolist(), tails.tolist()):
            bone = data.edit_bones.new(name)
            bone.head, bone.tail = head, tail
            if parent >= 0:
                bone.parent = bones[parent]
            bones.append(bone)
        _collect(data, bones)
    finally:
        if made.mode == "EDIT":
            bpy.ops.object.mode_set(mode="OBJECT")
        view_layer.objects.active = was_active
        context.scene.collection.objects.unlink(made)
    return made


def _collect(data: bpy.types.Armature, bones: list[Any]) -> None:
    """Bones in two collections, so that the many small ones can be shown apart from the rest."""
    fingers = [bone for bone in bones if bone.name.lower().startswith(_FINGER_NAMES)]
    if not fingers or len(fingers) == len(bones):
        return
    body, hidden = data.collections.new("Body"), data.collections.new(FINGERS)
    hidden.is_visible = False
    for bone in bones:
        (hidden if bone in fingers else body).assign(bone)


def _pose(armature: bpy.types.Object, rig: Rig, units: float) -> None:
    """Turn the pose bones. The packet turns bones about the world's axes, Blender about each bone's own."""
    if rig.rotations is None or rig.translation is None:
        return
    turns = np.concatenate([rig.rotations[:, :1], to_blender(rig.rotations[:, 1:])], 1)
    move = Vector(to_blender(rig.translation, 0.0, units)[0].tolist())
    for name, parent, turn in zip(rig.names, rig.parents.tolist(), turns.tolist()):
        bone = armature.pose.bones[name]
        own = bone.bone.matrix_local.to_quaternion()
        bone.rotation_quaternion = own.inverted() @ Quaternion(turn) @ own
        if parent < 0:
            bone.location = own.inverted() @ move


def pose_mark(armature: bpy.types.Object) -> str:
    """Changes when somebody poses a bone."""
    bones = armature.pose.bones
    turns = [(*bone.rotation_quaternion, *bone.rotation_euler, *bone.location, *bone.scale) for bone in bones]
    return f"{zlib.crc32((np.array(turns) * 1e4).round().astype(np.int32).tobytes()):08x}"


def _bind(made: bpy.types.Object, part: Part, rig: Rig, armature: bpy.types.Object) -> None:
    """Vertex groups and an armature modifier."""
    modifier = made.modifiers.new("Rig", "ARMATURE")
    modifier.object = armature
    if part.skin_indices is None or part.skin_weights is None:
        return
    groups = [made.vertex_groups.new(name=name) for name in rig.names]
    bones, steps = rounded_weights(part.skin_indices, part.skin_weights)
    order = np.argsort(bones.ravel(), kind="stable")
    bone, step = bones.ravel()[order], steps.ravel()[order]
    vertex = order // bones.shape[1]
    edges = np.searchsorted(bone, np.arange(len(groups) + 1)).tolist()
    for group, start, end in zip(groups, edges, edges[1:]):
        own, at = step[start:end], vertex[start:end]
        for bit in range(WEIGHT_STEPS.bit_length()):
            if (has := at[(own >> bit) & 1 > 0]).size:
                group.add(has.tolist(), 2**bit / WEIGHT_STEPS, "ADD")


def rounded_weights(bones: Array, weights: Array) -> tuple[Array, Array]:
    """Weights as whole steps of 1/WEIGHT_STEPS that sum to WEIGHT_STEPS in every row. A bone named twice in a row
    counts once, with the sum; what rounding leaves over goes to the largest."""
    weights = weights.astype(np.float64)
    for a in range(weights.shape[1]):
        for b in range(a):
            same = bones[:, a] == bones[:, b]
            weights[same, b] += weights[same, a]
            weights[same, a] = 0
    total = weights.sum(1, keepdims=True)
    weights[total[:, 0] <= 0, 0] = 1
    steps = np.rint(weights / weights.sum(1, keepdims=True) * WEIGHT_STEPS).astype(np.int64)
    rows = np.arange(len(steps))
    steps[rows, steps.argmax(1)] += WEIGHT_STEPS - steps.sum(1)
    return bones, steps


# --------------------------------------------------------------------------------------------------------- collections


def _batch_collection(context: bpy.types.Context, batch: Batch, stage: Stage) -> tuple[bpy.types.Collection, str]:
    """The batch's collection in this scene; made anew when the user deleted it or opened another file."""
    for collection in context.scene.collection.children_recursive:
        if collection.get(BATCH_KEY) == batch.id:
            return collection, ""
    made = stage.new(bpy.data.collections, batch.name)
    made[BATCH_KEY] = batch.id
    context.scene.collection.children.link(made)
    remark = "The batch's collection was gone, so a new one was made" if batch.was_made else ""
    return made, remark


def _link(context: bpy.types.Context, collection: bpy.types.Collection, root: bpy.types.Object,
          objects: list[bpy.types.Object], batch: Batch) -> None:  # fmt: skip
    """Into the scene, in one go; selected together with the rest of the batch, the new one active."""
    for o in dict.fromkeys((root, *objects)):
        collection.objects.link(o)
    batch.was_made = True
    with contextlib.suppress(RuntimeError):  # the user excluded the collection from this view layer
        for o in (root, *objects):
            if not o.hide_viewport:
                o.select_set(True)  # also brings the view layer up to date with the collections
        context.view_layer.objects.active = root
        mates = set(collection.objects)
        for other in list(context.view_layer.objects.selected):
            if other not in mates:
                other.select_set(False)
