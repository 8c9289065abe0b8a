# SPDX-License-Identifier: GPL-3.0-or-later
"""The panels of the active human and of its history. They draw what is known and decide nothing."""

from __future__ import annotations

import functools
import json
from typing import Any, Final

import bpy
from bpy.app.translations import pgettext_iface as iface

from . import attributes, editing, history, recipes, scene, tasks, thumbnails
from .families import Attribute, Family
from .messages import PHOTO_POSE
from .packet import recipe_latents
from .panel import _Panel, _safe, _wrapped, draw_output, split
from .properties import active_human, other_human

COLUMNS: Final = 3  # of pictures
PICTURE: Final = 4.2  # size of one, in rows of text
NAME: Final = 0.37  # share of a part's name in its row: "Accessory" fits
SWATCH: Final = 1.0  # width of a part's colour


class _Human(_Panel):
    """A panel that is there while a person is active."""

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return active_human(context) is not None


class _Section(_Human):
    """A part of the active human's panel that needs to know the family."""

    bl_parent_id = "POPULACE_PT_human"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        root = active_human(context)
        return root is not None and _family(root) is not None


class POPULACE_PT_human(_Human, bpy.types.Panel):
    """The person that the active object belongs to."""

    bl_idname = "POPULACE_PT_human"
    bl_label = "Active Human"
    bl_order = 1

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        layout, root = self.layout, active_human(context)
        about = root.populace
        row = layout.split(factor=0.38)
        _picture(row, _key(root), PICTURE)
        column = row.column(align=True)
        column.label(text=root.name, translate=False)
        origin = iface("From a photo") if about.photo else f"{iface('Seed')} {about.seed}"
        column.label(text=f"{origin}, {about.height_m:.2f} m", translate=False)
        buttons = column.row(align=True)
        buttons.operator("populace.place_human", text="", icon="SNAP_ON")
        buttons.operator("populace.add_favourite", text="", icon="FUND")
        buttons.operator("populace.make_again", text="", icon="DUPLICATE")
        buttons.operator("populace.use_recipe", text="", icon="LOOP_BACK")
        buttons.operator("populace.copy_recipe", text="", icon="COPYDOWN")
        buttons.operator_menu_enum("populace.copy_python", "what", text="", icon="CONSOLE")
        if root.type == "ARMATURE":  # hidden in the body at first: most people look better without lines on them
            buttons.prop(root, "show_in_front", text="", icon="BONE_DATA", toggle=True)
            fingers = root.data.collections.get(scene.FINGERS)
            if fingers is not None:
                buttons.prop(fingers, "is_visible", text="", icon="VIEW_PAN", toggle=True)
        _draw_remarks(layout, context, root)
        if _family(root) is None:
            return
        row = layout.row(align=True)
        row.prop(context.window_manager.populace, "words", text="", placeholder="older, red shirt, no hat")
        row.operator("populace.change_by_words", text="", icon="PLAY")
        if about.photo:
            row = layout.row(align=True)
            row.operator("populace.set_pose", text="Photo's Pose", icon="POSE_HLT").pose = PHOTO_POSE
            row.operator("populace.set_pose", text="Rest Pose", icon="ARMATURE_DATA").pose = "rest"
            row.operator("populace.photo_camera", text="", icon="CAMERA_DATA")


class POPULACE_PT_attributes(_Section, bpy.types.Panel):
    bl_idname = "POPULACE_PT_attributes"
    bl_label = "Attributes"

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        root = active_human(context)
        family, group = _family(root), attributes.sliders(context, root.populace.family)
        if group is None:
            return
        column = split(self.layout)
        known = editing.attributes(root)
        for attribute in family.attributes:
            if _part_of(attribute, family) is None and attribute.name in known:
                column.prop(group, attribute.name, slider=attribute.kind == "number")


class POPULACE_PT_parts(_Section, bpy.types.Panel):
    bl_idname = "POPULACE_PT_parts"
    bl_label = "Parts"

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        root = active_human(context)
        family = _family(root)
        column = self.layout.column(align=True)
        for part in _parts(family, _worn(root)):
            _draw_part(column, context, family, part)
        row = self.layout.row(align=True)
        row.operator("populace.reroll", text="Re-roll All", icon="FILE_REFRESH")
        row.operator("populace.reroll", text="New Looks", icon="TEXTURE").kinds = "TEX"
        other = other_human(context)
        if other is not None and other.populace.family == root.populace.family:
            _draw_swaps(self.layout, family, root, other)


