# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens to the active human: requests that change it, and what a slider shows before it is released.

A slider only notes what is wanted (`want_value`, `want_mix`). A tick sends a preview when the slider rests for a
moment, and the person in full when it rests longer. Only the newest request counts, older ones are cancelled. Previews
make no step of undo; the person in full makes one. Nothing here outlives Blender: what a person is stands on its
object.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import bpy
from bpy.app.handlers import persistent
from bpy.app.translations import pgettext_iface as iface

from . import recipes, replacing, scene, snippets, tasks, thumbnails
from .messages import BackendError, Request
from .packet import Human
from .properties import RANDOM_SEEDS, thumbnail_key
from .session import Job

DEBOUNCE_S: Final = 0.15
MAX_WAIT_S: Final = 0.6  # while a slider never rests
PAUSE_S: Final = 0.6
VARIANTS: Final = 6
VARIATION: Final = 0.45  # 0.3 gives people that one takes for the same; from 0.5 on parts change sides as a whole
NOWHERE: Final = (0.0, 0.0, 0.0)

Edits = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Edit:
    """The target of a request that changes a person for good."""

    uuid: str
    label: str
    with_rig: bool | None = None  # as it is
    is_posed: bool = False  # the request is about the pose, so one that was made by hand gives way
    operator: str = "apply_edit"

    def apply(self, context: bpy.types.Context, human: Human) -> str:
        live = _live.pop(self.uuid, None)
        if live is not None and live.final is not None and live.final.tag is not self:
            _cancel(live.final)
        root = replacing.find(self.uuid)
        if root is None:
            scene.insert(context, human, scene.Batch("Humans", 1, tuple(context.scene.cursor.location)))
            return "The person was deleted meanwhile, so a new one was made"
        with_rig = root.type == "ARMATURE" if self.with_rig is None else self.with_rig
        if self.is_posed and root.type == "ARMATURE":
            root.populace.pose_mark = scene.pose_mark(root)
        replacing.replace(context, root, human, with_rig).populace.fill(self.uuid, human, self.label)
        return ""


@dataclass(frozen=True)
class Preview:
    """The target of a request that shows what a slider would do."""

    uuid: str
    number: int
    label: str = "Preview"
    operator: str = ""

    def apply(self, context: bpy.types.Context, human: Human) -> str:
        root, live = replacing.find(self.uuid), _live.get(self.uuid)
        if root is not None and live is not None and self.number > live.shown and not tasks.is_held():
            live.shown = self.number
            replacing.show_preview(context, root, human)
        return ""


@dataclass
class Variant:
    """One picture of the sheet, and the target of its request."""

    uuid: str
    seed: int
    amount: float
    part: str = ""  # all
    key: str = ""  # of its thumbnail
    label: str = "Variant"
    operator: str = ""

    def apply(self, context: bpy.types.Context, human: Human) -> str:
        if human.thumbnail_png is not None:
            self.key = thumbnail_key(human.thumbnail_png)
            thumbnails.offer(self.key, human.thumbnail_png)
        return ""


@dataclass
class Live:
    """What is wanted of one person and not made in full yet."""

    values: dict[str, Any] = field(default_factory=dict)
    mix: tuple[str, float] | None = None  # uuid of the other person, amount
    changed_at: float = 0.0
    waiting_since: float = 0.0  # of the oldest change that no preview shows; 0 if there is none
    sent: int = 0
    shown: int = 0
    preview: Job | None = None
    final: Job | None = None

    def edits(self) -> list[Mapping[str, Any]]:
        found = []
        if self.mix is not None:
            found.append(mix_edit(self.mix[0], self.mix[1]))
        if self.values:
            found.append({"op": "set", "values": dict(self.values)})
        return found


trouble: BackendError | None = None  # why what a slider wanted could not be asked for
_live: dict[str, Live] = {}
_sheet: list[Variant] = []
_attributes: tuple[str, dict[str, Any]] = ("", {})  # parsed last


# --------------------------------------------------------------------------------------------------- what is, is shown


def attributes(root: bpy.types.Object) -> dict[str, Any]:
    """What can be said of this person, as it was measured."""
    global _attributes
    text = root.populace.attributes
    if text != _attributes[0]:
        try:
            found = json.loads(text)
        except ValueError:
            found = {}
        _attributes = (text, found if isinstance(found, dict) else {})
    return _attributes[1]


