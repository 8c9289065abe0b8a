# SPDX-License-Identifier: GPL-3.0-or-later
"""The sidebar tab "Populace". It draws what is known and decides nothing; it never writes, waits or raises."""

from __future__ import annotations

import functools
import logging
import textwrap
from collections.abc import Callable
from typing import Any, Final

import bpy
from bpy.app.translations import pgettext_iface as iface

from . import attributes, compat, preferences, tasks
from .messages import BackendError
from .properties import active_human
from .session import Job, Link, Session

log = logging.getLogger(__name__)

MAX_ROWS: Final = 8
_GREEN, _YELLOW, _RED, _GREY = "04", "03", "01", "09"


def _safe(draw: Callable[..., None]) -> Callable[..., None]:
    """A panel that raises is drawn empty and fills the console at every redraw."""

    @functools.wraps(draw)
    def wrapper(self: Any, context: bpy.types.Context) -> None:
        try:
            draw(self, context)
        except Exception:
            log.exception("draw")
            self.layout.label(text="This panel could not be drawn", icon="ERROR")

    return wrapper


class _Panel:
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"
    bl_category = "Populace"


class POPULACE_PT_main(_Panel, bpy.types.Panel):
    """Status, and the create form; folded up while a person is active."""

    bl_idname = "POPULACE_PT_main"
    bl_label = "Populace"
    bl_order = 0

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        _draw_status(self.layout, context, tasks.session())
        if active_human(context) is None:
            _draw_form(self.layout, context)
            return
        header, body = self.layout.panel("POPULACE_create", default_closed=True)
        header.label(text="New Human", icon="ADD")
        if body is not None:
            _draw_form(body, context)


class POPULACE_PT_jobs(_Panel, bpy.types.Panel):
    """What is being made, and what became of it."""

    bl_idname = "POPULACE_PT_jobs"
    bl_label = "Jobs"
    bl_order = 9

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return bool(tasks.listed_jobs())

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        _draw_jobs(self.layout, context, tasks.listed_jobs())


def split(layout: Any) -> Any:
    """A column with names on the left and values on the right."""
    column = layout.column()
    column.use_property_split = True
    column.use_property_decorate = False
    return column


# ------------------------------------------------------------------------------------------------------- status row


def _draw_status(layout: Any, context: bpy.types.Context, state: Session | None) -> None:
    box = layout.box()
    color, sentence = _status(state)
    link = state.link if state is not None else Link.OFF
    row = box.split(factor=0.7) if link is Link.OFF else box.row()
    row.label(text=sentence, icon=compat.DOT_PREFIX + color)
    if link is Link.READY or link is Link.STARTING:
        row.operator("populace.stop_backend", text="", icon="QUIT" if link is Link.READY else "X", emboss=False)
    elif link is Link.OFF:
        if preferences.found():
            row.operator("populace.start_backend", text="Start")
        else:
            _draw_install(row if _can_set_up() else box)  # the slim add-on's button is too long to stand beside
    if state is not None and state.trouble is not None:
        _draw_error(box, context, state.trouble)
        row = box.row(align=True)
        if state.trouble.code == "not_installed":
            _draw_install(row)
        else:
            row.operator("populace.start_backend", text="Restart Generator", icon="FILE_REFRESH")
        row.operator("populace.copy_error", text="", icon="COPYDOWN").job_id = ""


def _draw_install(layout: Any) -> None:
    """The slim add-on cannot set up a generator: there the user shows where it is."""
    row = layout.row(align=True)
    if _can_set_up():
        row.operator("populace.setup_backend", text="Set Up")
    row.operator("populace.choose_python", text="" if _can_set_up() else "Choose Python...", icon="FILEBROWSER")


def _can_set_up() -> bool:
    return hasattr(bpy.types, "POPULACE_OT_setup_backend")


def _status(state: Session | None) -> tuple[str, str]:
    """Colour of the dot and one sentence."""
    if (state is None or state.link is Link.OFF) and not preferences.found():
        return _RED, "Generator not installed"
    if state is None or state.link is Link.OFF:
        return _GREY, "Generator is off"
    if state.link is Link.STARTING:
        return _YELLOW, state.stage or "Starting"
    if state.link is Link.STOPPING:
        return _YELLOW, "Stopping"
    if state.link is Link.LOST:
        return _RED, "Generator stopped"
    if state.link is Link.FAILED:
        return _RED, "Generator not available"
    if tasks.hold():
        return _YELLOW, tasks.hold()
    if state.trouble is not None:
        return _RED, "Generator keeps failing"
    worker = state.health.worker if state.health is not None else ""
    left = sum(not job.status.ended for job in tasks.listed_jobs())
    if worker == "starting":
        return _YELLOW, "Loading the model"
    if left:
        return _GREEN, iface("Making 1 person") if left == 1 else iface("Making {n} people").format(n=left)
    device = state.health.device if state.health is not None else ""
    return _GREEN, f"Ready on {device.upper() if len(device) < 5 else device}" if device else "Ready"


def _draw_error(layout: Any, context: bpy.types.Context, error: BackendError) -> None:
    column = layout.column(align=True)
    column.scale_y = 0.8
    for line in [*_wrapped(context, error.message), *_wrapped(context, error.hint)]:
        column.label(text=line)


def _wrapped(context: bpy.types.Context, text: str) -> list[str]:
    """Lines that fit the sidebar; Blender's labels do not wrap."""
    region, scale = context.region, context.preferences.system.ui_scale
    width = region.width / scale if region is not None else 260
    return textwrap.wrap(text, max(20, int((width - 50) / 6.2)), max_lines=6)


