# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be done to the active human, as operators. All of them are in `actions.Action`'s manner."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import bpy
from bpy.props import BoolProperty, EnumProperty, FloatProperty, IntProperty, StringProperty

from . import editing, history, recipes, scene, snippets, tasks
from .actions import Action, Result, Work, can_edit, has_human, has_two, in_object_mode, needs
from .messages import PHOTO_POSE, BackendError
from .photo import keeping
from .properties import MAX_SEED, active_human, other_human, output_of, output_properties

ANY_SEED = -1
KINDS = [("ALL", "Shape and Looks", "Shapes and textures"), ("TEX", "Looks", "Textures only; no shape changes")]


def _seed() -> Any:
    return IntProperty(name="Seed", description="Whom to take it from; -1 for anybody", min=ANY_SEED, max=MAX_SEED,
                       default=ANY_SEED, options={"SKIP_SAVE"})  # fmt: skip


def _part() -> Any:
    return StringProperty(name="Part", description="Such as hair, top or shoes", maxlen=32, options={"SKIP_SAVE"})


class _Edit(Action):
    """Asks for the active human with `edits`."""

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        raise NotImplementedError

    @property
    def done(self) -> str:
        """What the history says was done: a word or two, since it stands below a small picture."""
        return self.bl_label

    def work(self, context: bpy.types.Context) -> Work:
        root = active_human(context)
        editing.clear_sheet()
        request = editing.request(root, self.edits(root))
        return [(request, editing.target(root, self.done))]

    def gather(self, context: bpy.types.Context) -> None:
        if getattr(self, "seed", 0) == ANY_SEED:
            self.seed = editing.random_seed()

    @property
    def kinds_list(self) -> list[str]:
        return ["tex"] if self.kinds == "TEX" else ["shape", "tex"]


class POPULACE_OT_set_attributes(_Edit, bpy.types.Operator):
    """Set attributes of the active human, such as height or the colour of its top"""

    bl_idname = "populace.set_attributes"
    bl_label = "Set Attributes"
    done = "Attributes"

    values: StringProperty(name="Values", description='JSON, such as {"height_m": 1.8, "top_color": [0.1, 0.2, 0.5]}',
                           options={"SKIP_SAVE"})  # fmt: skip

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        try:
            values = json.loads(self.values)
        except ValueError:
            values = None
        if not isinstance(values, dict) or not values:
            raise BackendError("bad_values", "The values are not JSON of names and values.",
                               'Give for example {"height_m": 1.8}.')  # fmt: skip
        return [{"op": "set", "values": values}]


class POPULACE_OT_change_by_words(_Edit, bpy.types.Operator):
    """Change the active human by plain words"""

    bl_idname = "populace.change_by_words"
    bl_label = "Change by Words"
    done = "Words"

    text: StringProperty(name="Words", description="Such as: older, red shirt, no hat", maxlen=1000,
                         options={"SKIP_SAVE"})  # fmt: skip

    def gather(self, context: bpy.types.Context) -> None:
        self.text = self.text or context.window_manager.populace.words

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        if not self.text.strip():
            raise BackendError("no_words", "There are no words.", "Write what to change, such as: older, red shirt.")
        return [{"op": "words", "text": self.text}]


class POPULACE_OT_reroll(_Edit, bpy.types.Operator):
    """Take a part, or everything that is not locked, from somebody else"""

    bl_idname = "populace.reroll"
    bl_label = "Re-roll"

    part: _part()
    kinds: EnumProperty(name="What", description="What is taken", items=KINDS, options={"SKIP_SAVE"})
    seed: _seed()

    @property
    def done(self) -> str:
        return self.part.capitalize() or self.bl_label

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        seed = editing.random_seed() if self.seed == ANY_SEED else self.seed
        if self.part:
            return [editing.vary_edit(seed, 1.0, self.part) | {"kinds": self.kinds_list}]
        return [{"op": "reroll", "seed": seed, "lock": root.populace.locked_parts, "kinds": self.kinds_list}]


class POPULACE_OT_swap_part(_Edit, bpy.types.Operator):
    """Take this part from the other selected human"""

    bl_idname = "populace.swap_part"
    bl_label = "Take from the Other"

    part: _part()
    other: StringProperty(name="Other", description="Id of the other human; empty for the selected one",
                          options={"SKIP_SAVE"})  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_two(cls, context)

    @property
    def done(self) -> str:
        return f"Other {self.part}"

    def gather(self, context: bpy.types.Context) -> None:
        self.other = other_human(context).populace.uuid

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        return [editing.swap_edit(_other(self.other), self.part)]


