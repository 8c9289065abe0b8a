# SPDX-License-Identifier: GPL-3.0-or-later
"""The form for crowds: its settings, which the operators share, and the rows of its mix."""

from __future__ import annotations

import math
from typing import Any, Final

import bpy
from bpy.props import (
    BoolProperty,
    CollectionProperty,
    EnumProperty,
    FloatProperty,
    FloatVectorProperty,
    IntProperty,
    PointerProperty,
    StringProperty,
)

from .. import tasks
from ..families import Family
from ..properties import MAX_SEED, TEXTURE_SIZES
from .placement import Value

MAX_PEOPLE: Final = 200
MAX_PLACEMENTS: Final = 10_000
BANDS: Final = 3  # that a range of numbers is cut into when its mix is begun
COLORS: Final = ((0.05, 0.05, 0.06), (0.85, 0.85, 0.83), (0.1, 0.18, 0.4), (0.5, 0.08, 0.08))

Result = set[str]


def crowd_properties() -> dict[str, Any]:
    """The annotations that the form and the operator share."""
    return {
        "people": IntProperty(
            name="People", description="How many different people to make", min=1, max=MAX_PEOPLE, default=20),
        "placements": IntProperty(
            name="Placements", description="How many times one of them stands somewhere", min=1, max=MAX_PLACEMENTS,
            soft_max=1000, default=100),
        "seed": IntProperty(
            name="Seed", description="Who they are and where they stand. The same seed and settings give the same "
            "crowd again", min=0, max=MAX_SEED, default=1),
        "where": EnumProperty(
            name="Where", description="What the people stand on", default="GRID", items=[
                ("SURFACE", "Surface", "Anywhere on a mesh that is flat enough"),
                ("CURVE", "Curve", "Along a curve, or in a band around it"),
                ("GRID", "Grid", "In rows around the 3D cursor"),
                ("MARKERS", "Markers", "One at each selected object, turned like it")]),
        "distance": FloatProperty(
            name="Min Distance", description="No two people are nearer to each other, in metres", min=0.0, max=100.0,
            default=0.9, precision=2),
        "max_slope": FloatProperty(
            name="Max Slope", description="Steeper parts of the surface stay empty", subtype="ANGLE", min=0.0,
            max=math.pi, soft_max=math.pi / 2, default=math.radians(35)),
        "width": FloatProperty(
            name="Width", description="Of the band around the curve, in metres; 0 is on the curve itself", min=0.0,
            soft_max=20.0, default=0.0, precision=2),
        "gap": FloatProperty(
            name="Gap", description="Free space between rows beyond the minimum distance, in metres", min=0.0,
            soft_max=10.0, default=0.6, precision=2),
        "columns": IntProperty(
            name="Columns", description="People in a row; 0 makes a square", min=0, max=1000, default=0),
        "jitter": FloatProperty(
            name="Disorder", description="How far people leave their places, as far as the minimum distance allows",
            min=0.0, max=1.0, default=0.5, subtype="FACTOR"),
        "facing": EnumProperty(
            name="Facing", description="Which way people look", default="FIXED", items=[
                ("FIXED", "Fixed", "All by the same angle"),
                ("ALONG", "Along", "Along the curve, downhill on a surface, as the markers do"),
                ("TOWARDS", "Towards", "At an object")]),
        "angle": FloatProperty(
            name="Angle", description="Turn about the vertical; 0 looks down -Y", subtype="ANGLE", default=0.0,
            min=-2 * math.pi, max=2 * math.pi),
        "spread": FloatProperty(
            name="Spread", description="People turn at random within this angle", subtype="ANGLE", min=0.0,
            max=2 * math.pi, default=math.radians(60)),
        "poses": EnumProperty(
            name="Poses", description="How people stand to whom the mix gives no pose", default="STANDING", items=[
                ("STANDING", "Standing", "Several ways of standing"), ("WALKING", "Walking", "In mid-step"),
                ("MIXED", "Mixed", "Some stand, some walk"), ("REST", "Rest", "As they are rigged, arms apart")]),
        "display": EnumProperty(
            name="Viewport", description="How the viewport shows people; renders are always full", default="LIGHT",
            items=[("FULL", "Full", "By level of detail, as the render does"),
                   ("LIGHT", "Light", "All by their coarsest level"), ("BOX", "Manikins", "As boxes, the lightest")]),
        "lods": IntProperty(
            name="Levels", description="Levels of detail, each with a quarter of the faces. Below 2000 faces people "
            "lose their shape", min=1, max=4, default=2),
        "lod_distance": FloatProperty(
            name="LOD Distance", description="Nearer to the camera people are shown in full; each doubling of this "
            "distance, in metres, is one level coarser", min=0.1, soft_max=100.0, default=8.0, precision=1),
        "faces": IntProperty(
            name="Faces", description="Triangles of one whole person", min=500, max=2_000_000, soft_max=50_000,
            step=1000, default=8000),
        "texture_size": EnumProperty(
            name="Textures", description="Size of a person's maps", items=TEXTURE_SIZES, default="1024"),
        "maps": EnumProperty(
            name="Maps", description="Which maps a person has", default="color", items=[
                ("color", "Colour", "Base colour alone: a third of the memory"),
                ("pbr", "All", "Base colour, normals and roughness")]),
        "truncation_psi": FloatProperty(
            name="Variation", description="How far people may differ from the average", min=0.0, max=1.5, soft_max=1.0,
            default=0.9, precision=2),
        "grid_resolution": IntProperty(
            name="Detail", description="Lattice cells along the height when the surface is extracted", min=16, max=512,
            soft_min=64, default=160),
        "family": StringProperty(
            name="Family", description="The kind of generator that makes the people", default="people", maxlen=32),
    }  # fmt: skip