class POPULACE_PT_variants(_Section, bpy.types.Panel):
    bl_idname = "POPULACE_PT_variants"
    bl_label = "Variants"

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        layout, root = self.layout, active_human(context)
        sheet = editing.sheet(root)
        row = layout.row(align=True)
        row.prop(context.window_manager.populace, "variation", slider=True)
        row.operator("populace.make_variants", text="", icon="FILE_REFRESH" if sheet else "PLAY")
        if not sheet:
            return
        grid = _grid(layout)
        for variant in sheet:
            cell = grid.column(align=True)
            _picture(cell, variant.key, PICTURE)
            choose = cell.row()
            choose.enabled = bool(variant.key)
            button = choose.operator("populace.vary", text="Choose" if variant.key else "Waiting")
            button.seed, button.amount, button.part = variant.seed, variant.amount, variant.part
        layout.operator("populace.close_variants", icon="X")


class POPULACE_PT_mix(_Section, bpy.types.Panel):
    bl_idname = "POPULACE_PT_mix"
    bl_label = "Mix"
    bl_options = {"DEFAULT_CLOSED"}  # noqa: RUF012

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        root, other = active_human(context), other_human(context)
        if other is None:
            self.layout.label(text="Select another human as well", icon="INFO")
        elif other.populace.family != root.populace.family:
            self.layout.label(text="The other one is of another family", icon="INFO")
        else:
            row = self.layout.split(factor=0.3)
            _picture(row, _key(other), 3)
            column = row.column()
            column.label(text=other.name, translate=False)
            column.prop(context.window_manager.populace, "mix", slider=True)


class POPULACE_PT_output(_Section, bpy.types.Panel):
    bl_idname = "POPULACE_PT_output"
    bl_label = "Output"
    bl_options = {"DEFAULT_CLOSED"}  # noqa: RUF012

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        draw_output(self.layout, context)
        self.layout.operator("populace.set_output", icon="CHECKMARK")


class POPULACE_PT_details(_Human, bpy.types.Panel):
    bl_idname = "POPULACE_PT_details"
    bl_parent_id = "POPULACE_PT_human"
    bl_label = "Details"
    bl_options = {"DEFAULT_CLOSED"}  # noqa: RUF012

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        about = active_human(context).populace
        column = self.layout.column(align=True)
        for name, value in (
            ("Seed", about.seed), ("Height", f"{about.height_m:.2f} m"), ("Family", about.family.title()),
            ("Weights", about.weights_sha256[:12] or iface("None")), ("Generator", about.backend_version),
        ):  # fmt: skip
            row = column.split(factor=0.4)
            row.alignment = "RIGHT"
            row.label(text=name)
            row.alignment = "LEFT"
            row.label(text=value, translate=False)


class POPULACE_PT_history(_Panel, bpy.types.Panel):
    """What the active human was, newest first, and whom the user keeps."""

    bl_idname = "POPULACE_PT_history"
    bl_label = "History"
    bl_order = 2

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return active_human(context) is not None or bool(history.favourites())

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        root = active_human(context)
        if root is not None:
            _draw_versions(self.layout, root)
        kept = history.favourites()
        if not kept:
            return
        title = f"{iface('Favourites')} ({len(kept)})"
        if root is None:  # nothing to fold away: whoever selects nobody looks for somebody
            self.layout.label(text=title, icon="FUND", translate=False)
            _draw_favourites(self.layout, kept, can_replace=False)
            return
        header, body = self.layout.panel("POPULACE_favourites", default_closed=True)
        header.label(text=title, translate=False)
        if body is not None:
            _draw_favourites(body, kept, can_replace=True)


# ---------------------------------------------------------------------------------------------------------- the pieces


def _draw_remarks(layout: Any, context: bpy.types.Context, root: bpy.types.Object) -> None:
    """Why editing does not work or may surprise, in a sentence."""
    session = tasks.session()
    if session is None or not session.families:
        layout.label(text="Start the generator to edit", icon="INFO")
        return
    stored = {"family": root.populace.family, "weights_sha256": root.populace.weights_sha256}
    lines = [recipes.remark(stored, _family(root), session.families)]
    if root.library:
        lines.append("Linked from another file: make it local to edit it")
    if editing.trouble is not None:
        lines.append(str(editing.trouble))
    for text in filter(None, lines):
        column = layout.column(align=True)
        column.scale_y = 0.8
        for i, line in enumerate(_wrapped(context, text)):
            column.label(text=line, icon="BLANK1" if i else "ERROR")


def _draw_versions(layout: Any, root: bpy.types.Object) -> None:
    about = root.populace
    grid = _grid(layout)
    for index in reversed(range(len(about.versions))):
        version = about.versions[index]
        cell = grid.column(align=True)
        _picture(cell, version.key, PICTURE)
        is_now = version.recipe == about.recipe
        button = cell.operator("populace.restore_version", text=version.label, depress=is_now, translate=False)
        button.index = index
    _pad(grid, len(about.versions))


