# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything the add-on can do, as operators: the panel's buttons, and the same for scripts."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Any

import bpy
from bpy.props import EnumProperty, StringProperty

from . import attributes, preferences, process, recipes, scene, snippets, tasks
from .actions import Action, Result, Work, has_human, in_object_mode, needs
from .messages import BackendError, Request
from .properties import MAX_SEED, RANDOM_SEEDS, active_human, output_of, request_properties, take_request
from .session import Job, Link


class POPULACE_OT_generate(Action, bpy.types.Operator):
    """Make people and put them at the 3D cursor, feet on its height"""

    bl_idname = "populace.generate"
    bl_label = "Generate"
    undo_name = "Generate Humans"

    __annotations__ = {
        **request_properties(),
        "values": StringProperty(name="Attributes", description='JSON of what to set, such as {"height_m": 1.8}',
                                 options={"SKIP_SAVE", "HIDDEN"}),
        "latent_maps": StringProperty(name="Photo Maps", description="JSON of what photos showed of parts, beside "
                                      "their codes", options={"SKIP_SAVE", "HIDDEN"}),
        "joint_rotations": StringProperty(name="Joint Rotations", description="JSON of w, x, y, z by bone, over the "
                                          "pose", options={"SKIP_SAVE", "HIDDEN"}),
        "latents": StringProperty(name="Latents", description="JSON of codes that replace those of the seed",
                                  options={"SKIP_SAVE", "HIDDEN"}),
        "parameters": StringProperty(name="Parameters", description="JSON of what the family takes besides",
                                     options={"SKIP_SAVE", "HIDDEN"}),
    }  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return in_object_mode(cls, context)

    def gather(self, context: bpy.types.Context) -> None:
        """The form's values."""
        form = context.scene.populace
        if form.randomise_seed:
            form.seed = secrets.randbelow(RANDOM_SEEDS)
        for name in request_properties():
            setattr(self, name, getattr(form, name))
        if wished := attributes.wished(context, form.family):
            self.values = snippets.values(wished)

    def work(self, context: bpy.types.Context) -> Work:
        base = Request(family=self.family, truncation_psi=self.truncation_psi, prompt=self.prompt.strip() or None,
                       latents=self._json("latents"), parameters=self._json("parameters") or {},
                       latent_maps=self._json("latent_maps") or {},
                       joint_rotations=self._json("joint_rotations"), **output_of(self))  # fmt: skip
        if values := self._json("values"):
            base = replace(base, edits=[{"op": "set", "values": values}])
        name = f"Humans {self.seed}" if self.count == 1 else f"Humans {self.seed}-{self.seed + self.count - 1}"
        batch = scene.Batch(name, self.count, tuple(context.scene.cursor.location), self.with_rig)
        seeds = range(self.seed, self.seed + self.count)
        return [(replace(base, seed=seed), tasks.InBatch(batch, i, f"Seed {seed}", self.mark_asset))
                for i, seed in enumerate(seeds)]  # fmt: skip

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(getattr(self, name) or "null")
        except ValueError:
            found = False
        if found is not None and not isinstance(found, dict):
            raise BackendError("bad_values", f"The {name} are not JSON of names and values.", "Correct them.")
        return found


