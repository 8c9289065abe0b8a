# SPDX-License-Identifier: GPL-3.0-or-later
"""A person from photos: by button and file browser, by dropping files on the view, and for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import bpy
from bpy.props import BoolProperty, CollectionProperty, IntProperty, StringProperty

from .. import editing, scene, snippets
from ..actions import Action, Result, Work, can_edit, in_object_mode, needs
from ..messages import MAX_IMAGE_BYTES, PHOTO_POSE, BackendError, Request
from ..packet import Human
from ..properties import active_human, output_of, output_properties, pose_names
from ..translations import told
from . import camera, keeping

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
MAX_PHOTOS: Final = 8
REST: Final = "rest"


@dataclass(frozen=True)
class FromPhoto:
    """A new person, where one from a seed would stand, and if wanted the photo's camera with it."""

    batch: scene.Batch
    label: str
    photo: str  # the file, "" for no camera
    operator: str = "insert_result"

    def apply(self, context: bpy.types.Context, human: Human) -> str:
        root, remark = scene.insert(context, human, self.batch)
        facts = keeping.facts(root.populace.photo)
        if self.photo:
            remark = self._see(context, root, facts) or remark
        return remark or ". ".join(str(note) for note in facts.get("notes", ()))

    def _see(self, context: bpy.types.Context, root: bpy.types.Object, facts: Mapping[str, Any]) -> str:
        path = Path(self.photo)
        try:
            camera.add(context, root, facts, path.read_bytes(), path.name)
        except OSError:
            return f"The person is here, but not the reference: {path.name} cannot be read any more"
        except BackendError as error:
            return str(error)
        return ""


class POPULACE_OT_from_photo(Action, bpy.types.Operator):
    """Make the person that a photo shows, in the photo's pose. Several files are photos of one person"""

    bl_idname = "populace.from_photo"
    bl_label = "Human from Photo"
    undo_name = "Human from Photo"

    __annotations__ = {
        **output_properties(),
        "filepath": StringProperty(name="Photo", subtype="FILE_PATH", options={"SKIP_SAVE"},
                                   description="PNG, JPEG or WebP. Empty if there are several"),
        "directory": StringProperty(name="Folder", subtype="DIR_PATH", options={"SKIP_SAVE", "HIDDEN"},
                                    description="Of the files"),
        "files": CollectionProperty(type=bpy.types.OperatorFileListElement, name="Files",
                                    description="Photos of one person", options={"SKIP_SAVE", "HIDDEN"}),
        "filter_image": BoolProperty(default=True, options={"HIDDEN", "SKIP_SAVE"}),
        "filter_folder": BoolProperty(default=True, options={"HIDDEN", "SKIP_SAVE"}),
        "family": StringProperty(name="Family", description="The kind of generator that makes the person",
                                 default="people", maxlen=32, options={"HIDDEN"}),
        "as_posed": BoolProperty(name="Pose of the Photo", default=True,
                                 description="Otherwise in the pose of the output options"),
        "reference": BoolProperty(
            name="Reference Camera and Image", description="Add a camera that sees the person as the photo did, with "
            "the photo in it. It becomes the scene's camera, and the render gets the photo's size"),
        "texture": BoolProperty(name="The Photo's Pixels", default=True,
                                description="Skin and clothes look as the photo shows them where it shows them"),
        "delight": BoolProperty(name="Take Light Off", default=True,
                                description="Take the photo's light and shade off its pixels"),
        "symmetric": BoolProperty(name="Symmetric", default=True,
                                  description="Where one side is hidden it looks as the other one does"),
        "steps": IntProperty(name="Fitting Steps", min=0, max=1000, default=60,
                             description="More are slower and nearer to the photo; 0 is a first guess"),
        "person": IntProperty(name="Person", min=0, max=63, default=0,
                              description="Which one, if the photo shows several, from the left; 0 is the first"),
        "mask": StringProperty(name="Mask", subtype="FILE_PATH", options={"SKIP_SAVE"},
                               description="A picture of the first photo's size, white where the person is. Only "
                               "needed before a background that is not plain"),
    }  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return in_object_mode(cls, context)

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        """From a button: the file browser. With files, as from a drop: a dialog of the options."""
        self.gather(context)
        if event is not None and event.alt:
            context.window_manager.clipboard = snippets.script(snippets.call(self.bl_idname, self.arguments()))
            self.report({"INFO"}, "Copied as Python")
            return {"FINISHED"}
        if self.filepath or len(self.files):
            return context.window_manager.invoke_props_dialog(self, width=340, confirm_text="Make Human")
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    def gather(self, context: bpy.types.Context) -> None:
        form = context.scene.populace
        for name in output_properties():
            setattr(self, name, getattr(form, name))
        self.family = form.family

    def arguments(self) -> dict[str, Any]:
        found = {name: value for name, value in super().arguments().items() if not name.startswith("filter_")}
        if files := [{"name": one.name} for one in self.files if one.name]:
            found.pop("filepath", None)
            found["files"] = files
        else:
            for name in ("files", "directory"):
                found.pop(name, None)
        return found

    def draw(self, context: bpy.types.Context) -> None:
        column = self.layout.column()
        if len(paths := self._paths()) == 1:
            column.label(text=paths[0].name, icon="IMAGE_DATA", translate=False)
        elif paths:
            text = told("{n} photos of one person", n=len(paths))
            column.label(text=text, icon="IMAGE_DATA", translate=False)
        for name in ("as_posed", "reference"):
            column.prop(self, name)
        column.separator()
        for name in ("texture", "delight", "symmetric"):
            column.prop(self, name)
        column = column.column()
        column.use_property_split = True
        column.use_property_decorate = False
        for name in ("steps", "person", "mask"):
            column.prop(self, name)

    def work(self, context: bpy.types.Context) -> Work:
        paths = self._paths()
        _check(paths)
        photos = [{"image": str(path), "person": self.person} for path in paths]
        if self.mask:
            mask = Path(bpy.path.abspath(self.mask))
            _check([mask])
            photos[0]["mask"] = str(mask)
        output = output_of(self) | ({"pose": PHOTO_POSE} if self.as_posed else {})
        inversion = {"steps": self.steps, "texture": self.texture, "delight": self.delight,
                     "symmetric": self.symmetric}  # fmt: skip
        request = Request(family=self.family, photos=photos, inversion=inversion, **output)
        batch = scene.Batch(paths[0].stem[:50], 1, tuple(context.scene.cursor.location), self.with_rig)
        reference = str(paths[0]) if self.reference else ""
        return [(request, FromPhoto(batch, paths[0].name[:50], reference))]

    def _paths(self) -> list[Path]:
        names = [one.name for one in self.files if one.name]
        folder = bpy.path.abspath(self.directory)
        return [Path(folder, name) for name in names] or (
            [Path(bpy.path.abspath(self.filepath))] if self.filepath else []
        )