def shown_value(root: bpy.types.Object | None, name: str) -> Any:
    """What a slider shows: what is wanted, else what is; None where nothing is known."""
    if root is None:
        return None
    live = _live.get(root.populace.uuid)
    return live.values[name] if live is not None and name in live.values else attributes(root).get(name)


def shown_mix(root: bpy.types.Object | None) -> float:
    live = _live.get(root.populace.uuid) if root is not None else None
    return live.mix[1] if live is not None and live.mix is not None else 0.0


def sheet(root: bpy.types.Object) -> list[Variant]:
    return [variant for variant in _sheet if variant.uuid == root.populace.uuid]


# ------------------------------------------------------------------------------------------------------- what is wanted


def want_value(root: bpy.types.Object, name: str, value: Any) -> None:
    """A slider moves. Only notes it."""
    _changed(root).values[name] = value


def want_mix(root: bpy.types.Object, other: bpy.types.Object, amount: float) -> None:
    _changed(root).mix = (other.populace.uuid, amount)


def _changed(root: bpy.types.Object) -> Live:
    global trouble
    trouble = None
    live = _live.setdefault(make_own(root), Live())
    now = time.monotonic()
    live.changed_at, live.waiting_since = now, live.waiting_since or now
    _cancel(live.final)
    live.final = None
    return live


def request(root: bpy.types.Object, edits: Edits = (), **output: Any) -> Request:
    """The request for this person with `edits`, on top of those that are still on their way. Raises `BackendError`."""
    recipe = root.populace.whole_recipe
    session = tasks.session()
    if edits and session is not None and session.families and session.family(str(recipe.get("family"))) is None:
        raise BackendError("unknown_family", recipes.remark(recipe, None, session.families) + ".",
                           "Use the generator that made it.")  # fmt: skip
    coming = _coming(root.populace.uuid)
    if coming is not None:
        return replace(coming.request, edits=[*coming.request.edits, *edits], **output)
    return recipes.request_of(recipe, edits, **output)


def target(root: bpy.types.Object, label: str, with_rig: bool | None = None, anew: bool = False,
           is_posed: bool = False) -> Edit:  # fmt: skip
    """For a `request` that is about to be sent: it takes the place of the one that is on its way, if there is one.
    With `anew` it has nothing of that one in it."""
    label = iface(label)
    coming = _coming(make_own(root))
    if coming is not None and not anew:
        label = f"{coming.tag.label}, {label}"
        with_rig = coming.tag.with_rig if with_rig is None else with_rig
        is_posed |= coming.tag.is_posed
    _cancel(coming)
    return Edit(root.populace.uuid, label[:60], with_rig, is_posed)


def _coming(key: str) -> Job | None:
    """The edit of a person that was asked for and is not applied yet."""
    session = tasks.session()
    jobs = reversed(list(session.jobs.values())) if session is not None else ()
    return next((job for job in jobs if isinstance(job.tag, Edit) and job.tag.uuid == key and not job.taken
                 and job.status.state not in ("failed", "cancelling", "cancelled")), None)  # fmt: skip


def mix_edit(other_uuid: str, amount: float) -> dict[str, Any]:
    """Raises `BackendError` when the other person is gone."""
    return {"op": "mix", "other": _person_of(other_uuid), "amount": amount}


def swap_edit(other_uuid: str, part: str) -> dict[str, Any]:
    """Raises `BackendError` when the other person is gone."""
    return {"op": "part", "parts": [part], "other": _person_of(other_uuid)}


def _person_of(other_uuid: str) -> dict[str, Any]:
    other = replacing.find(other_uuid)
    if other is None:
        raise BackendError("person_gone", "The other person is not in this file.", "Select two people.")
    return recipes.person(other.populace.whole_recipe)


def random_seed() -> int:
    return secrets.randbelow(RANDOM_SEEDS)


def make_own(root: bpy.types.Object) -> str:
    """The uuid of a person; a copy that Blender made of one gets another than its model."""
    if any(o is not root and o.populace.uuid == root.populace.uuid for o in bpy.data.objects):
        root.populace.uuid = uuid.uuid4().hex
    return root.populace.uuid


