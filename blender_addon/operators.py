# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything the add-on can do, as operators: the panel's buttons, and the same for scripts."""

from __future__ import annotations

import json
import logging
import secrets
from contextlib import closing
from dataclasses import fields
from typing import Any

import bpy
from bpy.props import BoolProperty, StringProperty

from . import preferences, scene, tasks
from .client import Client
from .messages import BackendError, Request
from .packet import recipe_latents
from .properties import MAX_SEED, RANDOM_SEEDS, active_human, request_properties
from .session import Job, Link

log = logging.getLogger(__name__)

Result = set[str]


class POPULACE_OT_generate(bpy.types.Operator):
    """Make people and put them at the 3D cursor, feet on its height"""

    bl_idname = "populace.generate"
    bl_label = "Generate"
    bl_options = {"REGISTER"}  # noqa: RUF012

    __annotations__ = {
        **request_properties(),
        "latents": StringProperty(name="Latents", description="JSON of codes that replace those of the seed",
                                  options={"SKIP_SAVE", "HIDDEN"}),
        "wait": BoolProperty(name="Wait", description="Return when the people stand in the scene. Always so in "
                             "background mode", options={"SKIP_SAVE"}),
    }  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Switch to Object Mode first")
            return False
        return True

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        """The button: take the form's values."""
        form = context.scene.populace
        if form.randomise_seed:
            form.seed = secrets.randbelow(RANDOM_SEEDS)
        for name in request_properties():
            setattr(self, name, getattr(form, name))
        return self.execute(context)

    def execute(self, context: bpy.types.Context) -> Result:
        try:
            requests = self._requests()
        except (ValueError, TypeError):
            self.report({"ERROR"}, "The latents are not JSON of names and rows of numbers")
            return {"CANCELLED"}
        name = f"Humans {self.seed}" if self.count == 1 else f"Humans {self.seed}-{self.seed + self.count - 1}"
        batch = scene.Batch(name, self.count, tuple(context.scene.cursor.location), self.with_rig)
        if self.wait or bpy.app.background:
            return self._generate_now(context, requests, batch)
        tasks.submit(requests, batch)
        return {"FINISHED"}

    def _requests(self) -> list[Request]:
        settings = {f.name: getattr(self, f.name) for f in fields(Request) if f.name in request_properties()}
        settings["texture_size"] = int(self.texture_size)
        settings["latents"] = json.loads(self.latents) if self.latents else None
        return [Request(**settings | {"seed": self.seed + i}) for i in range(self.count)]

    def _generate_now(self, context: bpy.types.Context, requests: list[Request], batch: scene.Batch) -> Result:
        client, done = Client(preferences.python()), 0
        try:
            with closing(client.generate_all(requests)) as humans:
                for index, human in enumerate(humans):
                    scene.insert(context, human, batch, index)
                    done += 1
        except BackendError as error:
            log.warning("generate: %s", error)
            self.report({"ERROR"}, f"{error} {done} of {len(requests)} people were made.")
            return {"CANCELLED"}
        finally:
            if done and not bpy.app.background:
                bpy.ops.ed.undo_push(message="Generate Humans")
        self.report({"INFO"}, f"{done} people made" if done > 1 else "1 person made")
        return {"FINISHED"}