def _check(paths: list[Path]) -> None:
    """Raises `BackendError` where the generator would need seconds to say the same."""
    if not paths:
        raise BackendError("no_photo", "No photo was chosen.", "Choose a PNG, JPEG or WebP file.")
    if len(paths) > MAX_PHOTOS:
        raise BackendError("too_many", f"{len(paths)} photos are too many.",
                           f"Choose up to {MAX_PHOTOS} of one person.")  # fmt: skip
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise BackendError("image_unreadable", f"{path.name} is not a photo.", "Choose a PNG, JPEG or WebP file.")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BackendError("image_unreadable", f"{path.name} cannot be read ({error.strerror}).",
                               "Choose it again.") from None  # fmt: skip
        if size > MAX_IMAGE_BYTES:
            raise BackendError("too_large", f"{path.name} is larger than {MAX_IMAGE_BYTES >> 20} MiB.",
                               "Make it smaller.")  # fmt: skip


class POPULACE_OT_set_pose(Action, bpy.types.Operator):
    """Put the active human into a pose: of the library, rest for rigging, or as in its photo"""

    bl_idname = "populace.set_pose"
    bl_label = "Set Pose"

    pose: StringProperty(name="Pose", description='Of the library; "photo" is the one of its photo', maxlen=63,
                         default=REST, search=pose_names, options={"SKIP_SAVE"})  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return can_edit(cls, context)

    def work(self, context: bpy.types.Context) -> Work:
        root = active_human(context)
        pose, turns = self.pose.strip() or REST, None
        if pose == PHOTO_POSE:
            pose, turns = REST, keeping.facts(root.populace.photo).get("rotations")
            if not turns:
                raise BackendError("no_photo", "This person was not made from a photo.", "Choose another pose.")
        request = editing.request(root, pose=pose, joint_rotations=turns)
        return [(request, editing.target(root, self.pose.replace("_", " ").capitalize(), is_posed=True))]


class POPULACE_OT_photo_camera(bpy.types.Operator):
    """Add a camera that sees the active human as its photo did, with the photo in it. Renders get the photo's size"""

    bl_idname = "populace.photo_camera"
    bl_label = "Reference Camera"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    filepath: StringProperty(name="Photo", subtype="FILE_PATH", options={"SKIP_SAVE"})
    filter_image: BoolProperty(default=True, options={"HIDDEN", "SKIP_SAVE"})
    filter_folder: BoolProperty(default=True, options={"HIDDEN", "SKIP_SAVE"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        root = active_human(context)
        return can_edit(cls, context) and needs(cls, "This human was not made from a photo",
                                                root is not None and root.populace.photo)  # fmt: skip

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    def execute(self, context: bpy.types.Context) -> Result:
        path, root = Path(bpy.path.abspath(self.filepath)), active_human(context)
        try:
            _check([path])
            camera.add(context, root, keeping.facts(root.populace.photo), path.read_bytes(), path.name)
        except (BackendError, OSError) as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


class POPULACE_FH_photo(bpy.types.FileHandler):
    """Photos dropped on a 3D view."""

    bl_idname = "POPULACE_FH_photo"
    bl_label = "Human from Photo"
    bl_import_operator = "populace.from_photo"
    bl_file_extensions = ";".join(SUFFIXES)

    @classmethod
    def poll_drop(cls, context: bpy.types.Context) -> bool:
        return context.area is not None and context.area.type == "VIEW_3D" and context.mode == "OBJECT"


_CLASSES = (POPULACE_OT_from_photo, POPULACE_OT_set_pose, POPULACE_OT_photo_camera, POPULACE_FH_photo)


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
