# SPDX-License-Identifier: GPL-3.0-or-later
"""What is stored in the .blend file: the form's settings on the scene, the recipe of a person on its object."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any, Final

import bpy
from bpy.props import (
    BoolProperty,
    CollectionProperty,
    EnumProperty,
    FloatProperty,
    IntProperty,
    PointerProperty,
    StringProperty,
)

from . import tasks
from .families import Family
from .messages import PHOTO_POSE
from .packet import Human
from .photo import keeping

MAX_SEED: Final = 2**31 - 1  # Blender's integers; the backend takes more
RANDOM_SEEDS: Final = 1_000_000  # numbers that a person can read out
MAX_COUNT: Final = 100
MAX_VERSIONS: Final = 24  # of one person; each takes about 15 kB of the file
MAPS: Final = [("pbr", "PBR", "Base colour, normal, roughness and metallic"),
               ("color", "Colour Only", "Base colour alone: smaller files")]  # fmt: skip
TEXTURE_SIZES: Final = [(str(n), f"{n} px", f"Maps of {n} x {n} pixels") for n in (512, 1024, 2048, 4096)]


def identity_properties() -> dict[str, Any]:
    """Who is made. As annotations, shared by form and operator: both have the same names, limits and tooltips."""
    return {
        "seed": IntProperty(
            name="Seed", description="The same seed and settings give the same person again", min=0, max=MAX_SEED,
            default=1),
        "count": IntProperty(
            name="Count", description="How many people, with this seed and the ones that follow", min=1, max=MAX_COUNT,
            default=1),
        "truncation_psi": FloatProperty(
            name="Variation", description="How far people may differ from the average: 0 is the average person, "
            "1 the full variety", min=0.0, max=1.5, soft_max=1.0, default=0.7, precision=2),
        "prompt": StringProperty(
            name="Words", description="Who it is, in plain English, such as: tall old woman, red shirt, grey hair",
            maxlen=1000),
        "family": StringProperty(
            name="Family", description="The kind of generator that makes the people", default="people", maxlen=32),
        "mark_asset": BoolProperty(
            name="Mark as Asset", description="Put new people into the asset browser as well"),
    }  # fmt: skip


def output_properties() -> dict[str, Any]:
    """How people are delivered."""
    return {
        "pose": StringProperty(
            name="Pose", description="A pose of the library; rest is the pose for rigging", default="rest",
            search=pose_names, maxlen=63),
        "faces": IntProperty(
            name="Faces", description="Triangles of one whole person", min=500, max=2_000_000, soft_max=200_000,
            step=1000, default=30_000),
        "lods": IntProperty(
            name="Levels of Detail", description="Each further level has a quarter of the faces and comes hidden",
            min=1, max=4, default=1),
        "texture_size": EnumProperty(
            name="Textures", description="Size of the maps", items=TEXTURE_SIZES, default="1024"),
        "maps": EnumProperty(
            name="Maps", description="Which maps the material has", items=MAPS, default="pbr"),
        "separate": BoolProperty(
            name="Separate Garments", description="Clothes and hair as objects of their own"),
        "with_rig": BoolProperty(
            name="Rig", description="Add an armature with vertex groups when the family has one", default=True),
        "grid_resolution": IntProperty(
            name="Detail", description="Lattice cells along the height when the surface is extracted", min=16, max=512,
            soft_min=64, default=256),
        "shape_keys": StringProperty(
            name="Shape Keys", description="Attributes to get shape keys for, with commas between, such as: weight, "
            "muscle. Each gets one for its lower and one for its upper end", search=_numbers, maxlen=400),
    }  # fmt: skip


def request_properties() -> dict[str, Any]:
    return identity_properties() | output_properties()


def output_of(chosen: Any) -> dict[str, Any]:
    """The fields of a request that a form or an operator stands for."""
    names = ("pose", "faces", "lods", "maps", "separate", "grid_resolution")
    keys = [name.strip() for name in chosen.shape_keys.split(",") if name.strip()]
    return {name: getattr(chosen, name) for name in names} | {
        "texture_size": int(chosen.texture_size), "shape_keys": keys}  # fmt: skip


def take_request(chosen: Any, recipe: dict[str, Any]) -> None:
    """Set a form to what a recipe says."""
    for name in request_properties():
        value = recipe.get(name)
        if value is not None:
            text = {"texture_size": str, "shape_keys": ", ".join}.get(name)
            setattr(chosen, name, text(value) if text else value)


def pose_names(settings: Any, context: bpy.types.Context, typed: str) -> list[str]:
    family, root = _family(settings, context), active_human(context)
    poses = [*family.poses] if family is not None else ["rest"]
    if root is not None and root.populace.photo:
        poses.append(PHOTO_POSE)
    return [pose for pose in poses if typed.lower() in pose]


def _numbers(settings: Any, context: bpy.types.Context, typed: str) -> list[str]:
    """What is typed already, with one more attribute."""
    family = _family(settings, context)
    *before, now = (name.strip() for name in typed.split(","))
    names = [a.name for a in family.numbers] if family is not None else []
    return [", ".join((*before, name)) for name in names if name.startswith(now) and name not in before]


def _family(settings: Any, context: bpy.types.Context) -> Family | None:
    session = tasks.session()
    name = getattr(settings, "family", "") or context.scene.populace.family
    return session.family(name) if session is not None else None


class PopulaceSettings(bpy.types.PropertyGroup):
    """The create form."""

    __annotations__ = {
        **request_properties(),
        "randomise_seed": BoolProperty(
            name="New Seed Each Time", description="Choose a new seed whenever Generate is pressed", default=True),
    }  # fmt: skip


class PopulaceVersion(bpy.types.PropertyGroup):
    """What a person was at one time; enough to make exactly that one again."""

    label: StringProperty(name="Label", description="What was done")
    recipe: StringProperty(name="Recipe", description="Everything needed to make this version again, as JSON")
    thumbnail: StringProperty(name="Thumbnail", description="A PNG picture in base64")
    key: StringProperty(name="Key", description="Tells this thumbnail from others")


class PopulaceMap(bpy.types.PropertyGroup):
    """What photos showed of a part: an image that recipes name by the hash of its bytes."""

    sha256: StringProperty(name="Hash", description="Of the PNG's bytes")
    image: PointerProperty(type=bpy.types.Image, name="Image", description="The packed PNG")


class PopulaceHuman(bpy.types.PropertyGroup):
    """Who this is and how to make them again. On the topmost object of a person; empty everywhere else, but for
    `part`, which every mesh of a person has."""

    uuid: StringProperty(name="Id", description="Tells this person from all others")
    family: StringProperty(name="Family", description="The generator family that made this person")
    seed: StringProperty(name="Seed", description="As text, since seeds may be larger than Blender's integers")
    weights_sha256: StringProperty(name="Weights", description="Hash of the weights that made this person")
    backend_version: StringProperty(name="Version", description="Version of the generator that made this person")
    height_m: FloatProperty(name="Height", description="Measured height in metres")
    recipe: StringProperty(name="Recipe", description="Everything needed to make this person again, as JSON")
    attributes: StringProperty(name="Attributes", description="What can be said of this person, as JSON")
    versions: CollectionProperty(type=PopulaceVersion, name="Versions", description="What it was, oldest first")
    locked: StringProperty(name="Locked Parts", description="Parts that a re-roll leaves alone, with commas between")
    pose_mark: StringProperty(name="Pose Mark", description="Tells whether the pose was changed by hand")
    part: StringProperty(name="Part", description="Which part of the person this mesh is")
    maps: CollectionProperty(type=PopulaceMap, name="Photo Maps", description="What photos showed of the parts")
    photo: StringProperty(name="Photo", description="Camera and pose of the photo that it was made from, as JSON")

    def fill(self, uuid: str, human: Human, label: str = "Created") -> None:
        """Take down who this is, after insertion and after every edit; a version that is new is kept."""
        recipe, attributes = human.recipe, human.asset.get("attributes")
        self.uuid = uuid
        self.family = str(recipe.get("family", ""))
        self.seed = str(recipe.get("seed", ""))
        self.weights_sha256 = str(recipe.get("weights_sha256") or "")
        self.backend_version = str(recipe.get("version", ""))
        self.height_m = human.height_m
        if human.maps:
            recipe = {**recipe, keeping.MAPS: keeping.keep(self, human.maps)}
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.photo = json.dumps(photo) if isinstance(photo := human.asset.get("photo"), dict) else self.photo
        self.attributes = json.dumps(attributes if isinstance(attributes, dict) else {}, sort_keys=True)
        if all(version.recipe != self.recipe for version in self.versions):
            if len(self.versions) >= MAX_VERSIONS:
                self.versions.remove(1)  # the first one stays: that is who was made
            version = self.versions.add()
            version.label, version.recipe = label, self.recipe
            if human.thumbnail_png is not None:
                version.thumbnail = base64.b64encode(human.thumbnail_png).decode()
                version.key = thumbnail_key(human.thumbnail_png)
        keeping.prune(self)

    @property
    def whole_recipe(self) -> dict[str, Any]:
        """The recipe as a request wants it. Raises `BackendError` when somebody changed it."""
        return keeping.whole(self, self.recipe)

    def take_over(self, other: PopulaceHuman) -> None:
        """Be what `other` is."""
        for name in ("uuid", "family", "seed", "weights_sha256", "backend_version", "height_m", "recipe", "attributes",
                     "locked", "photo"):  # fmt: skip
            setattr(self, name, getattr(other, name))
        keeping.take_over(self, other)
        for version in other.versions:
            mine = self.versions.add()
            for name in ("label", "recipe", "thumbnail", "key"):
                setattr(mine, name, getattr(version, name))

    @property
    def locked_parts(self) -> list[str]:
        return [part for part in self.locked.split(",") if part]


def thumbnail_key(png: bytes) -> str:
    return hashlib.sha1(png, usedforsecurity=False).hexdigest()


def person_of(found: bpy.types.Object | None) -> bpy.types.Object | None:
    """The topmost object of the person that an object belongs to, if it belongs to one."""
    while found is not None and not found.populace.uuid:
        found = found.parent
    return found


def active_human(context: bpy.types.Context) -> bpy.types.Object | None:
    """The person that the active object belongs to. Timers may have no window, and then no `context.object`."""
    active = getattr(context, "object", None)
    if active is None and context.view_layer is not None:
        active = context.view_layer.objects.active
    return person_of(active)


def other_human(context: bpy.types.Context) -> bpy.types.Object | None:
    """Another selected person than the active one: whom to mix with and to take parts from."""
    active = active_human(context)
    selected = getattr(context, "selected_objects", None) or context.view_layer.objects.selected
    people = (person_of(o) for o in selected)
    return next((person for person in people if person is not None and person != active), None)


def register() -> None:
    for cls in (PopulaceSettings, PopulaceVersion, PopulaceMap, PopulaceHuman):
        bpy.utils.register_class(cls)
    bpy.types.Scene.populace = PointerProperty(type=PopulaceSettings)
    bpy.types.Object.populace = PointerProperty(type=PopulaceHuman)


def unregister() -> None:
    del bpy.types.Object.populace
    del bpy.types.Scene.populace
    for cls in (PopulaceHuman, PopulaceMap, PopulaceVersion, PopulaceSettings):
        bpy.utils.unregister_class(cls)