class POPULACE_OT_insert_result(bpy.types.Operator):
    """Put this person into the scene"""

    bl_idname = "populace.insert_result"
    bl_label = "Insert Human"
    bl_options = {"UNDO", "INTERNAL"}  # noqa: RUF012

    job_id: StringProperty(options={"SKIP_SAVE"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return in_object_mode(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        job = _job(self.job_id)
        if job is None:
            self.report({"WARNING"}, "This job is no longer in the list")
            return {"CANCELLED"}
        if job.human is None:
            tasks.working_session().fetch(job)
            self.report({"INFO"}, "Fetching the person once more")
            return {"CANCELLED"}
        remark = job.tag.apply(context, job.human)
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
        return needs(cls, "Nothing is being made", state is not None
                     and any(not job.status.ended for job in state.jobs.values()))  # fmt: skip

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
        return needs(cls, "No job is finished", state is not None
                     and any(job.status.ended for job in state.jobs.values()))  # fmt: skip

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
        why = "The generator is running" if state is not None and state.link is Link.READY else "Wait a moment"
        return needs(cls, why, state is None or not busy or state.trouble is not None)

    def execute(self, context: bpy.types.Context) -> Result:
        if not preferences.refresh() and process.find_running() is None:
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
        return needs(cls, "The generator is not running", state is not None
                     and state.link in (Link.STARTING, Link.READY))  # fmt: skip

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
        return has_human(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        human = active_human(context)
        try:
            context.window_manager.clipboard = json.dumps(human.populace.whole_recipe, sort_keys=True)
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        self.report({"INFO"}, "Recipe copied")
        return {"FINISHED"}


class POPULACE_OT_use_recipe(bpy.types.Operator):
    """Set the form to this person's seed and settings"""

    bl_idname = "populace.use_recipe"
    bl_label = "Use Settings"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_human(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        form = context.scene.populace
        try:
            recipe = recipes.parse(active_human(context).populace.recipe)
            if int(recipe.get("seed", 0)) > MAX_SEED:
                raise BackendError("large_seed", f"Seed {recipe['seed']} is larger than a form can hold.",
                                   "Use Make Again.")  # fmt: skip
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        form.randomise_seed, form.count = False, 1
        take_request(form, recipe)
        return {"FINISHED"}


class POPULACE_OT_make_again(Action, bpy.types.Operator):
    """Make this very person once more from the stored recipe, with its exact latents"""

    bl_idname = "populace.make_again"
    bl_label = "Make Again"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_human(cls, context) and in_object_mode(cls, context)

    def work(self, context: bpy.types.Context) -> Work:
        root = active_human(context)
        seed = root.populace.seed
        batch = scene.Batch(f"Humans {seed}", 1, tuple(context.scene.cursor.location), root.type == "ARMATURE")
        return [(recipes.request_of(root.populace.whole_recipe), tasks.InBatch(batch, 0, f"Seed {seed}"))]


class POPULACE_OT_copy_python(bpy.types.Operator):
    """Copy Python that does this again. Holding Alt while pressing any button of Populace does the same for it"""

    bl_idname = "populace.copy_python"
    bl_label = "Copy as Python"

    what: EnumProperty(name="What", items=[
        ("LAST", "Last Action", "What was done last, by a button or a slider"),
        ("ALL", "All Actions", "What was done since Blender started, oldest first"),
        ("HUMAN", "This Human", "The active human with its exact latents, by operator"),
        ("CLIENT", "This Human by Client", "The active human as arrays, for scripts without a scene"),
    ], options={"SKIP_SAVE"})  # fmt: skip

    def execute(self, context: bpy.types.Context) -> Result:
        root = active_human(context)
        if self.what in ("LAST", "ALL"):
            if not snippets.last:
                self.report({"WARNING"}, "Nothing was done yet")
                return {"CANCELLED"}
            text = snippets.script(*(snippets.last if self.what == "ALL" else [snippets.last[-1]]))
        elif root is None:
            self.report({"WARNING"}, "Select a generated human")
            return {"CANCELLED"}
        else:
            try:
                request = recipes.request_of(root.populace.whole_recipe)
            except BackendError as error:
                self.report({"ERROR"}, str(error))
                return {"CANCELLED"}
            text = snippets.client_script(request, __package__)
            if self.what == "HUMAN":
                text = snippets.script(snippets.person(request, root.type == "ARMATURE"))
        context.window_manager.clipboard = text
        self.report({"INFO"}, "Copied as Python")
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


_CLASSES = (
    POPULACE_OT_generate, POPULACE_OT_insert_result, POPULACE_OT_cancel_job, POPULACE_OT_cancel_all,
    POPULACE_OT_clear_jobs, POPULACE_OT_start_backend, POPULACE_OT_stop_backend, POPULACE_OT_find_generator,
    POPULACE_OT_choose_python, POPULACE_OT_new_seed, POPULACE_OT_copy_recipe, POPULACE_OT_use_recipe,
    POPULACE_OT_make_again, POPULACE_OT_copy_python, POPULACE_OT_copy_error,
)  # fmt: skip


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