class PopulaceShare(bpy.types.PropertyGroup):
    """So many per cent of the people have this."""

    attribute: StringProperty(name="Attribute", description="What is said of them: an attribute of the family, "
                              "\"pose\" or \"words\"")  # fmt: skip
    title: StringProperty(name="Title")
    kind: EnumProperty(name="Kind", items=[(name, name.title(), "") for name in ("number", "color", "choice")])
    percent: FloatProperty(name="Share", description="Of the people; exact to the person", subtype="PERCENTAGE",
                           min=0.0, max=100.0, default=50.0, precision=0)  # fmt: skip
    low: FloatProperty(name="From", description="The least of the range that these people are spread over")
    high: FloatProperty(name="To", description="The most of the range that these people are spread over")
    color: FloatVectorProperty(name="Colour", description="Of the garment or hair", subtype="COLOR_GAMMA", min=0.0,
                               max=1.0)  # fmt: skip
    choice: StringProperty(name="Choice", description="One of the names that the generator knows, or words",
                           search=lambda self, context, text: _choices(context, self.attribute))  # fmt: skip

    @property
    def value(self) -> Value:
        if self.kind == "number":
            return [round(self.low, 4), round(self.high, 4)]
        return self.choice if self.kind == "choice" else [round(c, 4) for c in self.color]

    @value.setter
    def value(self, value: Value) -> None:
        if isinstance(value, str):
            self.kind, self.choice = "choice", value
        elif isinstance(value, (int, float)):
            self.kind, self.low, self.high = "number", value, value
        elif len(value) == 2:
            self.kind, (self.low, self.high) = "number", value
        else:
            self.kind, self.color = "color", value


