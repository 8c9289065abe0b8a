# SPDX-License-Identifier: GPL-3.0-or-later
"""Sliders, colours and choices as the generator's families have them: properties made at run time.

There are two sets per family. Those of `WindowManager.populace_sliders` have no value of their own: they show the
active human and tell `editing` what is wanted of it, so they follow the selection, undo and loading by themselves; and
since they hang on the window manager, dragging one makes no step of undo. Those of `Scene.populace_wishes` are what the
create form asks for, and are stored in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import bpy
from bpy.props import BoolProperty, EnumProperty, FloatProperty, FloatVectorProperty, PointerProperty

from . import editing, tasks
from .families import Attribute, Family
from .properties import active_human, other_human
from .translations import told

USE: Final = "use_"  # before the name of a wish: whether it counts
_families: tuple[Family, ...] = ()
_classes: list[type] = []


def sliders(context: bpy.types.Context, family: str) -> Any:
    """The active human's properties, or None while the family is not known."""
    return getattr(getattr(context.window_manager, "populace_sliders", None), family, None)


def wishes(context: bpy.types.Context, family: str) -> Any:
    """The create form's properties, or None while the family is not known."""
    return getattr(getattr(context.scene, "populace_wishes", None), family, None)


def wished(context: bpy.types.Context, family: str) -> dict[str, Any]:
    """The attributes that the create form asks for, as a request has them."""
    group = wishes(context, family)
    if group is None:
        return {}
    return {a.name: plain(getattr(group, a.name)) for a in attributes_of(family) if getattr(group, USE + a.name)}


def attributes_of(family: str) -> tuple[Attribute, ...]:
    return next((f.attributes for f in _families if f.name == family), ())


def plain(value: Any) -> Any:
    """As JSON has it."""
    return value if isinstance(value, (str, float, int)) else [float(x) for x in value]


def follow(families: Sequence[Family]) -> None:
    """Have the properties of these families. Cheap while they stay the same."""
    global _families
    if tuple(families) == _families or not families:
        return
    _drop()
    _families = tuple(families)
    groups: dict[str, dict[str, Any]] = {"Slider": {}, "Wish": {}}
    for family in _families:
        live = {a.name: _slider(a) for a in family.attributes}
        kept = {name: p for a in family.attributes for name, p in ((a.name, _wish(a)), (USE + a.name, _use(a)))}
        for kind, properties in (("Slider", live), ("Wish", kept)):
            groups[kind][family.name] = PointerProperty(type=_group(f"Populace{kind}s_{family.name}", properties))
    bpy.types.WindowManager.populace_sliders = PointerProperty(type=_group("PopulaceSliders", groups["Slider"]))
    bpy.types.Scene.populace_wishes = PointerProperty(type=_group("PopulaceWishes", groups["Wish"]))


def _group(name: str, properties: dict[str, Any]) -> type:
    made = type(name, (bpy.types.PropertyGroup,), {"__annotations__": properties, "__module__": __name__})
    bpy.utils.register_class(made)
    _classes.append(made)
    return made


def _drop() -> None:
    global _families
    for owner, name in ((bpy.types.WindowManager, "populace_sliders"), (bpy.types.Scene, "populace_wishes")):
        if hasattr(owner, name):
            delattr(owner, name)
    while _classes:
        bpy.utils.unregister_class(_classes.pop())
    _families = ()


# ------------------------------------------------------------------------------------------------------ one attribute


def title(attribute: Attribute) -> str:
    return f"{attribute.title} ({attribute.unit})" if attribute.unit else attribute.title


def _number(a: Attribute) -> dict[str, Any]:
    wide = a.high - a.low > 10
    return {"name": title(a), "min": a.low, "max": a.high, "precision": 0 if wide else 2, "step": 100 if wide else 1,
            "description": f"{a.title}, {a.low:g} to {a.high:g} {a.unit}".strip()}  # fmt: skip


def _color(a: Attribute) -> dict[str, Any]:
    return {"name": a.title, "subtype": "COLOR_GAMMA", "size": 3, "min": 0.0, "max": 1.0,
            "description": f"{a.title}, as on the screen"}  # fmt: skip


