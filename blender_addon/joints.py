# SPDX-License-Identifier: GPL-3.0-or-later
"""Bones and clothes follow the shape keys of a person: knees bend where the taller person has them.

The packet says where the joints of a person at each key are. In rest nothing moves but the mesh; a posed bone has to
turn about the joint's new place instead of its own head. A pivot constraint does exactly that, whatever turns the bone:
with R the bone's rotation and d the way from its head to the new place, it adds (I - R) d to the bone's location. d is
driven by the values of the keys. The keys of the first mesh are the ones to move: coarser levels of detail and garments
have theirs driven by them. How far a key lifts the person in the packet's pose is driven into the delta location of the
armature, since locations of bones and objects are the user's own.

Drivers are simple expressions, so they need no permission to run Python, and are fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import bpy
import numpy as np
from mathutils import Vector

from .packet import Rig

NAME: Final = "Joint of Shape Keys"
LEAST_M: Final = 1e-5  # that a joint has to move
MAX_EXPRESSION: Final = 255  # bytes that Blender has room for

Array = np.ndarray[Any, Any]


def follow(
    armature: bpy.types.Object | None, objects: Sequence[bpy.types.Object], rig: Rig | None, units: float
) -> None:
    """Set all drivers for a person just built: bones, lift and the keys of every mesh but the first."""
    leader = next((o.data.shape_keys for o in objects if o.data.shape_keys is not None), None)
    if leader is None:
        return
    for made in objects:
        keys = made.data.shape_keys
        if keys is not None and keys != leader:
            for key in keys.key_blocks[1:]:
                _drive(key, "value", -1, {key.name: 1.0}, leader)
    if armature is None or rig is None or not rig.key_heads:
        return
    for j, name in enumerate(rig.names):
        bone = armature.pose.bones[name]
        moves = {key: rig.key_heads[key][j] for key in rig.key_heads}
        if max(np.abs(move).max() for move in moves.values()) < LEAST_M:
            continue
        pivot = bone.constraints.new("PIVOT")
        pivot.name, pivot.owner_space, pivot.rotation_range = NAME, "LOCAL", "ALWAYS_ACTIVE"
        own = bone.bone.matrix_local.to_3x3().inverted()
        local = {key: own @ _turned(move, units) for key, move in moves.items()}
        for axis in range(3):
            _drive(pivot, "offset", axis, {key: move[axis] for key, move in local.items()}, leader, LEAST_M * units)
    lifts = {key: _turned(move, units)[2] for key, move in rig.key_translation.items()}
    _drive(armature, "delta_location", 2, lifts, leader, LEAST_M * units)


def hand_over(made: bpy.types.Object, armature: bpy.types.Object) -> None:
    """Let `armature`, which has the bones of `made` from now on, follow what `made` followed, and nothing else."""
    let_go(armature)
    for bone in made.pose.bones:
        for pivot in (c for c in bone.constraints if c.name == NAME):
            mine = armature.pose.bones[bone.name].constraints.copy(pivot)
            mine.name = NAME
    for curve in made.animation_data.drivers if made.animation_data is not None else ():
        animation = armature.animation_data or armature.animation_data_create()
        animation.drivers.from_existing(src_driver=curve)


def let_go(armature: bpy.types.Object) -> None:
    """Remove every constraint and driver of ours from an armature."""
    for bone in armature.pose.bones:
        for pivot in [c for c in bone.constraints if c.type == "PIVOT" and c.name.startswith(NAME)]:
            bone.constraints.remove(pivot)
    animation = armature.animation_data
    for curve in list(animation.drivers) if animation is not None else ():
        if NAME in curve.data_path or (curve.data_path == "delta_location" and curve.driver.variables.get("k0")):
            animation.drivers.remove(curve)
    armature.delta_location[2] = 0.0


def _turned(move: Array, units: float) -> Vector:
    """A step in the packet's axes -> Blender's, in scene units."""
    x, y, z = (move * units).tolist()
    return Vector((x, -z, y))


def _drive(
    owner: Any, name: str, index: int, shares: Mapping[str, float], leader: bpy.types.Key, least: float = 0.0
) -> None:
    """owner.name[index] = sum of shares x values of the leader's keys, the largest ones first."""
    rows = sorted(((key, share) for key, share in shares.items() if abs(share) > least), key=lambda row: -abs(row[1]))
    if not rows:
        return
    driver = (owner.driver_add(name) if index < 0 else owner.driver_add(name, index)).driver
    driver.type, terms = "SCRIPTED", []
    for i, (key, share) in enumerate(rows):
        term = f"k{i}*{share:.5g}"
        if len("+".join((*terms, term))) > MAX_EXPRESSION:
            break
        terms.append(term)
        variable = driver.variables.new()
        variable.name = f"k{i}"
        target = variable.targets[0]
        target.id_type, target.id = "KEY", leader
        target.data_path = f'key_blocks["{bpy.utils.escape_identifier(key)}"].value'
    driver.expression = "+".join(terms)