class POPULACE_OT_remove_part(_Edit, bpy.types.Operator):
    """Take this part off"""

    bl_idname = "populace.remove_part"
    bl_label = "Take Off"

    part: _part()

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        return [{"op": "remove", "parts": [self.part]}]


class POPULACE_OT_vary(_Edit, bpy.types.Operator):
    """Become this variant of the active human"""

    bl_idname = "populace.vary"
    bl_label = "Vary"

    seed: _seed()
    amount: FloatProperty(name="Strength", description="0 the same person, 1 a stranger", min=0.0, max=1.0,
                          default=editing.VARIATION, options={"SKIP_SAVE"})  # fmt: skip
    part: _part()

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        seed = editing.random_seed() if self.seed == ANY_SEED else self.seed
        return [editing.vary_edit(seed, self.amount, self.part)]


class POPULACE_OT_mix(_Edit, bpy.types.Operator):
    """Mix the active human with the other selected one"""

    bl_idname = "populace.mix"
    bl_label = "Mix"

    amount: FloatProperty(name="Amount", description="0 changes nothing, 1 is the other", min=0.0, max=1.0, default=0.5)
    other: StringProperty(name="Other", description="Id of the other human; empty for the selected one",
                          options={"SKIP_SAVE"})  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return can_edit(cls, context)

    def edits(self, root: bpy.types.Object) -> editing.Edits:
        return [editing.mix_edit(_other(self.other), self.amount)]


class POPULACE_OT_set_output(_Edit, bpy.types.Operator):
    """Make the active human again with the output options of the form: pose, faces, textures, garments, rig"""

    bl_idname = "populace.set_output"
    bl_label = "Apply to Active Human"

    __annotations__ = output_properties()

    def gather(self, context: bpy.types.Context) -> None:
        for name in output_properties():
            setattr(self, name, getattr(context.scene.populace, name))

    def work(self, context: bpy.types.Context) -> Work:
        root, output = active_human(context), output_of(self)
        turns = None  # those of a photo's pose would go over the chosen one
        if output["pose"] == PHOTO_POSE:
            output["pose"], turns = "rest", keeping.facts(root.populace.photo).get("rotations")
        request = editing.request(root, **output, joint_rotations=turns)
        return [(request, editing.target(root, "Output", self.with_rig))]


class POPULACE_OT_restore_version(Action, bpy.types.Operator):
    """Become exactly who this was"""

    bl_idname = "populace.restore_version"
    bl_label = "Restore Version"

    index: IntProperty(name="Version", description="0 is the oldest, -1 the newest", default=-1,
                       options={"SKIP_SAVE"})  # fmt: skip

    def work(self, context: bpy.types.Context) -> Work:
        root = active_human(context)
        versions = root.populace.versions
        if not -len(versions) <= self.index < len(versions):
            raise BackendError("no_version", f"There is no version {self.index}.", f"There are {len(versions)}.")
        recipe = keeping.whole(root.populace, versions[self.index].recipe)
        return [(recipes.request_of(recipe), editing.target(root, "Restored", anew=True))]