class PopulaceCrowdSettings(bpy.types.PropertyGroup):
    """The form for crowds."""

    __annotations__ = {
        **crowd_properties(),
        "surface": PointerProperty(
            name="Surface", description="The mesh to stand on", type=bpy.types.Object,
            poll=lambda self, o: o.type == "MESH" and not o.populace.uuid),
        "curve": PointerProperty(
            name="Curve", description="The curve to stand along", type=bpy.types.Object,
            poll=lambda self, o: o.type == "CURVE"),
        "target": PointerProperty(name="Target", description="What people look at", type=bpy.types.Object),
        "mix": CollectionProperty(type=PopulaceShare),
        "live": BoolProperty(
            name="Live LODs", description="Follow the camera with the levels of detail while it is moved"),
    }  # fmt: skip


def family_of(form: Any) -> Family | None:
    """What is known of the family that the form names; None before the generator was there once."""
    state = tasks.session()
    return state.family(form.family) if state is not None else None


def _choices(context: bpy.types.Context, attribute: str) -> list[str]:
    family = family_of(context.scene.populace_crowd)
    if family is None:
        return []
    known = family.attribute(attribute)
    return list(family.poses if attribute == "pose" else known.choices if known is not None else ())


_items: list[tuple[str, str, str]] = []  # Blender does not keep the strings of an enumeration alive


def _attribute_items(self: Any, context: bpy.types.Context | None) -> list[tuple[str, str, str]]:
    family = family_of(context.scene.populace_crowd) if context is not None else None
    _items[:] = [(a.name, a.title, "One row for each choice, or for parts of its range")
                 for a in (family.attributes if family is not None else ())]  # fmt: skip
    _items.extend([("pose", "Pose", "How they stand"), ("words", "Words", "Anything that a prompt can say")])
    return _items


# ------------------------------------------------------------------------------------------------------------ the mix


class POPULACE_OT_add_share(bpy.types.Operator):
    """Say of how many people what is true: equal shares to begin with"""

    bl_idname = "populace.add_share"
    bl_label = "Add to Mix"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    attribute: EnumProperty(name="Attribute", description="What the shares are about", items=_attribute_items)

    def execute(self, context: bpy.types.Context) -> Result:
        form = context.scene.populace_crowd
        values = _first_values(self.attribute, family_of(form))
        if values and any(row.attribute == self.attribute for row in form.mix):
            values = values[:1]  # one more of what is there
        for value in values:
            add_row(form, self.attribute, value, 100 / len(values))
        return {"FINISHED"}


class POPULACE_OT_remove_share(bpy.types.Operator):
    """Take this row out of the mix"""

    bl_idname = "populace.remove_share"
    bl_label = "Remove from Mix"
    bl_options = {"UNDO", "INTERNAL"}  # noqa: RUF012

    index: IntProperty(options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> Result:
        context.scene.populace_crowd.mix.remove(self.index)
        return {"FINISHED"}


def _first_values(attribute: str, family: Family | None) -> list[Value]:
    """What a mix of this attribute starts with."""
    if attribute == "words":
        return ["red shirt"]
    if attribute == "pose":
        return ["walking", "standing_1"]
    known = family.attribute(attribute) if family is not None else None
    if known is None:
        return []
    if known.kind == "choice":
        return [choice for choice in known.choices if choice != "none"]
    if known.kind == "color":
        return [list(color) for color in COLORS]
    if attribute == "sex":
        return [[known.low, known.low], [known.high, known.high]]
    step = (known.high - known.low) / BANDS
    return [[known.low + step * i, known.low + step * (i + 1)] for i in range(BANDS)]


def add_row(form: Any, attribute: str, value: Value, percent: float) -> None:
    row = form.mix.add()
    family = family_of(form)
    known = family.attribute(attribute) if family is not None else None
    row.attribute = attribute
    row.title = known.title if known is not None else attribute.replace("_", " ").capitalize()
    row.value, row.percent = value, percent


_CLASSES = (PopulaceShare, PopulaceCrowdSettings, POPULACE_OT_add_share, POPULACE_OT_remove_share)


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)
    bpy.types.Scene.populace_crowd = PointerProperty(type=PopulaceCrowdSettings)


def unregister() -> None:
    del bpy.types.Scene.populace_crowd
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
