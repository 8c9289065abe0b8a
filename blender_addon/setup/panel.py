# SPDX-License-Identifier: GPL-3.0-or-later
"""What the set-up shows: a panel above all others while there is something to say, and the consent dialog."""

from __future__ import annotations

import sys
import textwrap
from typing import Any
from urllib.parse import urlsplit

import bpy

from .. import chores, preferences, process, tasks
from ..chore import Chore, Phase
from ..messages import masked
from ..panel import _Panel, _safe, _wrapped
from ..session import Link
from ..translations import told
from .installer.computer import BUILDS, PIP_DEFAULT
from .operators import NAME, gigabytes, known, running_version


class POPULACE_PT_setup(_Panel, bpy.types.Panel):
    """Progress, outcome, or why nothing can be set up. Gone when there is nothing to say."""

    bl_idname = "POPULACE_PT_setup"
    bl_label = "Set-up"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _chore() is not None or _offline() or known.can_upgrade

    @_safe
    def draw(self, context: bpy.types.Context) -> None:
        chore = _chore()
        if chore is not None:
            draw_chore(self.layout, context, chore)
        elif _offline():
            draw_offline(self.layout, context)
        elif known.can_upgrade:
            _lines(self.layout, context, told("Generator {old} is installed, this add-on brings {new}.",
                                              old=known.installed["version"], new=known.version))  # fmt: skip
            _draw_upgrade(self.layout, "FILE_REFRESH")


def _chore() -> Chore | None:
    chore = chores.current()
    return chore if chore is not None and chore.name == NAME else None


def _offline() -> bool:
    """Nothing is installed, Blender may not download it, and no generator of another Blender is in use."""
    state = tasks.session()
    has_one = preferences.found() or (state is not None and state.link is Link.READY)
    return known.wheel is not None and not has_one and not bpy.app.online_access


def draw_chore(layout: Any, context: bpy.types.Context, chore: Chore) -> None:
    if not chore.ended:
        left = chore.eta_s
        row = layout.row(align=True)
        percent = f" {chore.fraction:.0%}" if chore.fraction else ""
        stage = told(chore.stage or "Looking at this computer") + percent
        row.progress(factor=chore.fraction, text=told("Cancelling") if chore.phase is Phase.CANCELLING else stage)
        row.operator("populace.cancel_chore", text="", icon="X")
        time_left = told("{time} left", time=_duration(left)) if left is not None else ""
        text = ", ".join(filter(None, (chore.text, time_left)))
        layout.label(text=text or told("Blender can be used meanwhile"), translate=False)
        return
    if chore.phase is Phase.FAILED and chore.error is not None:
        _lines(layout, context, chore.error.message, "ERROR")
        _lines(layout, context, chore.error.hint)
        row = layout.row(align=True)
        row.operator("populace.setup_backend", text="Try Again", icon="FILE_REFRESH")
        row.operator("populace.copy_setup_log", text="", icon="COPYDOWN")
        row.operator("populace.dismiss_chore", text="", icon="X")
        return
    _lines(layout, context, _outcome(chore), "CHECKMARK" if chore.phase is Phase.DONE else "CANCEL")
    running, version = running_version(), chore.result.get("version", "")
    if chore.phase is Phase.DONE and running and version and running != version:
        _lines(layout, context, told("Generator {version} is still running.", version=running), "INFO")
        row = layout.row(align=True)
        row.operator("populace.restart_backend", icon="FILE_REFRESH")
        row.operator("populace.dismiss_chore", text="", icon="X")
        return
    layout.operator("populace.dismiss_chore", text="Dismiss")


def _outcome(chore: Chore) -> str:
    result = chore.result
    if chore.phase is Phase.CANCELLED:
        return told("Cancelled. What was downloaded is kept for the next attempt")
    if "version" not in result:
        return told("Uninstalled, {size} freed", size=gigabytes(int(result.get("freed_bytes", 0))))
    size = gigabytes(int(result.get("bytes", 0)))
    return told("Generator {version} is set up, {size}", version=result["version"], size=size)


def draw_offline(layout: Any, context: bpy.types.Context) -> None:
    _lines(layout, context, told("Online access is off: the generator cannot be downloaded."), "INTERNET_OFFLINE")
    layout.prop(context.preferences.system, "use_online_access", text="Allow Online Access")
    layout.operator("populace.setup_backend_offline", text="Set Up from Folder...", icon="FILE_FOLDER")