class POPULACE_OT_use_favourite(Action, bpy.types.Operator):
    """Make this favourite at the 3D cursor, or let the active human become it"""

    bl_idname = "populace.use_favourite"
    bl_label = "Use Favourite"

    favourite: StringProperty(name="Favourite", description="Its id", options={"SKIP_SAVE"})
    replace: BoolProperty(name="Replace", description="Let the active human become this one", options={"SKIP_SAVE"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return in_object_mode(cls, context)

    @classmethod
    def description(cls, context: bpy.types.Context, properties: Any) -> str:
        return "Let the active human become this favourite" if properties.replace else cls.__doc__.partition(",")[0]

    def work(self, context: bpy.types.Context) -> Work:
        found = history.favourite(self.favourite)
        request = recipes.request_of(recipes.parse(found.recipe))
        root = active_human(context)
        if self.replace:
            if root is None:
                raise BackendError("no_human", "No human is active.", "Select one, or do not replace.")
            return [(request, editing.target(root, found.name, anew=True))]
        batch = scene.Batch(found.name, 1, tuple(context.scene.cursor.location))
        return [(request, tasks.InBatch(batch, 0, found.name))]


# -------------------------------------------------------------------------------------------- what asks for nothing


class POPULACE_OT_apply_edit(bpy.types.Operator):
    """Put the changed person in the place of the old one"""

    bl_idname = "populace.apply_edit"
    bl_label = "Edit Human"
    bl_options: ClassVar[set[str]] = {"UNDO", "INTERNAL"}

    job_id: StringProperty(options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> Result:
        session = tasks.session()
        job = session.jobs.get(self.job_id) if session is not None else None
        if job is None or job.human is None:
            self.report({"WARNING"}, "This job is no longer in the list")
            return {"CANCELLED"}
        job.note = job.tag.apply(context, job.human)
        job.taken, job.human = True, None
        if not job.note:  # the person shows it, and the history
            del session.jobs[job.id]
        return {"FINISHED"}


class POPULACE_OT_make_variants(bpy.types.Operator):
    """Show six people near the active one to choose from"""

    bl_idname = "populace.make_variants"
    bl_label = "Show Variants"

    seed: _seed()
    amount: FloatProperty(name="Strength", description="0 the same person, 1 strangers", min=0.0, max=1.0,
                          default=editing.VARIATION)  # fmt: skip
    part: _part()

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return (needs(cls, "Background mode shows nothing: use bpy.ops.populace.vary", not bpy.app.background
                      or getattr(bpy.app, "module", False)) and can_edit(cls, context))  # fmt: skip

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        self.amount = context.window_manager.populace.variation
        if event is not None and event.alt:
            line = snippets.call("populace.vary", {"seed": editing.random_seed(), "amount": self.amount})
            context.window_manager.clipboard = snippets.script(line)
            self.report({"INFO"}, "Copied as Python")
            return {"FINISHED"}
        return self.execute(context)

    def execute(self, context: bpy.types.Context) -> Result:
        seed = editing.random_seed() if self.seed == ANY_SEED else self.seed
        try:
            editing.make_own(root := active_human(context))
            editing.make_sheet(root, self.amount, self.part, seed)
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


class POPULACE_OT_close_variants(bpy.types.Operator):
    """Keep the person as it is"""

    bl_idname = "populace.close_variants"
    bl_label = "Keep This One"
    bl_options: ClassVar[set[str]] = {"INTERNAL"}

    def execute(self, context: bpy.types.Context) -> Result:
        editing.clear_sheet()
        return {"FINISHED"}


class POPULACE_OT_lock_part(bpy.types.Operator):
    """Leave this part alone when everything is re-rolled"""

    bl_idname = "populace.lock_part"
    bl_label = "Lock"
    bl_options: ClassVar[set[str]] = {"REGISTER", "UNDO"}

    part: _part()

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_human(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        about = active_human(context).populace
        locked = about.locked_parts
        about.locked = ",".join([p for p in locked if p != self.part] if self.part in locked else [*locked, self.part])
        return {"FINISHED"}


class POPULACE_OT_add_favourite(bpy.types.Operator):
    """Keep the active human for every file"""

    bl_idname = "populace.add_favourite"
    bl_label = "Add to Favourites"

    name: StringProperty(name="Name", description="Empty for the seed", maxlen=60, options={"SKIP_SAVE"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_human(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        root = active_human(context)
        try:
            kept = history.keep(root, self.name or f"Seed {root.populace.seed}")
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        self.report({"INFO"}, f"{kept.name} is a favourite now")
        return {"FINISHED"}


class POPULACE_OT_remove_favourite(bpy.types.Operator):
    """Remove this favourite from your folder; people in files stay"""

    bl_idname = "populace.remove_favourite"
    bl_label = "Remove Favourite"

    favourite: StringProperty(name="Favourite", description="Its id", options={"SKIP_SAVE"})

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> Result:
        try:
            history.drop(self.favourite)
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


def _other(given: str) -> str:
    """The id of the other person. Raises `BackendError`."""
    if given:
        return given
    other = other_human(bpy.context)
    if other is None:
        raise BackendError("person_gone", "There is no other human.", "Select two, or name the other one.")
    return other.populace.uuid


CLASSES = (
    POPULACE_OT_set_attributes, POPULACE_OT_change_by_words, POPULACE_OT_reroll, POPULACE_OT_swap_part,
    POPULACE_OT_remove_part, POPULACE_OT_vary, POPULACE_OT_mix, POPULACE_OT_set_output, POPULACE_OT_restore_version,
    POPULACE_OT_use_favourite, POPULACE_OT_apply_edit, POPULACE_OT_make_variants, POPULACE_OT_close_variants,
    POPULACE_OT_lock_part, POPULACE_OT_add_favourite, POPULACE_OT_remove_favourite,
)  # fmt: skip


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