class POPULACE_OT_insert_result(bpy.types.Operator):
    """Put this person into the scene"""

    bl_idname = "populace.insert_result"
    bl_label = "Insert Human"
    bl_options = {"UNDO", "INTERNAL"}  # noqa: RUF012

    job_id: StringProperty(options={"SKIP_SAVE"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Switch to Object Mode first")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        job = _job(self.job_id)
        if job is None:
            self.report({"WARNING"}, "This job is no longer in the list")
            return {"CANCELLED"}
        if job.human is None:
            tasks.working_session().fetch(job)
            self.report({"INFO"}, "Fetching the person once more")
            return {"CANCELLED"}
        batch, index = job.tag
        _, remark = scene.insert(context, job.human, batch, index)
        job.taken, job.human = True, None
        job.note = remark or job.note.replace("Goes", "Went")
        if remark:
            self.report({"INFO"}, remark)
        return {"FINISHED"}


class POPULACE_OT_cancel_job(bpy.types.Operator):
    """Stop making this person; finished ones stay"""

    bl_idname = "populace.cancel_job"
    bl_label = "Cancel"
    bl_options = {"INTERNAL"}  # noqa: RUF012

    job_id: StringProperty(options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> Result:
        tasks.working_session().cancel(self.job_id)
        return {"FINISHED"}


class POPULACE_OT_cancel_all(bpy.types.Operator):
    """Stop making all people that are not finished"""

    bl_idname = "populace.cancel_all"
    bl_label = "Cancel All"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        state = tasks.session()
        if state is None or not any(not job.status.ended for job in state.jobs.values()):
            cls.poll_message_set("Nothing is being made")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        state = tasks.working_session()
        for job in list(state.jobs.values()):
            state.cancel(job.id)
        return {"FINISHED"}


class POPULACE_OT_clear_jobs(bpy.types.Operator):
    """Remove finished, failed and cancelled jobs from the list; the people in the scene stay"""

    bl_idname = "populace.clear_jobs"
    bl_label = "Clear Finished"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        state = tasks.session()
        if state is None or not any(job.status.ended for job in state.jobs.values()):
            cls.poll_message_set("No job is finished")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        state = tasks.session()
        count = state.clear() if state is not None else 0
        self.report({"INFO"}, f"{count} jobs removed from the list")
        return {"FINISHED"}


class POPULACE_OT_start_backend(bpy.types.Operator):
    """Start the generator, or use the one that another Blender has started"""

    bl_idname = "populace.start_backend"
    bl_label = "Start Generator"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        state = tasks.session()
        busy = state is not None and state.link in (Link.STARTING, Link.READY, Link.STOPPING)
        if state is not None and busy and state.trouble is None:
            cls.poll_message_set("The generator is running" if state.link is Link.READY else "Wait a moment")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        if not preferences.refresh():
            self.report({"ERROR"}, "The generator was not found: choose its Python in the add-on's preferences")
            return {"CANCELLED"}
        tasks.working_session().restart()
        return {"FINISHED"}


class POPULACE_OT_stop_backend(bpy.types.Operator):
    """Stop the generator and free its memory, for every Blender that uses it. Unfinished jobs are cancelled"""

    bl_idname = "populace.stop_backend"
    bl_label = "Stop Generator"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        state = tasks.session()
        if state is None or state.link not in (Link.STARTING, Link.READY):
            cls.poll_message_set("The generator is not running")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        tasks.working_session().shutdown()
        return {"FINISHED"}


class POPULACE_OT_find_generator(bpy.types.Operator):
    """Look again in the usual places for a Python that has the generator installed"""

    bl_idname = "populace.find_generator"
    bl_label = "Find Generator"

    def execute(self, context: bpy.types.Context) -> Result:
        if not preferences.refresh():
            self.report({"WARNING"}, "No generator found: install it, or choose its Python")
            return {"CANCELLED"}
        self.report({"INFO"}, "Generator found")
        return {"FINISHED"}


class POPULACE_OT_choose_python(bpy.types.Operator):
    """Choose the Python that has the generator installed"""

    bl_idname = "populace.choose_python"
    bl_label = "Choose Python"
    bl_options = {"INTERNAL"}  # noqa: RUF012

    filepath: StringProperty(subtype="FILE_PATH", options={"SKIP_SAVE"})

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    def execute(self, context: bpy.types.Context) -> Result:
        context.preferences.addons[__package__].preferences.python = self.filepath
        if not preferences.refresh():
            self.report({"ERROR"}, "This is not a Python: choose the file python or python.exe of the environment")
            return {"CANCELLED"}
        tasks.working_session().connect()
        return {"FINISHED"}


class POPULACE_OT_new_seed(bpy.types.Operator):
    """Choose another seed at random"""

    bl_idname = "populace.new_seed"
    bl_label = "New Seed"
    bl_options = {"UNDO", "INTERNAL"}  # noqa: RUF012

    def execute(self, context: bpy.types.Context) -> Result:
        context.scene.populace.seed = secrets.randbelow(RANDOM_SEEDS)
        return {"FINISHED"}


class POPULACE_OT_copy_recipe(bpy.types.Operator):
    """Copy everything needed to make this person again to the clipboard, as JSON"""

    bl_idname = "populace.copy_recipe"
    bl_label = "Copy Recipe"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _human_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        human = active_human(context)
        context.window_manager.clipboard = human.populace.recipe
        self.report({"INFO"}, "Recipe copied")
        return {"FINISHED"}


class POPULACE_OT_use_recipe(bpy.types.Operator):
    """Set the form to this person's seed and settings"""

    bl_idname = "populace.use_recipe"
    bl_label = "Use Settings"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _human_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        form, recipe = context.scene.populace, _recipe(active_human(context))
        if int(recipe.get("seed", 0)) > MAX_SEED:
            self.report({"ERROR"}, f"Seed {recipe['seed']} is larger than a form can hold, use Make Again")
            return {"CANCELLED"}
        form.randomise_seed, form.count = False, 1
        for name in request_properties():
            if name in recipe:
                setattr(form, name, str(recipe[name]) if name == "texture_size" else recipe[name])
        return {"FINISHED"}


class POPULACE_OT_make_again(bpy.types.Operator):
    """Make this very person once more from the stored recipe, with its exact latents"""

    bl_idname = "populace.make_again"
    bl_label = "Make Again"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _human_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        try:
            recipe = _recipe(active_human(context))
            settings = {f.name: recipe[f.name] for f in fields(Request) if f.name in recipe}
            settings["latents"] = recipe_latents(recipe) or None
            for name in ("prompt", "edits"):  # the latents have them in already
                settings.pop(name, None)
        except (ValueError, KeyError, TypeError):
            self.report({"ERROR"}, "This person's recipe was changed and cannot be read")
            return {"CANCELLED"}
        batch = scene.Batch(f"Humans {recipe.get('seed', '')}", 1, tuple(context.scene.cursor.location))
        tasks.submit([Request(**settings)], batch)
        return {"FINISHED"}


class POPULACE_OT_copy_error(bpy.types.Operator):
    """Copy the whole error text to the clipboard"""

    bl_idname = "populace.copy_error"
    bl_label = "Copy Error"
    bl_options = {"INTERNAL"}  # noqa: RUF012

    job_id: StringProperty(name="Job", description="Empty for the generator's own error", options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> Result:
        state, job = tasks.session(), _job(self.job_id)
        error = job.status.error if job is not None else state.trouble if state is not None else None
        if error is None:
            self.report({"WARNING"}, "There is no error to copy")
            return {"CANCELLED"}
        details = "" if job is not None or state is None else state.details
        request = json.dumps(job.request.to_json()) if job is not None else ""
        lines = [f"{error.code}: {error}", f"Blender {bpy.app.version_string}", request, details]
        context.window_manager.clipboard = "\n".join(filter(None, lines))
        self.report({"INFO"}, "Error copied")
        return {"FINISHED"}


def _job(job_id: str) -> Job | None:
    state = tasks.session()
    return state.jobs.get(job_id) if state is not None else None


def _recipe(human: bpy.types.Object | None) -> dict[str, Any]:
    recipe = json.loads(human.populace.recipe) if human is not None else None
    if not isinstance(recipe, dict):
        raise ValueError("not a recipe")
    return recipe


def _human_needed(cls: type[bpy.types.Operator], context: bpy.types.Context) -> bool:
    if active_human(context) is None:
        cls.poll_message_set("Select a generated human")
        return False
    return True


_CLASSES = (
    POPULACE_OT_generate, POPULACE_OT_insert_result, POPULACE_OT_cancel_job, POPULACE_OT_cancel_all,
    POPULACE_OT_clear_jobs, POPULACE_OT_start_backend, POPULACE_OT_stop_backend, POPULACE_OT_find_generator,
    POPULACE_OT_choose_python, POPULACE_OT_new_seed, POPULACE_OT_copy_recipe, POPULACE_OT_use_recipe,
    POPULACE_OT_make_again, POPULACE_OT_copy_error,
)  # fmt: skip


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