def make_sheet(root: bpy.types.Object, amount: float, part: str, seed: int) -> None:
    """Ask for small pictures of people near this one. Raises `BackendError`."""
    clear_sheet()
    for i in range(VARIANTS):
        variant = Variant(root.populace.uuid, seed + i, amount, part)
        wanted = recipes.preview_of(request(root, [vary_edit(seed + i, amount, part)]))
        _sheet.append(variant)
        tasks.send(wanted, variant)


def vary_edit(seed: int, amount: float, part: str = "") -> dict[str, Any]:
    return {"op": "vary", "seed": seed, "amount": amount} | ({"parts": [part]} if part else {})


def clear_sheet() -> None:
    session = tasks.session()
    for job in list(session.jobs.values()) if session is not None else []:
        if isinstance(job.tag, Variant):
            _cancel(job)
    _sheet.clear()


# ------------------------------------------------------------------------------------------------------------- the tick


def _watch() -> bool:
    """Send what is due. True while a slider is on its way."""
    now = time.monotonic()
    for key, live in list(_live.items()):
        root = replacing.find(key)
        if root is None:
            del _live[key]
        elif live.final is not None:
            if live.final.status.state in ("failed", "cancelled"):  # the job's row says why
                del _live[key]
                replacing.drop_previews(root)
                tasks.redraw()
        else:
            _send_due(root, live, now)
    return any(live.final is None for live in _live.values())


def _send_due(root: bpy.types.Object, live: Live, now: float) -> None:
    global trouble
    rested, waited = now - live.changed_at, now - (live.waiting_since or now)
    is_open = live.preview is not None and live.preview.is_open
    try:
        if live.waiting_since and (rested >= DEBOUNCE_S or (waited >= MAX_WAIT_S and not is_open)):
            _cancel(live.preview)
            live.waiting_since, live.sent = 0.0, live.sent + 1
            wanted = recipes.preview_of(request(root, live.edits()))
            live.preview = tasks.send(wanted, Preview(root.populace.uuid, live.sent))
        elif not live.waiting_since and rested >= PAUSE_S:
            wanted = request(root, live.edits())
            live.final = tasks.send(wanted, target(root, _label(root, live)))
            _note(live)
    except BackendError as error:
        trouble = error
        del _live[root.populace.uuid]
        replacing.drop_previews(root)


def _label(root: bpy.types.Object, live: Live) -> str:
    """What was changed, in the words that stand beside the sliders; of a part's colour only the part, since a word or
    two is all that fits below a picture."""
    session = tasks.session()
    family = session.family(root.populace.family) if session is not None else None
    titles = ["Mixed"] if live.mix is not None else []
    for name in live.values if family is not None else ():
        attribute = family.attribute(name.removesuffix("_color")) or family.attribute(name)
        titles.append(attribute.title if attribute is not None else name)
    return ", ".join(dict.fromkeys(iface(title) for title in titles))


def _note(live: Live) -> None:
    if live.mix is not None:
        snippets.note("populace.mix", {"other": live.mix[0], "amount": live.mix[1]})
    if live.values:
        snippets.note("populace.set_attributes", {"values": snippets.values(live.values)})


def _cancel(job: Job | None) -> None:
    """Also if it has arrived already and only waits to be taken."""
    session = tasks.session()
    if job is not None and session is not None and job.id in session.jobs:
        session.cancel(job.id)
        job.taken, job.human = True, None
        del session.jobs[job.id]


def forget() -> None:
    """Nothing is wanted any more: after undo, redo and loading a file the sliders show what is."""
    for live in _live.values():
        _cancel(live.preview)
        _cancel(live.final)
    _live.clear()


@persistent
def _undone(*_: Any) -> None:
    forget()


@persistent
def _loaded(*_: Any) -> None:
    forget()
    clear_sheet()


def register() -> None:
    tasks.watchers.append(_watch)
    bpy.app.handlers.undo_pre.append(_undone)
    bpy.app.handlers.redo_pre.append(_undone)
    bpy.app.handlers.load_post.append(_loaded)


def unregister() -> None:
    forget()
    _sheet.clear()
    tasks.watchers.remove(_watch)
    for name, handler in (("undo_pre", _undone), ("redo_pre", _undone), ("load_post", _loaded)):
        handlers = getattr(bpy.app.handlers, name)
        if handler in handlers:
            handlers.remove(handler)
