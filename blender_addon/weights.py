# SPDX-License-Identifier: GPL-3.0-or-later
"""Other weights, in the add-on's preferences: list, licence, download, import, use, removal.

The generator's command line does the work in a process of its own; nothing is downloaded here. What it said last is
kept as a snapshot for drawing.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, Final

import bpy
from bpy.props import StringProperty

from . import chores, preferences, process
from .chore import Chore, Phase
from .messages import BackendError
from .translations import told

NAME: Final = "Weights"

Result = set[str]

_rows: list[dict[str, Any]] = []
_remark = ""


def row(name: str) -> dict[str, Any]:
    """What is known about weights; {} if nothing is."""
    return next((found for found in _rows if found.get("name") == name), {})


def _start(*words: str) -> None:
    """Run `populace weights ...`. Raises `BackendError` if there is no generator."""
    command = process.find_command(preferences.python())
    if command is None:
        raise BackendError("not_installed", "The generator was not found on this computer.", process.INSTALL_HINT)
    chores.begin(Chore(NAME, [*command.argv, "weights", "--leash", *words], command.cwd), _ended)


def _ended(chore: Chore) -> None:
    """Take in a list; after anything that changed something ask for a new one."""
    global _remark
    result = chore.result
    if "weights" in result:
        _rows[:] = [found for found in result["weights"] if isinstance(found, dict) and found.get("name")]
        chores.dismiss()
    elif chore.phase is Phase.DONE:
        freed = result.get("freed_bytes")
        _remark = f"{freed / 1e6:.0f} MB freed" if isinstance(freed, int) else f"{result.get('name', '')} is here"
        _start("list")


class _Weights:
    """Start the command line, or say why not; in background mode wait for it."""

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if chores.is_busy():
            cls.poll_message_set("Wait until the running set-up or download has finished")  # type: ignore[attr-defined]
            return False
        return True

    def run(self, *words: str) -> Result:
        try:
            _start(*words)
        except BackendError as error:
            self.report({"ERROR"}, str(error))  # type: ignore[attr-defined]
            return {"CANCELLED"}
        chore = chores.wait() if bpy.app.background else None
        if chore is not None and chore.error is not None:
            self.report({"ERROR"}, str(chore.error))  # type: ignore[attr-defined]
            return {"CANCELLED"}
        return {"FINISHED"}


class POPULACE_OT_list_weights(_Weights, bpy.types.Operator):
    """Show which weights this generator knows, and which of them are here"""

    bl_idname = "populace.list_weights"
    bl_label = "List Weights"

    def execute(self, context: bpy.types.Context) -> Result:
        return self.run("list")


class POPULACE_OT_fetch_weights(_Weights, bpy.types.Operator):
    """Read the licence, accept it, and download these weights"""

    bl_idname = "populace.fetch_weights"
    bl_label = "Download Weights"

    name: StringProperty(name="Name", options={"SKIP_SAVE"})
    agree: bpy.props.BoolProperty(name="Agree", options={"SKIP_SAVE", "HIDDEN"},
                                  description="For scripts: accept the licence and the download")  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not bpy.app.online_access:
            cls.poll_message_set("Online access is off: allow it in Preferences > System, or import the file")
            return False
        return super().poll(context)

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        self.agree = True  # by the dialog's button
        return context.window_manager.invoke_props_dialog(
            self, width=440, title="Download Weights", confirm_text="Accept and Download"
        )

    def draw(self, context: bpy.types.Context) -> None:
        about = row(self.name)
        column = self.layout.column(align=True)
        column.label(text=told("{title}, {size} MB from {source}",
            title=about.get("title", self.name), size=round(about.get("size", 0) / 1e6),
            source=about.get("source", "")), translate=False)  # fmt: skip
        box = self.layout.box().column(align=True)
        box.scale_y = 0.8
        for paragraph in str(about.get("licence_text", "")).splitlines()[:24]:
            for line in textwrap.wrap(paragraph, 76) or [""]:
                box.label(text=line)
        if re.match("https?://", str(about.get("licence_url", ""))):
            self.layout.operator("wm.url_open", text="Licence", icon="URL").url = about["licence_url"]

    def execute(self, context: bpy.types.Context) -> Result:
        if not self.agree:
            self.report({"ERROR"}, "A licence has to be accepted: call it with agree=True to do so")
            return {"CANCELLED"}
        return self.run("fetch", self.name, "--yes")


class POPULACE_OT_import_weights(_Weights, bpy.types.Operator):
    """Take in a safetensors file: weights of your own, or those of the list that came another way"""

    bl_idname = "populace.import_weights"
    bl_label = "Import Weights"

    filepath: StringProperty(subtype="FILE_PATH", options={"SKIP_SAVE"})
    filter_glob: StringProperty(default="*.safetensors", options={"HIDDEN"})
    name: StringProperty(name="Name", description="Empty to take the file's", options={"SKIP_SAVE"})

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    def execute(self, context: bpy.types.Context) -> Result:
        path = Path(bpy.path.abspath(self.filepath))
        name = self.name or re.sub(r"[^a-z0-9]+", "_", path.stem.lower()).strip("_")
        return self.run("import", str(path), "--name", name)


class POPULACE_OT_use_weights(_Weights, bpy.types.Operator):
    """Make people with these weights, from the generator's next start on"""

    bl_idname = "populace.use_weights"
    bl_label = "Use for People"

    name: StringProperty(name="Name", options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> Result:
        return self.run("use", self.name)


class POPULACE_OT_remove_weights(_Weights, bpy.types.Operator):
    """Delete the files of these weights; people made with them stay"""

    bl_idname = "populace.remove_weights"
    bl_label = "Remove Weights"

    name: StringProperty(name="Name", options={"SKIP_SAVE"})

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        return context.window_manager.invoke_confirm(
            self, event, title="Remove Weights", confirm_text="Remove", icon="WARNING",
            message=told("Frees {size} MB", size=round(row(self.name).get("size", 0) / 1e6)),
        )  # fmt: skip

    def execute(self, context: bpy.types.Context) -> Result:
        return self.run("remove", self.name)


def draw_weights(layout: Any, context: bpy.types.Context) -> None:
    """A section of the preferences."""
    header, body = layout.panel("POPULACE_weights", default_closed=True)
    header.label(text="Weights")
    if body is None:
        return
    chore = chores.current()
    if chore is not None and chore.name == NAME:
        _draw_chore(body, chore)
    elif _remark:
        body.label(text=_remark, icon="INFO")
    for found in _rows:
        _draw_row(body.box().row(), found)
    buttons = body.row(align=True)
    buttons.operator("populace.list_weights", text="Refresh" if _rows else "List", icon="FILE_REFRESH")
    buttons.operator("populace.import_weights", text="Import File...", icon="FILE_FOLDER")


def _draw_chore(layout: Any, chore: Chore) -> None:
    line = layout.row(align=True)
    if chore.error is not None:
        column = line.column(align=True)
        column.label(text=chore.error.message, icon="ERROR")
        column.label(text=chore.error.hint, icon="BLANK1")
        line.operator("populace.dismiss_chore", text="", icon="X", emboss=False)
    elif not chore.ended:
        line.progress(factor=chore.fraction, text=", ".join(filter(None, (chore.stage or "Working", chore.text))))
        line.operator("populace.cancel_chore", text="", icon="X")


def _draw_row(layout: Any, found: dict[str, Any]) -> None:
    size = found.get("size", 0)
    state = f"{size / 1e6:.0f} MB, " if size else ""
    is_used = bool(found.get("used_for")) or (found["name"] == "people" and not any(r.get("used_for") for r in _rows))
    layout.label(text=f"{found.get('title', found['name'])} ({state}{found.get('licence', '')})",
                 icon="CHECKMARK" if is_used else "FILE" if found.get("here") else "IMPORT")  # fmt: skip
    buttons = layout.row(align=True)
    source = found.get("source")
    if not found.get("here"):
        if size:
            buttons.operator("populace.fetch_weights", text="Download...").name = found["name"]
        return
    if source in ("imported", "embedded"):
        buttons.operator("populace.use_weights", text="Use").name = found["name"]
    if source != "embedded":
        buttons.operator("populace.remove_weights", text="", icon="TRASH").name = found["name"]


_CLASSES = (
    POPULACE_OT_list_weights, POPULACE_OT_fetch_weights, POPULACE_OT_import_weights, POPULACE_OT_use_weights,
    POPULACE_OT_remove_weights,
)  # fmt: skip


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)
    preferences.add_section(draw_weights)


def unregister() -> None:
    preferences.remove_section(draw_weights)
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
