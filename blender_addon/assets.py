# SPDX-License-Identifier: GPL-3.0-or-later
"""People as assets: marked in this file, or saved into a library folder, each with picture, catalogue and tags.

The asset is a collection of the person's own, since an armature without its meshes would be of no use.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import bpy
import numpy as np
from bpy.props import PointerProperty, StringProperty

from . import library
from .portrait import Surface, portrait

log = logging.getLogger(__name__)

PREVIEW_PX: Final = 256
TEXTURE_PX: Final = 512  # more is not seen in a preview

Array = np.ndarray[Any, Any]
Result = set[str]


def asset_properties() -> dict[str, Any]:
    """The annotations that the form and the operators share."""
    return {
        "catalog": StringProperty(
            name="Catalogue", description="Where the asset browser lists them; slashes make levels",
            default="People/Populace"),
        "author": StringProperty(name="Author", description="Written into each asset"),
        "licence": StringProperty(
            name="Licence", description="Written into each asset. People that you make are yours", default="CC0-1.0"),
        "tags": StringProperty(
            name="Tags", description="More words to find them by, with commas between; sex, age, build, garments and "
            "colours are added by themselves"),
    }  # fmt: skip


class PopulaceAssetSettings(bpy.types.PropertyGroup):
    """The form for assets."""

    __annotations__ = {
        **asset_properties(),
        "folder": StringProperty(
            name="Library", description="Folder of the asset library to save into; empty for the first of the "
            "preferences", subtype="DIR_PATH"),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- people as assets


def chosen_humans(context: bpy.types.Context) -> list[bpy.types.Object]:
    """The people that the selected objects belong to, each once, by their topmost objects."""
    found: dict[bpy.types.Object, None] = {}
    for o in context.selected_objects:
        root: bpy.types.Object | None = o
        while root is not None and not root.populace.uuid:
            root = root.parent
        if root is not None:
            found[root] = None
    return list(found)


def own_collection(root: bpy.types.Object) -> bpy.types.Collection:
    """The collection that holds this person and nobody else; made where there is none, in the place of the old one."""
    objects = {root, *(o for o in root.children_recursive if not o.populace.uuid)}
    for collection in root.users_collection:
        if set(collection.all_objects) == objects and collection not in _scene_roots():
            return collection
    made = bpy.data.collections.new(f"Human {root.populace.seed}".strip())
    for o in objects:
        made.objects.link(o)
    for collection in root.users_collection:
        if collection != made:
            collection.children.link(made)
            for o in objects & set(collection.objects):
                collection.objects.unlink(o)
    return made


def describe(collection: bpy.types.Collection, root: bpy.types.Object, catalog: str, facts: dict[str, str]) -> None:
    """Mark as an asset, or say anew what is said of one."""
    attributes = _attributes(root)
    collection.instance_offset = root.matrix_world.translation
    collection.asset_mark()
    data = collection.asset_data
    data.catalog_id = catalog
    data.author, data.license = facts["author"], facts["licence"]
    data.description = library.sentence(attributes)
    for tag in list(data.tags):
        data.tags.remove(tag)
    for word in library.tags(attributes, facts["tags"]):
        data.tags.new(word, skip_if_exists=True)


def set_preview(collection: bpy.types.Collection, picture: Array) -> None:
    """`picture` f32 [S, S, 4]. Survives saving; nothing is rendered, so it works without a window."""
    preview = collection.preview_ensure()
    preview.image_size = picture.shape[1], picture.shape[0]
    preview.image_pixels_float.foreach_set(np.ascontiguousarray(picture, np.float32).ravel())


def picture_of(context: bpy.types.Context, collection: bpy.types.Collection) -> Array:
    """The person as posed and modified now."""
    graph = context.evaluated_depsgraph_get()
    surfaces = []
    for o in collection.all_objects:
        if o.type == "MESH" and o.visible_get():
            surfaces.append(_surface(o.evaluated_get(graph)))
    return portrait(surfaces, PREVIEW_PX)


def _surface(o: bpy.types.Object) -> Surface:
    mesh = o.to_mesh()
    try:
        mesh.calc_loop_triangles()
        count = len(mesh.loop_triangles)
        vertices = np.empty((len(mesh.vertices), 3), np.float32)
        faces, corners = np.empty((count, 3), np.int32), np.empty((count, 3), np.int32)
        uvs = np.zeros((len(mesh.loops), 2), np.float32)
        mesh.vertices.foreach_get("co", vertices.ravel())
        mesh.loop_triangles.foreach_get("vertices", faces.ravel())
        mesh.loop_triangles.foreach_get("loops", corners.ravel())
        if mesh.uv_layers.active is not None:
            mesh.uv_layers.active.uv.foreach_get("vector", uvs.ravel())
    finally:
        o.to_mesh_clear()
    matrix = np.array(o.matrix_world)
    return Surface(vertices @ matrix[:3, :3].T + matrix[:3, 3], faces, uvs[corners], _texture(o))


def _texture(o: bpy.types.Object) -> Array:
    """f32 [H, W, 3] of the base colour; one pixel of the material's own colour where no image leads to it."""
    material = o.active_material
    nodes = material.node_tree.nodes if material is not None and material.node_tree is not None else ()
    for node in nodes:
        if isinstance(node, bpy.types.ShaderNodeBsdfPrincipled) and (links := node.inputs["Base Color"].links):
            image = getattr(links[0].from_node, "image", None)
            if image is not None and image.size[0]:
                pixels = np.empty((image.size[1], image.size[0], image.channels), np.float32)
                image.pixels.foreach_get(pixels.ravel())
                step = max(1, image.size[0] // TEXTURE_PX)
                return pixels[::step, ::step, :3]
    color = material.diffuse_color[:3] if material is not None else (0.8, 0.8, 0.8)
    return np.array(color, np.float32).reshape(1, 1, 3)


def _picture_in(path: str) -> Array:
    """A picture file, brought to the preview's size. Raises RuntimeError if it is none."""
    image = bpy.data.images.load(bpy.path.abspath(path))
    try:
        side = max(image.size)
        if not side:
            raise RuntimeError("not a picture")
        image.scale(max(1, round(image.size[0] * PREVIEW_PX / side)), max(1, round(image.size[1] * PREVIEW_PX / side)))
        width, height = image.size
        pixels = np.empty((height, width, 4), np.float32)
        image.pixels.foreach_get(pixels.ravel())
    finally:
        bpy.data.images.remove(image)
    square = np.zeros((PREVIEW_PX, PREVIEW_PX, 4), np.float32)
    y, x = (PREVIEW_PX - height) // 2, (PREVIEW_PX - width) // 2
    square[y : y + height, x : x + width] = pixels
    return square


def _attributes(root: bpy.types.Object) -> dict[str, Any]:
    try:
        found = json.loads(root.populace.attributes or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _scene_roots() -> set[bpy.types.Collection]:
    return {scene.collection for scene in bpy.data.scenes}


# ----------------------------------------------------------------------------------------------------------- operators


class _AssetOperator:
    """What marking and saving have in common."""

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Switch to Object Mode first")
            return False
        if not chosen_humans(context):
            cls.poll_message_set("Select generated humans")
            return False
        return True

    def _fill(self, context: bpy.types.Context, names: Iterable[str]) -> None:
        """The button: take the form's values."""
        for name in names:
            setattr(self, name, getattr(context.scene.populace_assets, name))

    def _facts(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in asset_properties()}

    def _mark(self, context: bpy.types.Context, root: bpy.types.Object, catalog: str) -> bpy.types.Collection:
        collection = own_collection(root)
        describe(collection, root, catalog, self._facts())
        set_preview(collection, _picture_in(self.thumbnail) if self.thumbnail else picture_of(context, collection))
        return collection


_THUMBNAIL: Final = {
    "thumbnail": StringProperty(name="Picture", description="A picture file in place of the rendered preview",
                                subtype="FILE_PATH", options={"SKIP_SAVE"}),
}  # fmt: skip


class POPULACE_OT_mark_asset(_AssetOperator, bpy.types.Operator):
    """Mark each selected person as an asset of this file, with picture, tags, author and licence"""

    bl_idname = "populace.mark_asset"
    bl_label = "Mark as Asset"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    __annotations__ = {**asset_properties(), **_THUMBNAIL}

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        self._fill(context, asset_properties())
        return self.execute(context)

    def execute(self, context: bpy.types.Context) -> Result:
        path = library.clean_path(self.catalog)
        catalog, remark = library.catalog_id(path), ""
        try:
            if path and bpy.data.filepath:
                catalog = library.merge_catalog(Path(bpy.data.filepath).parent, path)
            elif path:
                remark = ". Save the file and mark again to write its catalogue"
            humans = chosen_humans(context)
            for root in humans:
                self._mark(context, root, catalog if path else "")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            self.report({"ERROR"}, f"The assets could not be marked: {_reason(error)}")
            return {"CANCELLED"}
        marked = "1 person is an asset" if len(humans) == 1 else f"{len(humans)} people are assets"
        self.report({"INFO"}, f"{marked} now{remark}")
        return {"FINISHED"}


class POPULACE_OT_save_assets(_AssetOperator, bpy.types.Operator):
    """Save each selected person as a file of its own into an asset library, with all textures"""

    bl_idname = "populace.save_assets"
    bl_label = "Save to Library"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    __annotations__ = {**PopulaceAssetSettings.__annotations__, **_THUMBNAIL}

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        self._fill(context, (*asset_properties(), "folder"))
        return self.execute(context)

    def execute(self, context: bpy.types.Context) -> Result:
        libraries = context.preferences.filepaths.asset_libraries
        folder = self.folder or next((found.path for found in libraries), "")
        if not folder:
            self.report({"ERROR"}, "Choose the folder of an asset library")
            return {"CANCELLED"}
        target, humans = Path(bpy.path.abspath(folder)), chosen_humans(context)
        try:
            target.mkdir(parents=True, exist_ok=True)
            path = library.clean_path(self.catalog)
            catalog = library.merge_catalog(target, path) if path else ""
            for root in humans:
                known = {c for c in bpy.data.collections if c.asset_data is not None}
                collection = self._mark(context, root, catalog)
                bpy.data.libraries.write(str(target / _file_name(root)), {collection}, fake_user=True, compress=True)
                if collection not in known:
                    collection.asset_clear()
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            self.report({"ERROR"}, f"The assets could not be saved: {_reason(error)}")
            return {"CANCELLED"}
        self.report({"INFO"}, f"{len(humans)} {'person' if len(humans) == 1 else 'people'} saved to {target.name}")
        return {"FINISHED"}


def _file_name(root: bpy.types.Object) -> str:
    """The same for the same person, so that saving again replaces the file."""
    plain = re.sub(r"[^\w-]+", "-", f"human-{root.populace.seed}").strip("-")
    return f"{plain}-{root.populace.uuid[:8]}.blend"


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
    return text[:200].rstrip(".")


_CLASSES = (PopulaceAssetSettings, POPULACE_OT_mark_asset, POPULACE_OT_save_assets)


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)
    bpy.types.Scene.populace_assets = PointerProperty(type=PopulaceAssetSettings)


def unregister() -> None:
    del bpy.types.Scene.populace_assets
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