def choice_label(a: Attribute, name: str) -> str:
    """Short, as it stands beside the attribute's title: leather shoes are Leather among the shoes."""
    words = name.replace("_", " ").split()
    return " ".join([word for word in words if word != a.name] or words).capitalize()


def _choice(a: Attribute) -> dict[str, Any]:
    items = [(name, choice_label(a, name), name.replace("_", " ").capitalize()) for name in a.choices or ("none",)]
    return {"name": a.title, "description": f"{a.title}, by name", "items": items}


def _wish(a: Attribute) -> Any:
    if a.kind == "number":
        return FloatProperty(**_number(a), default=round((a.low + a.high) / 2, 2))
    if a.kind == "color":
        return FloatVectorProperty(**_color(a), default=(0.35, 0.35, 0.35))
    return EnumProperty(**_choice(a))


def _use(a: Attribute) -> Any:
    name = told("Set {attribute}", attribute=a.title)
    return BoolProperty(name=name, description="Ask for this; otherwise the seed decides")


def _slider(a: Attribute) -> Any:
    def read(group: Any) -> Any:
        return _read(a)

    def write(group: Any, value: Any) -> None:
        _write(a, value)

    if a.kind == "number":
        return FloatProperty(**_number(a), get=read, set=write)
    if a.kind == "color":
        return FloatVectorProperty(**_color(a), get=read, set=write)
    return EnumProperty(**_choice(a), get=read, set=write)


def _read(a: Attribute) -> Any:
    """Never raises, whatever the file says."""
    value = editing.shown_value(active_human(bpy.context), a.name)
    if a.kind == "choice":
        return a.choices.index(value) if value in a.choices else -1
    if a.kind == "color":
        fits = isinstance(value, (list, tuple)) and len(value) == 3
        return [float(x) for x in value] if fits else (0.0, 0.0, 0.0)
    return min(max(float(value), a.low), a.high) if isinstance(value, (int, float)) else a.low


def _write(a: Attribute, value: Any) -> None:
    root = active_human(bpy.context)
    if root is not None and not root.library:
        if a.kind == "number":
            value = min(max(float(value), a.low), a.high)  # a 32-bit number may lie beyond by its last digit
        editing.want_value(root, a.name, a.choices[value] if a.kind == "choice" else plain(value))


# ---------------------------------------------------------------------------------------------------------- the mixer


class PopulaceTools(bpy.types.PropertyGroup):
    """What the tools of the active human are set to. Not stored."""

    def _mix(self) -> float:
        return editing.shown_mix(active_human(bpy.context))

    def _want_mix(self, amount: float) -> None:
        root, other = active_human(bpy.context), other_human(bpy.context)
        if root is not None and other is not None and not root.library:
            editing.want_mix(root, other, amount)

    mix: FloatProperty(
        name="Share", description="Mix with the other selected human: 0 changes nothing, 1 is the other",
        min=0.0, max=1.0, precision=2, get=_mix, set=_want_mix)  # fmt: skip
    variation: FloatProperty(
        name="Strength", description="How far the variants are from this person: 0 the same, 1 strangers", min=0.0,
        max=1.0, default=editing.VARIATION, precision=2)  # fmt: skip
    words: bpy.props.StringProperty(
        name="Words", description="What to change, in plain English, such as: older, red shirt, no hat")  # fmt: skip
    show_wishes: BoolProperty(name="Attributes", description="Show all attributes of the family, to ask for some")


def _watch() -> bool:
    session = tasks.session()
    if session is not None:
        follow(session.families)
    return False


def register() -> None:
    bpy.utils.register_class(PopulaceTools)
    bpy.types.WindowManager.populace = PointerProperty(type=PopulaceTools)
    tasks.watchers.append(_watch)


def unregister() -> None:
    tasks.watchers.remove(_watch)
    _drop()
    del bpy.types.WindowManager.populace
    bpy.utils.unregister_class(PopulaceTools)
