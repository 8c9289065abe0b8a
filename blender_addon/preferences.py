# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the generator is, and the buttons that have to do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bpy
from bpy.props import StringProperty

from . import process
from .messages import masked
from .translations import told

_found = ""  # what `refresh` found, so that drawing needs no look at the disk
_sections: list[Callable[[Any, bpy.types.Context], None]] = []


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
    torch_index: StringProperty(
        name="PyTorch Index",
        description="Address of a studio's mirror of PyTorch's packages, pip for wherever pip is configured to look. "
        "Leave empty for download.pytorch.org",
    )  # fmt: skip
    package_index: StringProperty(
        name="Package Index",
        description="Address of a studio's mirror of the Python Package Index. Leave empty for pip's own",
    )  # fmt: skip

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        layout.use_property_split = True
        layout.prop(self, "python", placeholder="Found automatically")
        row = layout.row()
        row.alignment = "RIGHT"
        if _found:
            row.label(text=told("Generator: {path}", path=_found), icon="CHECKMARK", translate=False)
        else:
            row.label(text="No generator found: install it, or choose its Python above", icon="ERROR")
        row = layout.row(align=True)
        row.operator("populace.find_generator", icon="VIEWZOOM")
        row.operator("populace.start_backend", icon="PLAY")
        row.operator("populace.stop_backend", icon="QUIT")
        for draw in _sections:
            draw(layout, context)
        header, body = layout.panel("POPULACE_mirrors", default_closed=True)
        header.label(text="Mirrors")
        if body is not None:
            body.prop(self, "torch_index", placeholder="download.pytorch.org")
            body.prop(self, "package_index", placeholder="PyPI")


def add_section(draw: Callable[[Any, bpy.types.Context], None]) -> None:
    """Have other modules draw below ours; `remove_section` takes it back."""
    _sections.append(draw)


def remove_section(draw: Callable[[Any, bpy.types.Context], None]) -> None:
    if draw in _sections:
        _sections.remove(draw)


def python() -> str:
    """The configured interpreter, "" to look for one."""
    value = _value("python")
    return bpy.path.abspath(value) if value else ""


def indexes() -> tuple[str, str]:
    """The mirrors of PyTorch and of all other packages, "" for the usual place."""
    return _value("torch_index"), _value("package_index")


def found() -> str:
    """The generator that `refresh` found, for people to read; "" if there is none."""
    return _found


def _value(name: str) -> str:
    addon = bpy.context.preferences.addons.get(__package__)
    return getattr(addon.preferences, name).strip() if addon is not None else ""


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
