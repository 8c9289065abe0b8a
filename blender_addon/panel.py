# SPDX-License-Identifier: GPL-3.0-or-later
"""The sidebar tab "Populace". It draws what is known and decides nothing; it never writes, waits or raises."""

from __future__ import annotations

import functools
import logging
import textwrap
from collections.abc import Callable
from typing import Any, Final

import bpy

from . import compat, preferences, tasks
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
    bl_idname = "POPULACE_PT_main"
    bl_label = "Populace"

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        state = tasks.session()
        _draw_status(self.layout, context, state)
        _draw_form(self.layout, context)
        if state is not None and state.jobs:
            _draw_jobs(self.layout, context, state)


class POPULACE_PT_human(_Panel, bpy.types.Panel):
    """The person that the active object belongs to."""

    bl_idname = "POPULACE_PT_human"
    bl_label = "Active Human"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return active_human(context) is not None

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        human = active_human(context)
        if human is None:
            return
        about = human.populace
        column = self.layout.column(align=True)
        for name, value in (
            ("Seed", about.seed), ("Height", f"{about.height_m:.2f} m"), ("Family", about.family.title()),
            ("Weights", about.weights_sha256[:12] or "None"), ("Generator", about.backend_version),
        ):  # fmt: skip
            row = column.split(factor=0.4)
            row.alignment = "RIGHT"
            row.label(text=name)
            row.alignment = "LEFT"
            row.label(text=value)
        if human.type == "ARMATURE":  # hidden in the body at first: most people look better without lines on them
            self.layout.prop(human, "show_in_front", text="Show Bones", icon="BONE_DATA", toggle=True)
        row = self.layout.row(align=True)
        row.operator("populace.use_recipe", icon="LOOP_BACK")
        row.operator("populace.make_again", icon="DUPLICATE")
        row.operator("populace.copy_recipe", text="", icon="COPYDOWN")


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
            _draw_install(row)
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
    can_set_up = hasattr(bpy.types, "POPULACE_OT_setup_backend")
    if can_set_up:
        row.operator("populace.setup_backend", text="Set Up")
    row.operator("populace.choose_python", text="" if can_set_up else "Choose Python...", icon="FILEBROWSER")


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
    left = sum(not job.status.ended for job in state.jobs.values())
    if worker == "starting":
        return _YELLOW, "Loading the model"
    if left:
        return _GREEN, "Making 1 person" if left == 1 else f"Making {left} people"
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
    column = layout.column()
    column.use_property_split = True
    column.use_property_decorate = False
    row = column.row(align=True)
    seed = row.row(align=True)
    seed.active = not form.randomise_seed
    seed.prop(form, "seed")
    row.operator("populace.new_seed", text="", icon="FILE_REFRESH")
    row.prop(form, "randomise_seed", text="", icon="UNLOCKED" if form.randomise_seed else "LOCKED")
    column.prop(form, "count")
    column.prop(form, "truncation_psi", slider=True)
    column.separator()
    column.prop(form, "texture_size")
    column.prop(form, "faces")
    header, body = layout.panel("POPULACE_advanced", default_closed=True)
    header.label(text="Advanced")
    if body is not None:
        body.use_property_split = True
        body.use_property_decorate = False
        body.prop(form, "with_rig")
        body.prop(form, "grid_resolution")
        body.prop(form, "family")
    row = layout.row()
    row.scale_y = 1.6
    text = "Generate" if form.count == 1 else f"Generate {form.count} People"
    row.operator("populace.generate", text=text, icon="COMMUNITY" if form.count > 1 else "USER")


# ------------------------------------------------------------------------------------------------------------- jobs


def _draw_jobs(layout: Any, context: bpy.types.Context, state: Session) -> None:
    jobs = sorted(state.jobs.values(), key=lambda job: job.status.ended)  # a stable sort: open ones first
    box = layout.box()
    row = box.row()
    row.label(text="People", icon="COMMUNITY")
    if any(not job.status.ended for job in jobs):
        row.operator("populace.cancel_all", text="", icon="X", emboss=False)
    row.operator("populace.clear_jobs", text="", icon="TRASH", emboss=False)
    for job in jobs[:MAX_ROWS]:
        _draw_job(box.column(align=True), context, job)
    if len(jobs) > MAX_ROWS:
        box.label(text=f"and {len(jobs) - MAX_ROWS} more")


def _draw_job(layout: Any, context: bpy.types.Context, job: Job) -> None:
    status, name = job.status, f"Seed {job.request.seed}"
    row = layout.row(align=True)
    if not status.ended:
        row.progress(factor=status.fraction, text=_progress_text(job))
        row.operator("populace.cancel_job", text="", icon="X").job_id = job.id
    elif status.state == "failed" and status.error is not None:
        row.label(text=name, icon="ERROR")
        row.operator("populace.copy_error", text="", icon="COPYDOWN", emboss=False).job_id = job.id
        _draw_error(layout, context, status.error)
    elif status.state == "cancelled":
        row.label(text=f"{name}, cancelled", icon="CANCEL")
    elif not job.taken:
        row.label(text=f"{name}, {'waiting' if job.human else 'receiving'}", icon="IMPORT")
    else:
        row.label(text=name, icon="CHECKMARK")
        row.operator("populace.insert_result", text="", icon="IMPORT", emboss=False).job_id = job.id
    if job.note:
        layout.label(text=job.note, icon="INFO")


def _progress_text(job: Job) -> str:
    """Seed, stage, percent and time left, as far as they are known."""
    status = job.status
    if status.state == "queued":
        return f"Seed {job.request.seed}, waiting"
    if status.state == "cancelling":
        return f"Seed {job.request.seed}, cancelling"
    left = _duration(status.eta_s)
    return f"{status.stage.capitalize() or 'Starting'} {status.fraction:.0%}{left and f', {left} left'}"


def _duration(value_s: float | None) -> str:
    if value_s is None:
        return ""
    return f"{max(value_s, 1):.0f} s" if value_s < 90 else f"{value_s / 60:.0f} min"


def register() -> None:
    for cls in (POPULACE_PT_main, POPULACE_PT_human):
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in (POPULACE_PT_human, POPULACE_PT_main):
        bpy.utils.unregister_class(cls)
