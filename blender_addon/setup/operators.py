# SPDX-License-Identifier: GPL-3.0-or-later
"""Setting up the generator: the buttons, and what is known about it for drawing. `installer` does the work."""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import bpy
from bpy.props import BoolProperty, EnumProperty, StringProperty

from .. import chores, preferences, process, tasks
from ..chore import Chore, Phase
from ..messages import BackendError, masked
from ..session import Link
from ..translations import told
from .installer.home import LOG, Home

log = logging.getLogger(__name__)

PLAN_LIFE_S: Final = 60.0
NAME: Final = "Set-up"
PROGRAM: Final = Path(__file__).parent  # this folder, as a program: see __main__
_LOG_TAIL_BYTES: Final = 64 << 10

Result = set[str]


@dataclass
class Known:
    """A snapshot for drawing, so that no panel looks at the disk."""

    wheel: Path | None = None
    version: str = ""  # of the wheel
    installed: dict[str, Any] = field(default_factory=dict)
    previous: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    planned_at: float = 0.0

    @property
    def plan_is_fresh(self) -> bool:
        return bool(self.plan) and time.monotonic() - self.planned_at < PLAN_LIFE_S

    @property
    def can_upgrade(self) -> bool:
        return bool(self.installed and self.version and self.installed.get("version") != self.version)

    @property
    def can_switch(self) -> bool:
        """What the add-on brings is the other environment already: after going back, nothing has to be downloaded."""
        return self.can_upgrade and self.previous.get("version") == self.version

    @property
    def other_is_newer(self) -> bool:
        """Going to the other environment is then not going back."""
        return bool(self.installed and self.previous) and (
            _numbers(self.previous["version"]) > _numbers(self.installed["version"])
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


known = Known()


def refresh() -> None:
    """Look at the disk: what we carry, what is installed. Cheap enough for a click."""
    home = Home(process.setup_folder())
    names = home.pointer()
    known.wheel = next(iter(sorted(PROGRAM.parent.glob("populace-*.whl"))), None)
    known.version = known.wheel.name.split("-")[1] if known.wheel is not None else ""
    known.installed, known.previous = (home.record(names.get(key, "")) for key in ("current", "previous"))
    preferences.refresh()


def interpreter() -> str:
    """Blender's own Python as a program. Raises `BackendError` where it is part of Blender's executable."""
    candidates = [Path(sys.executable or "."), *sorted(Path(sys.prefix, "bin").glob("python3.[0-9]*[0-9]")),
                  Path(sys.prefix, "bin", "python.exe"), Path(sys.prefix, "python.exe")]  # fmt: skip
    blender = Path(bpy.app.binary_path or ".")
    for python in candidates:
        if python.is_file() and not (blender.is_file() and python.samefile(blender)):
            return str(python)
    raise BackendError("no_python", "Blender's own Python was not found.", "Reinstall Blender from blender.org.")


def _start(command: str, *options: str, when_ended: Callable[[Chore], None]) -> None:
    """Raises `BackendError` if the installer cannot be run."""
    argv = [interpreter(), "-I", str(PROGRAM), command, "--folder", str(process.setup_folder()), *options]
    chores.begin(Chore(NAME, argv), when_ended)


def _refusal(*, needs_wheel: bool = False, needs_install: bool = False) -> str:
    """Why a set-up command cannot run now."""
    if chores.is_busy():
        return "Wait until the running set-up or download has finished"
    if needs_wheel and known.wheel is None:
        return "This add-on carries no generator: install the full download"
    if needs_install and not known.installed:
        return "No generator was set up here"
    return ""


def _generator_runs() -> bool:
    state = tasks.session()
    return state is not None and state.link in (Link.STARTING, Link.READY, Link.STOPPING)


def running_version() -> str:
    """Of the generator that is in use, "" without one."""
    state = tasks.session()
    return state.health.version if state is not None and state.link is Link.READY and state.health is not None else ""


class _Setup:
    """What setting up from the network and from a folder have in common."""

    def run(self, *options: str) -> Result:
        assert known.wheel is not None
        try:
            _start("install", "--wheel", str(known.wheel), *options, when_ended=_installed)
        except BackendError as error:
            self.report({"ERROR"}, str(error))  # type: ignore[attr-defined]
            return {"CANCELLED"}
        if not bpy.app.background:
            return {"FINISHED"}
        return self.finish(chores.wait())

    def finish(self, chore: Chore | None) -> Result:
        """Background mode: the outcome as the operator's own."""
        if chore is not None and chore.phase is Phase.DONE:
            return {"FINISHED"}
        self.report({"ERROR"}, str(chore.error) if chore is not None and chore.error else "Cancelled")  # type: ignore[attr-defined]
        return {"CANCELLED"}


class POPULACE_OT_setup_backend(_Setup, bpy.types.Operator):
    """Download and install the generator into a folder of its own; shows sizes and asks before it begins"""

    bl_idname = "populace.setup_backend"
    bl_label = "Set Up Generator"

    build: EnumProperty(
        name="PyTorch",
        items=[("auto", "Automatic", "The build that fits this computer"),
               ("cpu", "Processor Only", "Works everywhere, the smallest download"),
               ("cuda", "NVIDIA GPU", "CUDA 12.8, for cards from 2018 on"),
               ("cuda_older", "Older NVIDIA GPU", "CUDA 12.6, for cards before 2018"),
               ("macos", "macOS", "For Macs with Apple silicon")],
    )  # fmt: skip
    python: StringProperty(name="Python", subtype="FILE_PATH", options={"SKIP_SAVE"},
                           description="The Python to make the environment with. Leave empty to find one")  # fmt: skip
    agree: BoolProperty(name="Agree", options={"SKIP_SAVE", "HIDDEN"},
                        description="For scripts: agree to the download without being asked")  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        why = _refusal(needs_wheel=True)
        if not why and not bpy.app.online_access:
            why = "Online access is off: allow it in Preferences > System, or set up from a folder of wheels"
        if why:
            cls.poll_message_set(why)
        return not why

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        if not known.plan_is_fresh:  # looking takes a moment: it is done elsewhere, and the dialog opens then
            try:
                _start("plan", "--wheel", str(known.wheel), when_ended=_planned)
            except BackendError as error:
                self.report({"ERROR"}, str(error))
                return {"CANCELLED"}
            self._timer = context.window_manager.event_timer_add(chores.INTERVAL_S, window=context.window)
            context.window_manager.modal_handler_add(self)
            return {"RUNNING_MODAL"}
        self.agree = True  # by the dialog's button
        title = "Upgrade Generator" if known.can_upgrade else "Set Up Generator"
        return context.window_manager.invoke_props_dialog(self, width=440, title=title, confirm_text="Install")

    def modal(self, context: bpy.types.Context, event: Any) -> Result:
        """Wait for the plan. A dialog needs an event to open from: from a plain timer it would crash Blender."""
        if event.type != "TIMER" or chores.is_busy():
            return {"PASS_THROUGH"}
        context.window_manager.event_timer_remove(self._timer)
        if not known.plan_is_fresh:
            return {"CANCELLED"}
        bpy.ops.populace.setup_backend("INVOKE_DEFAULT")
        return {"FINISHED"}

    def draw(self, context: bpy.types.Context) -> None:
        from .panel import draw_plan

        draw_plan(self.layout, self, context)

    def execute(self, context: bpy.types.Context) -> Result:
        if not self.agree:
            self.report({"ERROR"}, "Setting up downloads several packages: call it with agree=True to agree")
            return {"CANCELLED"}
        known.plan = {}
        options = ["--build", self.build]
        if self.python:
            options += ["--python", bpy.path.abspath(self.python)]
        for flag, value in zip(("--torch-index", "--package-index"), preferences.indexes(), strict=True):
            options += [flag, value] if value else []
        return self.run(*options)


class POPULACE_OT_setup_backend_offline(_Setup, bpy.types.Operator):
    """Install the generator from a folder of downloaded wheels, without any network"""

    bl_idname = "populace.setup_backend_offline"
    bl_label = "Set Up from Folder"

    directory: StringProperty(name="Folder", subtype="DIR_PATH", options={"SKIP_SAVE"},
                              description="Holds PyTorch and the other packages as wheels")  # fmt: skip
    filter_folder: BoolProperty(default=True, options={"HIDDEN"})
    filter_glob: StringProperty(default="*.whl", options={"HIDDEN"})
    filename: StringProperty(subtype="FILE_NAME", options={"HIDDEN", "SKIP_SAVE"})  # without it only folders are shown
    python: StringProperty(name="Python", subtype="FILE_PATH", options={"SKIP_SAVE"},
                           description="The Python to make the environment with. Leave empty to find one")  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if why := _refusal(needs_wheel=True):
            cls.poll_message_set(why)
        return not why

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    def execute(self, context: bpy.types.Context) -> Result:
        folder = Path(bpy.path.abspath(self.directory)) if self.directory else Path()
        if not self.directory or next(folder.glob("*.whl"), None) is None:
            wheel = known.wheel.name if known.wheel is not None else ""
            self.report({"ERROR"}, "There are no wheels in this folder. Fill it on a computer with internet access: "
                        f"pip download --only-binary :all: -d FOLDER {wheel}")  # fmt: skip
            return {"CANCELLED"}
        return self.run("--wheels", str(folder), *(("--python", bpy.path.abspath(self.python)) if self.python else ()))


class POPULACE_OT_roll_back_backend(_Setup, bpy.types.Operator):
    """Use the other generator that is installed, the one from before the last change, without a download"""

    bl_idname = "populace.roll_back_backend"
    bl_label = "Roll Back"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        why = _refusal(needs_install=True) or ("" if known.previous else "There is no earlier version to go back to")
        if why:
            cls.poll_message_set(why)
        return not why

    def execute(self, context: bpy.types.Context) -> Result:
        try:
            _start("roll_back", when_ended=_installed)
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return self.finish(chores.wait()) if bpy.app.background else {"FINISHED"}


class POPULACE_OT_uninstall_backend(_Setup, bpy.types.Operator):
    """Remove the generator that was set up here. People in scenes, results and downloaded weights stay"""

    bl_idname = "populace.uninstall_backend"
    bl_label = "Uninstall Generator"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        why = _refusal(needs_install=True) or ("Stop the generator first" if _generator_runs() else "")
        if why:
            cls.poll_message_set(why)
        return not why

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        size = sum(int(row.get("bytes", 0)) for row in (known.installed, known.previous))
        return context.window_manager.invoke_confirm(
            self, event, title="Uninstall Generator", confirm_text="Uninstall", icon="WARNING",
            message=told("Frees about {size}. People in scenes, results and downloaded weights stay",
                size=gigabytes(size)),
        )  # fmt: skip

    def execute(self, context: bpy.types.Context) -> Result:
        try:
            _start("uninstall", when_ended=_uninstalled)
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return self.finish(chores.wait()) if bpy.app.background else {"FINISHED"}


class POPULACE_OT_restart_backend(bpy.types.Operator):
    """Stop the generator that runs and start the one that is set up. Unfinished jobs are cancelled"""

    bl_idname = "populace.restart_backend"
    bl_label = "Restart Generator"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not (runs := bool(running_version())):
            cls.poll_message_set("The generator is not running")
        return runs

    def execute(self, context: bpy.types.Context) -> Result:
        tasks.working_session().shutdown(start_again=True)
        return {"FINISHED"}


class POPULACE_OT_copy_setup_log(bpy.types.Operator):
    """Copy the end of the set-up's log to the clipboard, without your home folder's name"""

    bl_idname = "populace.copy_setup_log"
    bl_label = "Copy Log"
    bl_options = {"INTERNAL"}  # noqa: RUF012

    def execute(self, context: bpy.types.Context) -> Result:
        try:
            text = (process.setup_folder() / LOG).read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
        except OSError:
            self.report({"WARNING"}, "There is no log yet")
            return {"CANCELLED"}
        chore = chores.current()
        error = str(chore.error) if chore is not None and chore.error is not None else ""
        context.window_manager.clipboard = masked(f"Blender {bpy.app.version_string}\n{error}\n{text}")
        self.report({"INFO"}, "Log copied")
        return {"FINISHED"}


# --------------------------------------------------------------------------------------------------- when a chore ended


def _planned(chore: Chore) -> None:
    if chore.phase is not Phase.DONE:
        return
    known.plan, known.planned_at = chore.result, time.monotonic()
    chores.dismiss()


def _installed(chore: Chore) -> None:
    refresh()
    if chore.phase is not Phase.DONE:
        return
    if process.installed_python() is None:  # it said that it had
        chore.phase = Phase.FAILED
        chore.error = BackendError("not_installed", "The set-up ended without a generator.", "Copy the log, try again.")
    elif not bpy.app.background and not _generator_runs():
        tasks.working_session().restart()


def _uninstalled(chore: Chore) -> None:
    refresh()


@functools.cache
def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0):.0f} MB"


_CLASSES = (
    POPULACE_OT_setup_backend, POPULACE_OT_setup_backend_offline, POPULACE_OT_roll_back_backend,
    POPULACE_OT_uninstall_backend, POPULACE_OT_restart_backend,
    POPULACE_OT_copy_setup_log,
)  # fmt: skip


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)
    refresh()


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