# ------------------------------------------------------------------------------------------------------------- form


def _draw_form(layout: Any, context: bpy.types.Context) -> None:
    form = context.scene.populace
    column = split(layout)
    row = column.row(align=True)
    seed = row.row(align=True)
    seed.active = not form.randomise_seed
    seed.prop(form, "seed")
    row.operator("populace.new_seed", text="", icon="FILE_REFRESH")
    row.prop(form, "randomise_seed", text="", icon="UNLOCKED" if form.randomise_seed else "LOCKED")
    column.prop(form, "prompt", placeholder="old woman, red shirt")
    column.prop(form, "truncation_psi", slider=True)
    column.prop(form, "count")
    _draw_wishes(layout, context, form.family)
    header, body = layout.panel("POPULACE_output", default_closed=True)
    header.label(text="Output")
    if body is not None:
        draw_output(body, context)
        column = split(body)
        column.prop(form, "family")
        column.prop(form, "mark_asset")
    row = layout.row()
    row.scale_y = 1.6
    text = iface("Generate") if form.count == 1 else iface("Generate {n} People").format(n=form.count)
    row.operator("populace.generate", text=text, icon="COMMUNITY" if form.count > 1 else "USER", translate=False)
    layout.operator("populace.from_photo", text="From Photo...", icon="IMAGE_DATA")


def _draw_wishes(layout: Any, context: bpy.types.Context, family: str) -> None:
    """Attributes to ask for: what is ticked counts, the seed decides the rest."""
    header, body = layout.panel("POPULACE_wishes", default_closed=True)
    wishes = attributes.wishes(context, family)
    asked = len(attributes.wished(context, family))
    header.label(text=f"{iface('Attributes')} ({asked})" if asked else iface("Attributes"), translate=False)
    if body is None:
        return
    if wishes is None:
        body.label(text="Start the generator to see them", icon="INFO")
        return
    column = body.column(align=True)
    for attribute in attributes.attributes_of(family):
        use = attributes.USE + attribute.name
        row = column.split(factor=0.45)
        row.prop(wishes, use, text=attribute.title)
        value = row.row()
        value.enabled = getattr(wishes, use)
        value.prop(wishes, attribute.name, text=attribute.unit, slider=attribute.kind == "number")


def draw_output(layout: Any, context: bpy.types.Context) -> None:
    """How people are delivered; also for the active human."""
    form = context.scene.populace
    column = split(layout)
    column.prop(form, "pose")
    column.prop(form, "with_rig")
    column.separator()
    column.prop(form, "faces")
    column.prop(form, "lods")
    column.prop(form, "grid_resolution")
    column.separator()
    column.prop(form, "texture_size")
    column.prop(form, "maps")
    column.prop(form, "separate")
    column.prop(form, "shape_keys", placeholder="weight, muscle")


# ------------------------------------------------------------------------------------------------------------- jobs


def _draw_jobs(layout: Any, context: bpy.types.Context, jobs: list[Job]) -> None:
    jobs = sorted(jobs, key=lambda job: job.status.ended)  # a stable sort: open ones first
    for job in jobs[:MAX_ROWS]:
        _draw_job(layout.column(align=True), context, job)
    if len(jobs) > MAX_ROWS:
        layout.label(text=iface("and {n} more").format(n=len(jobs) - MAX_ROWS), translate=False)
    row = layout.row(align=True)
    if any(not job.status.ended for job in jobs):
        row.operator("populace.cancel_all", icon="X")
    row.operator("populace.clear_jobs", icon="TRASH")


def _draw_job(layout: Any, context: bpy.types.Context, job: Job) -> None:
    status, name = job.status, _name(job)
    row = layout.row(align=True)
    if not status.ended:
        row.progress(factor=status.fraction, text=_progress_text(job))
        row.operator("populace.cancel_job", text="", icon="X").job_id = job.id
    elif status.state == "failed" and status.error is not None:
        row.label(text=name, icon="ERROR")
        row.operator("populace.copy_error", text="", icon="COPYDOWN", emboss=False).job_id = job.id
        _draw_error(layout, context, status.error)
    elif status.state == "cancelled":
        row.label(text=f"{name}, {iface('cancelled')}", icon="CANCEL")
    elif not job.taken:
        row.label(text=f"{name}, {iface('waiting') if job.human else iface('receiving')}", icon="IMPORT")
    else:
        row.label(text=name, icon="CHECKMARK")
        if tasks.step_of(job) == "insert_result":
            row.operator("populace.insert_result", text="", icon="IMPORT", emboss=False).job_id = job.id
    if job.note:
        layout.label(text=job.note, icon="INFO")


def _name(job: Job) -> str:
    return getattr(job.tag, "label", "") or f"Seed {job.request.seed}"


def _progress_text(job: Job) -> str:
    """Name, stage, percent and time left, as far as they are known."""
    status = job.status
    if status.state == "queued":
        return f"{_name(job)}, {iface('waiting')}"
    if status.state == "cancelling":
        return f"{_name(job)}, {iface('cancelling')}"
    left = _duration(status.eta_s)
    done = f"{iface(status.stage.capitalize() or 'Starting')} {status.fraction:.0%}"
    return f"{done}, {iface('{time} left').format(time=left)}" if left else done


def _duration(value_s: float | None) -> str:
    if value_s is None:
        return ""
    return f"{max(value_s, 1):.0f} s" if value_s < 90 else f"{value_s / 60:.0f} min"


def register() -> None:
    for cls in (POPULACE_PT_main, POPULACE_PT_jobs):
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in (POPULACE_PT_jobs, POPULACE_PT_main):
        bpy.utils.unregister_class(cls)