def _draw_favourites(layout: Any, kept: list[history.Favourite], can_replace: bool) -> None:
    grid = _grid(layout)
    for one in kept:
        cell = grid.column(align=True)
        _picture(cell, one.key, PICTURE)
        cell.operator("populace.use_favourite", text=one.name, translate=False).favourite = one.id
        row = cell.row(align=True)
        if can_replace:
            button = row.operator("populace.use_favourite", text="", icon="UV_SYNC_SELECT")
            button.favourite, button.replace = one.id, True
        row.operator("populace.remove_favourite", text="", icon="X").favourite = one.id
    _pad(grid, len(kept))


def _grid(layout: Any) -> Any:
    return layout.grid_flow(row_major=True, columns=COLUMNS, even_columns=True, even_rows=True, align=True)


def _pad(grid: Any, count: int) -> None:
    """So that a few pictures are as large as many."""
    for _ in range(-count % COLUMNS):
        grid.column().label(text="")


def _draw_part(layout: Any, context: bpy.types.Context, family: Family, part: str) -> None:
    """Lock, name, garment, colour, and what can be done with it."""
    root = active_human(context)
    group = attributes.sliders(context, family.name)
    known, is_locked, is_worn = editing.attributes(root), part in root.populace.locked_parts, part in _worn(root)
    row = layout.row(align=True)
    lock = row.operator("populace.lock_part", text="", icon="LOCKED" if is_locked else "UNLOCKED", emboss=False)
    lock.part = part
    name = row.split(factor=NAME, align=True)
    name.label(text=part.capitalize())
    value, color = name.row(align=True), f"{part}_color"
    if group is not None and family.attribute(part) is not None:
        value.prop(group, part, text="")
    if group is not None and family.attribute(color) is not None and color in known and is_worn:
        swatch = value.row(align=True)
        swatch.ui_units_x = SWATCH
        swatch.prop(group, color, text="")
    row.operator("populace.reroll", text="", icon="FILE_REFRESH").part = part
    looks = row.row(align=True)
    looks.enabled = is_worn
    button = looks.operator("populace.reroll", text="", icon="TEXTURE")
    button.part, button.kinds = part, "TEX"
    if is_worn and part != family.parts[0] and family.attribute(part) is None:  # elsewhere there is "None" to choose
        row.operator("populace.remove_part", text="", icon="X").part = part


def _draw_swaps(layout: Any, family: Family, root: bpy.types.Object, other: bpy.types.Object) -> None:
    """A button for each part that one of the two wears."""
    column = layout.column(align=True)
    column.label(text=iface("Take from {name}").format(name=other.name), icon="ARROW_LEFTRIGHT", translate=False)
    grid = column.grid_flow(row_major=True, columns=COLUMNS, even_columns=True, align=True)
    for part in _parts(family, _worn(root) | _worn(other)):
        if part in _worn(root) or part in _worn(other):
            grid.operator("populace.swap_part", text=part.capitalize()).part = part


def _parts(family: Family, worn: set[str]) -> list[str]:
    """The body, then what is worn from top to toe as the attributes list it. A part that nothing can be chosen of is
    only there if it is worn."""
    order = [attribute.name for attribute in family.attributes]
    shown = [part for part in family.parts if part in worn or part in order]
    return sorted(shown, key=lambda part: order.index(part) if part in order else -1)


def _part_of(attribute: Attribute, family: Family) -> str | None:
    """The part that a choice or a colour belongs to; the body has sliders of its own."""
    part = attribute.name.removesuffix("_color") if attribute.kind == "color" else attribute.name
    return part if part in family.parts[1:] else None


def _worn(root: bpy.types.Object) -> set[str]:
    """Parts that this person has."""
    return set(_worn_in(root.populace.recipe))


@functools.lru_cache(maxsize=4)  # the active person's and another one's, drawn again and again
def _worn_in(recipe: str) -> frozenset[str]:
    """Read from the stored codes."""
    try:
        names = recipe_latents(json.loads(recipe))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = {}
    return frozenset(name.partition("/")[0] for name in names)


def _family(root: bpy.types.Object) -> Family | None:
    session = tasks.session()
    return session.family(root.populace.family) if session is not None else None


def _key(root: bpy.types.Object) -> str:
    about = root.populace
    return next((version.key for version in reversed(about.versions) if version.recipe == about.recipe), "")


def _picture(layout: Any, key: str, scale: float) -> None:
    icon = thumbnails.icon(key)
    if icon:
        layout.template_icon(icon_value=icon, scale=scale)
        return
    empty = layout.row()
    empty.alignment, empty.scale_y = "CENTER", scale
    empty.label(text="", icon="USER")


_CLASSES = (
    POPULACE_PT_human, POPULACE_PT_attributes, POPULACE_PT_parts, POPULACE_PT_variants, POPULACE_PT_mix,
    POPULACE_PT_output, POPULACE_PT_details, POPULACE_PT_history,
)  # fmt: skip


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
