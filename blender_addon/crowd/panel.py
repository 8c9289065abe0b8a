# SPDX-License-Identifier: GPL-3.0-or-later
"""The sidebar panels for layout artists: crowds and assets. They draw what is known and decide nothing."""

from __future__ import annotations

from typing import Any

import bpy

from .. import assets
from ..panel import _Panel, _safe
from ..translations import told
from . import cast
from .arrivals import on_the_way
from .form import family_of


class POPULACE_PT_crowd(_Panel, bpy.types.Panel):
    bl_idname = "POPULACE_PT_crowd"
    bl_label = "Crowd"
    bl_order = 3
    bl_options = {"DEFAULT_CLOSED"}  # noqa: RUF012

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        layout, form = self.layout, context.scene.populace_crowd
        made = cast.active(context)
        if made is not None:
            _draw_crowd(layout, context, made)
        column = _column(layout)
        column.prop(form, "people")
        column.prop(form, "placements")
        column.prop(form, "seed")
        _draw_where(layout, form)
        _draw_facing(layout, form)
        _draw_mix(layout, form)
        _draw_detail(layout, form)
        row = layout.row()
        row.scale_y = 1.6
        row.operator(
            "populace.make_crowd",
            text=told("Make Crowd of {n}", n=form.people),
            icon="COMMUNITY",
            translate=False,
        )
        if made is not None:
            layout.operator("populace.update_crowd", icon="FILE_REFRESH")


def _column(layout: Any) -> Any:
    column = layout.column()
    column.use_property_split = True
    column.use_property_decorate = False
    return column


def _draw_crowd(layout: Any, context: bpy.types.Context, made: bpy.types.Collection) -> None:
    """The crowd that is there: who has arrived, how it is shown, what can be done with the selected placements."""
    box = layout.box()
    row = box.row()
    row.label(text=made.name, icon="OUTLINER_COLLECTION")
    row.operator("populace.crowd_form", text="", icon="LOOP_BACK", emboss=False)
    row.operator("populace.remove_crowd", text="", icon="TRASH", emboss=False)
    coming, persons = on_the_way(made), cast.people(made)
    absent = len(cast.missing(made))
    here = len(persons) - absent
    if coming:
        running = sum(job.status.fraction for job in coming if not job.status.ended)
        row = box.row(align=True)
        row.progress(
            factor=min((here + running) / max(len(persons), 1), 1.0),
            text=told("{n} of {total} people", n=here, total=len(persons)),
        )
        row.operator("populace.cancel_crowd", text="", icon="X")
    else:
        places, own = sum(cast.PLACEMENT in o for o in made.objects), sum(cast.OWN in person for person in persons)
        said = told("{n} people in {places} places", n=here, places=places)
        said += f", {told('{n} chosen by hand', n=own)}" if own else ""
        box.label(text=said, translate=False)
        if absent:
            box.operator("populace.make_missing", text=told("Make {n} Missing", n=absent), translate=False, icon="PLAY")
    row = box.row(align=True)
    now = cast.display(made)
    for display, text in (("FULL", "Full"), ("LIGHT", "Light"), ("BOX", "Manikins")):
        row.operator("populace.crowd_display", text=text, depress=now == display).display = display
    row = box.row(align=True)
    row.operator("populace.update_lods", icon="CAMERA_DATA")
    row.prop(context.scene.populace_crowd, "live", text="", icon="PLAY", toggle=True)
    row = box.row(align=True)
    row.operator("populace.reseed_placement", icon="FILE_REFRESH")
    row.operator("populace.swap_placement", icon="ARROW_LEFTRIGHT")


def _draw_where(layout: Any, form: Any) -> None:
    layout.row(align=True).prop(form, "where", expand=True)
    column = _column(layout)
    if form.where == "SURFACE":
        column.prop(form, "surface")
        column.prop(form, "max_slope")
    elif form.where == "CURVE":
        column.prop(form, "curve")
        column.prop(form, "width")
    elif form.where == "GRID":
        column.prop(form, "columns")
        column.prop(form, "gap")
    if form.where == "MARKERS":
        column.label(text="One at each selected object", icon="INFO")
    else:
        column.prop(form, "distance")
    if form.where == "GRID" or (form.where == "CURVE" and form.width == 0):
        column.prop(form, "jitter")


def _draw_facing(layout: Any, form: Any) -> None:
    column = _column(layout)
    column.prop(form, "facing")
    if form.facing == "TOWARDS":
        column.prop(form, "target")
    else:
        column.prop(form, "angle")
    column.prop(form, "spread")
    column.prop(form, "poses")


def _draw_mix(layout: Any, form: Any) -> None:
    header, body = layout.panel("POPULACE_crowd_mix", default_closed=True)
    header.label(text=told("Mix ({n})", n=len(form.mix)) if len(form.mix) else told("Mix"), translate=False)
    if body is None:
        return
    before = ""
    for index, row in enumerate(form.mix):
        if row.attribute != before:
            total = sum(other.percent for other in form.mix if other.attribute == row.attribute)
            title, is_all = told(row.title), 99.5 <= total <= 100.5
            body.label(text=told("{title}, all", title=title) if is_all else title, translate=False)
            before = row.attribute
        line = body.row(align=True)
        line.prop(row, "percent", text="", slider=True)
        if row.kind == "number":
            line.prop(row, "low", text="")
            line.prop(row, "high", text="")
        else:
            line.prop(row, "color" if row.kind == "color" else "choice", text="")
        line.operator("populace.remove_share", text="", icon="X").index = index
    body.operator_menu_enum("populace.add_share", "attribute", text="Add Shares", icon="ADD")
    if family_of(form) is None:
        body.label(text="Start the generator to see all attributes", icon="INFO")


def _draw_detail(layout: Any, form: Any) -> None:
    header, body = layout.panel("POPULACE_crowd_detail", default_closed=True)
    header.label(text="Detail")
    if body is None:
        return
    column = _column(body)
    for name in ("display", "lods", "lod_distance", "faces", "texture_size", "maps", "truncation_psi",
                 "grid_resolution", "family"):  # fmt: skip
        column.prop(form, name)


class POPULACE_PT_assets(_Panel, bpy.types.Panel):
    bl_idname = "POPULACE_PT_assets"
    bl_label = "Assets"
    bl_order = 4
    bl_options = {"DEFAULT_CLOSED"}  # noqa: RUF012

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        form = context.scene.populace_assets
        column = _column(self.layout)
        for name in ("catalog", "author", "licence", "tags"):
            column.prop(form, name)
        count = len(assets.chosen_humans(context))
        text = told("Mark {n} People as Assets", n=count) if count > 1 else told("Mark as Asset")
        self.layout.operator("populace.mark_asset", text=text, icon="ASSET_MANAGER", translate=False)
        column = _column(self.layout)
        column.prop(form, "folder")
        self.layout.operator("populace.save_assets", icon="EXPORT")


_CLASSES = (POPULACE_PT_crowd, POPULACE_PT_assets)


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
