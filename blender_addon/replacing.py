# SPDX-License-Identifier: GPL-3.0-or-later
"""One person in place of another: same objects, new data. Called on the main thread, in Object Mode.

Name, transform, parenting, selection, collections, the user's own modifiers and a pose that was changed by hand stay;
meshes, images and the armature's bones are exchanged and the old ones removed. A material that the user built stays;
one of ours keeps what was changed on it and gets the new images.

A preview exchanges meshes only. It makes no undo step, so everything is put back before anybody looks closer: before
undo, before saving, before the final person comes. The preview's mesh itself remembers, in a property, what it hides;
no Python has to remember it across undo or loading a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import bpy
from bpy.app.handlers import persistent

from . import joints, scene
from .packet import Human
from .photo import keeping
from .properties import person_of

ORIGINAL: Final = "populace_original"  # on a preview's mesh: the mesh that it hides

Meshes = dict[str, bpy.types.Object]


def find(uuid: str) -> bpy.types.Object | None:
    """The topmost object of a person, wherever it is."""
    return next((o for o in bpy.data.objects if o.populace.uuid == uuid), None) if uuid else None


def meshes(root: bpy.types.Object) -> Meshes:
    """The meshes of a person by part; those of people that hang on this one are not among them."""
    found = {}
    for o in (root, *root.children_recursive):
        if o.type == "MESH" and o.populace.part and person_of(o) == root:
            found.setdefault(o.populace.part, o)
    return found


def replace(context: bpy.types.Context, root: bpy.types.Object, human: Human, with_rig: bool) -> bpy.types.Object:
    """Let `root` be this person from now on. Returns the topmost object, which is another one where an armature was
    added or taken away. Raises whatever goes wrong, with nothing changed."""
    drop_previews(root)
    stage = scene.Stage()
    try:
        made, objects = scene.build(context, stage, human, with_rig)
    except BaseException:
        stage.roll_back()
        raise
    old, spare = meshes(root), [made, *objects]
    data = [o.data for o in (root, *old.values()) if o.data is not None]
    images = _images_of(data)
    top = root
    if made.type == root.type == "ARMATURE":
        _exchange_bones(root, made)
        joints.hand_over(made, root)
    elif made.type != root.type:
        top = _exchange_root(root, made)
        spare.append(root)
    for new in objects:
        if new is top:
            continue
        mine = old.pop(new.populace.part, None)
        if mine is None or mine is root is not top:
            new.parent = top
            _link_like(top, new)
            spare.remove(new)
        else:
            _keep_material(mine.data, new.data)
            mine.data = new.data
            _keep_rig(mine, new)
        for modifier in (mine or new).modifiers:
            if modifier.type == "ARMATURE" and modifier.object in (made, root, None):
                modifier.object = top if with_rig and top.type == "ARMATURE" else None
    spare += [gone for gone in old.values() if gone is not top]
    kept = keeping.images_of(spare)
    _remove({o for o in spare if o is not top}, data, images)
    keeping.drop(kept)
    return top


def show_preview(context: bpy.types.Context, root: bpy.types.Object, human: Human) -> None:
    """Let the person look like this for a while. Parts that it does not wear yet are not shown."""
    stage = scene.Stage()
    try:
        armature = root if root.type == "ARMATURE" else None
        objects = scene.build_parts(context, stage, human, armature)
        found, old = meshes(root), []
        for made in objects:
            mine = found.get(made.populace.part)
            if mine is None:
                old.append(made.data)
                continue
            original = mine.data.get(ORIGINAL)
            if original is not None:
                old.append(mine.data)
            made.data[ORIGINAL] = original or mine.data
            mine.data = made.data
    except BaseException:
        stage.roll_back()
        raise
    _remove(set(objects), old, _images_of(old))


def drop_previews(root: bpy.types.Object | None = None) -> None:
    """Put back what previews hide, of one person or of all. Costs nothing where there are none."""
    old = []
    for o in meshes(root).values() if root is not None else bpy.data.objects:
        if o.type == "MESH" and o.data is not None and isinstance(hidden := o.data.get(ORIGINAL), bpy.types.Mesh):
            old.append(o.data)
            o.data = hidden
    if old:
        _remove(set(), old, _images_of(old))


# ----------------------------------------------------------------------------------------------------------- the parts


def _exchange_bones(root: bpy.types.Object, made: bpy.types.Object) -> None:
    """New bones; the pose too, unless somebody changed it by hand."""
    is_own = scene.pose_mark(root) == root.populace.pose_mark
    for name in ("display_type", "show_names", "show_axes"):
        setattr(made.data, name, getattr(root.data, name))
    for shown in made.data.collections:
        if (mine := root.data.collections.get(shown.name)) is not None:
            shown.is_visible = mine.is_visible
    root.data = made.data
    if is_own:
        for bone in made.pose.bones:
            mine = root.pose.bones[bone.name]
            mine.rotation_quaternion, mine.location = bone.rotation_quaternion, bone.location
        root.populace.pose_mark = made.populace.pose_mark


def _exchange_root(root: bpy.types.Object, made: bpy.types.Object) -> bpy.types.Object:
    """Another kind of object cannot take over data, so a new one takes the old one's place."""
    _link_like(root, made)
    made.parent, made.parent_type, made.parent_bone = root.parent, root.parent_type, root.parent_bone
    made.matrix_parent_inverse = root.matrix_parent_inverse
    made.rotation_mode = root.rotation_mode
    made.matrix_basis = root.matrix_basis
    made.populace.take_over(root.populace)
    for layer in (layer for s in bpy.data.scenes for layer in s.view_layers if root.name in layer.objects):
        layer.update()  # else it does not know of the new object yet
        if made.name in layer.objects:
            made.select_set(root.select_get(view_layer=layer), view_layer=layer)
            if layer.objects.active == root:
                layer.objects.active = made
    for child in root.children:
        if not child.populace.part or made.type != "MESH":
            child.parent = made
    root.populace.uuid = ""
    return made


