# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the generator is, and the buttons that have to do with it."""

from __future__ import annotations

import bpy
from bpy.props import StringProperty

from . import process
from .messages import masked

_found = ""  # what `refresh` found, so that drawing needs no look at the disk


def _python_changed(preferences: bpy.types.AddonPreferences, context: bpy.types.Context) -> None:
    refresh()


class PopulacePreferences(bpy.types.AddonPreferences):
    bl_idname = __package__

    python: StringProperty(
        name="Python", subtype="FILE_PATH",
        description="The Python that has the generator installed, or its environment's folder. "
        "Leave empty to look in the usual places",
        update=_python_changed,
    )  # fmt: skip

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        layout.use_property_split = True
        layout.prop(self, "python", placeholder="Found automatically")
        row = layout.row()
        row.alignment = "RIGHT"
        if _found:
            row.label(text=f"Generator: {_found}", icon="CHECKMARK")
        else:
            row.label(text="No generator found: install it, or choose its Python above", icon="ERROR")
        row = layout.row(align=True)
        row.operator("populace.find_generator", icon="VIEWZOOM")
        row.operator("populace.start_backend", icon="PLAY")
        row.operator("populace.stop_backend", icon="QUIT")


def python() -> str:
    """The configured interpreter, "" to look for one."""
    addon = bpy.context.preferences.addons.get(__package__)
    return bpy.path.abspath(addon.preferences.python) if addon is not None and addon.preferences.python else ""


def refresh() -> bool:
    """Look for the generator again. Returns whether there is one."""
    global _found
    command = process.find_command(python())
    _found = masked(command.argv[0]) if command is not None else ""
    return command is not None


def register() -> None:
    bpy.utils.register_class(PopulacePreferences)
    refresh()


def unregister() -> None:
    bpy.utils.unregister_class(PopulacePreferences)