def draw_preferences(layout: Any, context: bpy.types.Context) -> None:
    """In the add-on's preferences: what is installed, and everything that can be done about it."""
    box = layout.box()
    chore, installed = _chore(), known.installed
    if chore is not None:
        draw_chore(box, context, chore)
    if installed:
        build = BUILDS.get(str(installed.get("build")))
        size = gigabytes(int(installed.get("bytes", 0)))
        text = told(
            "Generator {version}, {build}, {size}, in {folder}",
            version=installed["version"],
            size=size,
            build=told(build.title if build else "unknown build"),
            folder=masked(str(process.setup_folder())),
        )
        box.label(text=text, icon="CHECKMARK", translate=False)
    elif known.wheel is not None:
        box.label(
            text=told("This add-on can set up generator {version}", version=known.version), icon="INFO", translate=False
        )
    else:
        box.label(text="This add-on carries no generator", icon="INFO")
    row = box.row(align=True)
    if known.can_upgrade and not known.can_switch:
        _draw_upgrade(row, "IMPORT")
    else:
        row.operator("populace.setup_backend", text="Set Up Again" if installed else "Set Up", icon="IMPORT")
    row.operator("populace.setup_backend_offline", text="From Folder...", icon="FILE_FOLDER")
    _draw_other(row)
    row.operator("populace.uninstall_backend", text="Uninstall", icon="TRASH")
    row.operator("populace.copy_setup_log", text="", icon="COPYDOWN")


def _draw_upgrade(layout: Any, icon: str) -> None:
    if known.can_switch:
        _draw_other(layout)
        return
    label = told("Upgrade to {version}", version=known.version)
    layout.operator("populace.setup_backend", text=label, icon=icon, translate=False)


def _draw_other(layout: Any) -> None:
    """The environment from before: an older one to go back to, or a newer one that was left."""
    label, icon = told("Roll Back"), "LOOP_BACK"
    if known.other_is_newer:
        label, icon = told("Use {version} Again", version=known.previous["version"]), "LOOP_FORWARDS"
    elif known.previous:
        label = told("Roll Back to {version}", version=known.previous["version"])
    layout.operator("populace.roll_back_backend", text=label, icon=icon, translate=False)


def draw_plan(layout: Any, operator: Any, context: bpy.types.Context) -> None:
    """The consent dialog: what, how much, from where, to where."""
    plan = known.plan
    layout.use_property_split = True
    layout.use_property_decorate = False
    name = plan["build"] if operator.build == "auto" else operator.build
    build = BUILDS[name]
    torch_index, package_index = preferences.indexes()
    hosts = dict.fromkeys(_host(address) for address in (torch_index or build.index, package_index))
    sources = f" {told('and')} ".join(hosts)
    python = told("Blender's own") if plan["python"] == sys.executable else masked(plan["python"])
    needs = build.download_bytes + build.installed_bytes + plan["spare_bytes"]
    rows = [
        (
            "Installs",
            told("Populace {version} with PyTorch, {build}", version=plan["version"], build=told(build.title)),
        ),
        ("Download", told("About {size} from {hosts}", size=gigabytes(build.download_bytes), hosts=sources)),
        (
            "Disk",
            told(
                "About {size} of {free} free", size=gigabytes(build.installed_bytes), free=gigabytes(plan["free_bytes"])
            ),
        ),
        ("Folder", masked(plan["folder"])),
        ("Python", f"{plan['python_version']}, {python}" if plan["python"] else told("None found")),
        ("GPU", plan["gpu"] or told("None that can be used")),
    ]
    column = layout.column(align=True)
    for title, text in rows:
        row = column.split(factor=0.2)
        row.label(text=told(title), translate=False)
        row.label(text=text, translate=False)
    alerts = [plan["remark"], plan["problem"], plan["hint"]]
    if plan["free_bytes"] < needs:
        alerts.append(told("Not enough space: {size} are needed while installing", size=gigabytes(needs)))
    if any(alerts):
        box = layout.box().column(align=True)
        box.alert = True
        for text in filter(None, alerts):
            for line in _split(text):
                box.label(text=line)
    options = "POPULACE_setup_problem" if plan["problem"] else "POPULACE_setup_options"  # each is kept as first shown
    header, body = layout.panel(options, default_closed=not plan["problem"])
    header.label(text="Options")
    if body is not None:
        body.prop(operator, "build")
        body.prop(operator, "python", placeholder="Found automatically")
    column = layout.column(align=True)
    column.scale_y = 0.8
    column.label(text="Nothing else on this computer is changed. You can cancel, and uninstall it again.")
    if name.startswith("cuda"):
        column.label(text="PyTorch is free software; NVIDIA's CUDA libraries come under NVIDIA's own licence.")
    if plan["installed"]:
        column.label(text="The installed generator stays in use until the new one has proved to work.")


def _host(address: str) -> str:
    if not address or address == PIP_DEFAULT:
        return "PyPI"
    return urlsplit(address).hostname or masked(address)


def _lines(layout: Any, context: bpy.types.Context, text: str, icon: str = "NONE") -> None:
    column = layout.column(align=True)
    column.scale_y = 0.8
    for index, line in enumerate(_wrapped(context, text)):
        column.label(text=line, icon=icon if index == 0 else "BLANK1" if icon != "NONE" else "NONE")


def _split(text: str) -> list[str]:
    return textwrap.wrap(text, 76)


def _duration(value_s: float) -> str:
    return f"{max(value_s, 1):.0f} s" if value_s < 90 else f"{value_s / 60:.0f} min"


def register() -> None:
    bpy.utils.register_class(POPULACE_PT_setup)
    preferences.add_section(draw_preferences)


def unregister() -> None:
    preferences.remove_section(draw_preferences)
    bpy.utils.unregister_class(POPULACE_PT_setup)
