# SPDX-License-Identifier: GPL-3.0-or-later
"""What is stored in the .blend file: the form's settings on the scene, the recipe of a person on its object."""

from __future__ import annotations

import json
from typing import Any, Final

import bpy
from bpy.props import BoolProperty, EnumProperty, FloatProperty, IntProperty, PointerProperty, StringProperty

from .packet import Human

MAX_SEED: Final = 2**31 - 1  # Blender's integers; the backend takes more
RANDOM_SEEDS: Final = 1_000_000  # numbers that a person can read out
MAX_COUNT: Final = 100
TEXTURE_SIZES: Final = [(str(n), f"{n} px", f"Maps of {n} x {n} pixels") for n in (512, 1024, 2048, 4096)]


def request_properties() -> dict[str, Any]:
    """The annotations that the form and the operator share, so that both have the same names, limits and tooltips."""
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
        "texture_size": EnumProperty(
            name="Textures", description="Size of the base colour and normal maps", items=TEXTURE_SIZES,
            default="1024"),
        "faces": IntProperty(
            name="Faces", description="Triangles of one whole person", min=500, max=2_000_000, soft_max=200_000,
            step=1000, default=30_000),
        "grid_resolution": IntProperty(
            name="Detail", description="Lattice cells along the height when the surface is extracted", min=16, max=512,
            soft_min=64, default=256),
        "family": StringProperty(
            name="Family", description="The kind of generator that makes the people", default="people", maxlen=32),
        "with_rig": BoolProperty(
            name="Rig", description="Add an armature with vertex groups when the family has one", default=True),
    }  # fmt: skip


class PopulaceSettings(bpy.types.PropertyGroup):
    """The create form."""

    __annotations__ = {
        **request_properties(),
        "randomise_seed": BoolProperty(
            name="New Seed Each Time", description="Choose a new seed whenever Generate is pressed", default=True),
    }  # fmt: skip


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
    versions: StringProperty(name="Versions", description="Earlier and later versions of this person, as JSON")
    locked: StringProperty(name="Locked Parts", description="Parts that a re-roll leaves alone, with commas between")
    pose_mark: StringProperty(name="Pose Mark", description="Tells whether the pose was changed by hand")
    part: StringProperty(name="Part", description="Which part of the person this mesh is")

    def fill(self, uuid: str, human: Human) -> None:
        """Take down who this is, after insertion and after every edit."""
        recipe, attributes = human.recipe, human.asset.get("attributes")
        self.uuid = uuid
        self.family = str(recipe.get("family", ""))
        self.seed = str(recipe.get("seed", ""))
        self.weights_sha256 = str(recipe.get("weights_sha256") or "")
        self.backend_version = str(recipe.get("version", ""))
        self.height_m = human.height_m
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.attributes = json.dumps(attributes if isinstance(attributes, dict) else {}, sort_keys=True)


def active_human(context: bpy.types.Context) -> bpy.types.Object | None:
    """The topmost object of the person that the active object belongs to, if it belongs to one."""
    found = context.object
    while found is not None and not found.populace.uuid:
        found = found.parent
    return found


def register() -> None:
    for cls in (PopulaceSettings, PopulaceHuman):
        bpy.utils.register_class(cls)
    bpy.types.Scene.populace = PointerProperty(type=PopulaceSettings)
    bpy.types.Object.populace = PointerProperty(type=PopulaceHuman)


def unregister() -> None:
    del bpy.types.Object.populace
    del bpy.types.Scene.populace
    for cls in (PopulaceHuman, PopulaceSettings):
        bpy.utils.unregister_class(cls)