def _keep_rig(mine: bpy.types.Object, new: bpy.types.Object) -> None:
    """The modifier that the new data need; those of the user stay as they are."""
    has = next((m for m in mine.modifiers if m.type == "ARMATURE"), None)
    wants = any(m.type == "ARMATURE" for m in new.modifiers)
    if wants and has is None:
        mine.modifiers.new("Rig", "ARMATURE")
        mine.modifiers.move(len(mine.modifiers) - 1, 0)
    elif has is not None and not wants and has.name == "Rig":
        mine.modifiers.remove(has)


def _keep_material(old: bpy.types.Mesh, new: bpy.types.Mesh) -> None:
    """The user's own material, or ours with everything that was changed on it but the images."""
    mine, made = (mesh.materials[0] if len(mesh.materials) else None for mesh in (old, new))
    if mine is None or made is None:
        return
    nodes, wanted = _images(mine), _images(made)
    if "Base Color" in nodes:
        if nodes.keys() != wanted.keys() or mine.users > 1:
            return
        for name, node in nodes.items():
            node.image = wanted[name].image
    new.materials[0] = mine
    bpy.data.materials.remove(made)


def _images(material: bpy.types.Material) -> dict[str, Any]:
    nodes = material.node_tree.nodes if material.node_tree is not None else ()
    return {node.name: node for node in nodes if node.type == "TEX_IMAGE"}


def _link_like(model: bpy.types.Object, made: bpy.types.Object) -> None:
    for collection in model.users_collection:
        if made.name not in collection.objects:
            collection.objects.link(made)


def _materials_of(data: Iterable[bpy.types.ID]) -> set[bpy.types.Material]:
    return {m for block in data if isinstance(block, bpy.types.Mesh) for m in block.materials if m is not None}


def _images_of(data: Iterable[bpy.types.ID]) -> set[bpy.types.Image]:
    found = (node.image for material in _materials_of(data) for node in _images(material).values())
    return {image for image in found if image is not None}


def _remove(objects: set[bpy.types.Object], data: Iterable[bpy.types.ID], images: set[bpy.types.Image]) -> None:
    """These objects; and of these data, their materials and the images what nobody uses any more."""
    blocks = dict.fromkeys((*data, *(o.data for o in objects if o.data is not None)))
    materials = _materials_of(blocks)
    bpy.data.batch_remove(objects)
    for level in (blocks, materials, images):
        bpy.data.batch_remove([block for block in level if not block.users])


# ------------------------------------------------------------------------------------------------------------ handlers


@persistent
def _put_back(*_: Any) -> None:
    drop_previews()


_HANDLERS: Final = ("undo_pre", "redo_pre", "undo_post", "redo_post", "save_pre", "load_post")


def register() -> None:
    for name in _HANDLERS:
        getattr(bpy.app.handlers, name).append(_put_back)


def unregister() -> None:
    drop_previews()
    for name in _HANDLERS:
        handlers = getattr(bpy.app.handlers, name)
        if _put_back in handlers:
            handlers.remove(_put_back)
