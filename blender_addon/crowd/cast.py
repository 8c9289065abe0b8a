# SPDX-License-Identifier: GPL-3.0-or-later
"""A crowd in Blender's data: few people, many placements. Called on the main thread, in Object Mode.

    Crowd                       one collection; its settings are stored on it
      Crowd Placement           an empty per place: it shows one level of one person as a collection instance
      Crowd People              hidden; only what the placements show of it is drawn
        Person 1
          Person 1 LOD0         the mesh of this level, for the render, and the proxy, for the viewport
          Person 1 LOD1

A person's textures are there once, however many places show them. Everything stands from the beginning with a manikin
as proxy; a person who arrives changes nothing but his own collections. Ours are found by keys, never by name.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import bpy
import numpy as np

from .. import scene
from ..messages import Request
from ..packet import Human
from . import placement

CROWD: Final = "populace_crowd"  # on the crowd's collection: its id
SETTINGS: Final = "populace_settings"  # there, too: how it was made, as JSON
PEOPLE: Final = "populace_people"  # on the collection of the people
PERSON: Final = "populace_person"  # on a person's collection and on placements: the person's id
REQUEST: Final = "populace_request"  # on a person's collection: what the generator is asked for, as JSON
LEVEL: Final = "populace_level"  # on the collection of one level of detail
PROXY: Final = "populace_proxy"  # on the object that stands for a person in the viewport, and on the manikin's mesh
PLACEMENT: Final = "populace_placement"  # on an empty: its number
OWN: Final = "populace_own"  # on a placement whose person was chosen by hand, on a person made for one placement
HEIGHT_M: Final = 1.75  # of the manikin
STANDING: Final = ("standing_1", "standing_2", "standing_3", "standing_4", "contrapposto", "arms_down")
WALKING: Final = ("walking", "walking_2")
POSES: Final = {"STANDING": STANDING, "WALKING": WALKING, "MIXED": STANDING + WALKING, "REST": ("rest",)}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Arrival:
    """What a job of a crowd is for, see `tasks.Target`. Ids, since undo and loading a file may take away what they
    name."""

    crowd: str
    person: str
    label: str
    operator: str

    def apply(self, context: bpy.types.Context, human: Human) -> str:
        return "" if arrive(context, human, self) else "Its crowd is not in this file any more"


# ------------------------------------------------------------------------------------------------------------- reading


def crowds(within: bpy.types.Scene) -> list[bpy.types.Collection]:
    return [c for c in within.collection.children_recursive if CROWD in c]


def find(within: bpy.types.Scene, crowd_id: str) -> bpy.types.Collection | None:
    return next((c for c in crowds(within) if c[CROWD] == crowd_id), None)


def active(context: bpy.types.Context) -> bpy.types.Collection | None:
    """The crowd of the active object, of the active collection, or the only one."""
    found = crowds(context.scene)
    for crowd in found if context.object is not None else ():
        if context.object.name in crowd.objects:
            return crowd
    for crowd in found:
        if context.collection in (crowd, *crowd.children_recursive):
            return crowd
    return found[0] if len(found) == 1 else None


def placements(crowd: bpy.types.Collection) -> list[bpy.types.Object]:
    """In the order of their numbers; copies that the user made come too."""
    return sorted((o for o in crowd.objects if PLACEMENT in o), key=lambda o: o[PLACEMENT])


def people(crowd: bpy.types.Collection) -> list[bpy.types.Collection]:
    return [c for c in _pool(crowd).children if PERSON in c]


def is_here(person: bpy.types.Collection) -> bool:
    """Whether the person has arrived."""
    return any(o.populace.uuid for o in person.all_objects)


def missing(crowd: bpy.types.Collection) -> list[bpy.types.Collection]:
    return [person for person in people(crowd) if not is_here(person)]


def settings(crowd: bpy.types.Collection) -> dict[str, Any]:
    """How the crowd was made. Raises ValueError if somebody wrote something else there."""
    found = json.loads(crowd[SETTINGS])
    if not isinstance(found, dict):
        raise ValueError("not settings")
    return found


def display(crowd: bpy.types.Collection) -> str:
    """How the viewport shows it; "" if its settings cannot be read."""
    try:
        return str(settings(crowd).get("display", ""))
    except (ValueError, KeyError):
        return ""


def request(person: bpy.types.Collection) -> Request:
    return Request(**json.loads(person[REQUEST]))


def _pool(crowd: bpy.types.Collection) -> bpy.types.Collection:
    return next(c for c in crowd.children if PEOPLE in c)


def _levels(person: bpy.types.Collection) -> list[bpy.types.Collection]:
    return sorted((c for c in person.children if LEVEL in c), key=lambda c: c[LEVEL])


# ------------------------------------------------------------------------------------------------------------ planning


def requests(asked: Mapping[str, Any]) -> list[Request]:
    """One per person of the crowd. Who gets a pose by the mix keeps it; the rest share those of the chosen set."""
    count, seed = asked["people"], asked["seed"]
    shares = [placement.Share(row["attribute"], row["value"], row["percent"]) for row in asked["mix"]]
    dealt = placement.deal(shares, count, seed)
    poses = POSES[asked["poses"]]
    random = placement.stream(seed, "poses")
    rounds = [random.permutation(len(poses)).tolist() for _ in range(-(-count // len(poses)))]
    posed = [poses[i] for turn in rounds for i in turn]  # more people change nothing for the first ones
    return [
        Request(seed=seed + i, family=asked["family"], truncation_psi=asked["truncation_psi"],
                edits=placement.edits(values), pose=str(values.get("pose", posed[i])),
                grid_resolution=asked["grid_resolution"], faces=asked["faces"], lods=asked["lods"],
                texture_size=int(asked["texture_size"]), maps=asked["maps"])
        for i, values in enumerate(dealt)
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- making


def make(context: bpy.types.Context, asked: Mapping[str, Any], places: placement.Spots, turns: Array,
         crowd: bpy.types.Collection | None = None) -> bpy.types.Collection:  # fmt: skip
    """A new crowd, or `crowd` as these settings want it: people whom they leave as they are stay, so do those chosen
    by hand for a placement. Nobody is generated here: see `missing`. On an error nothing new is left behind."""
    stage = scene.Stage()
    try:
        if crowd is None:
            crowd = stage.new(bpy.data.collections, "Crowd")
            crowd[CROWD] = uuid.uuid4().hex
            pool = stage.new(bpy.data.collections, "Crowd People")
            pool[PEOPLE] = True
            pool.hide_viewport = pool.hide_render = True
            pool[PROXY] = _manikin(stage, scene.units_per_metre(context))
            crowd.children.link(pool)
        wanted = requests(asked)
        known = {person[REQUEST]: person for person in people(crowd) if OWN not in person}
        cast = [known.pop(_key(want), None) or _new_person(stage, crowd, want, i + 1, asked["display"])
                for i, want in enumerate(wanted)]  # fmt: skip
        who = placement.assign(places.points, len(cast), asked["seed"])
        old = placements(crowd)
        for i, (point, turn) in enumerate(zip(places.points.tolist(), turns.tolist())):
            place = old[i] if i < len(old) else _new_placement(stage, crowd, i)
            place.location, place.rotation_euler = point, (0.0, 0.0, turn)
            if OWN not in place:
                show(place, cast[who[i]])
        crowd[SETTINGS] = json.dumps(dict(asked), sort_keys=True)
        if crowd not in crowds(context.scene):
            context.scene.collection.children.link(crowd)
    except BaseException:
        stage.roll_back()
        raise
    for place in old[len(places) :]:
        bpy.data.objects.remove(place)
    in_use = {place[PERSON] for place in placements(crowd)}
    kept = {person[PERSON] for person in cast} | in_use
    discard(person for person in people(crowd) if person[PERSON] not in kept)
    set_display(crowd, asked["display"])
    context.view_layer.update()  # else new placements are still at the origin
    update_levels(context, crowd)
    return crowd


def new_person_for(crowd: bpy.types.Collection, place: bpy.types.Object, seed: int) -> bpy.types.Collection:
    """Somebody of another seed for one placement, with the same share of the mix. Shown as a manikin at first."""
    now = _person_of(crowd, place)
    want = {**json.loads(now[REQUEST]), "seed": seed}
    stage = scene.Stage()
    try:
        number = 1 + max((c.get("populace_number", 0) for c in people(crowd)), default=0)
        made = _new_person(stage, crowd, Request(**want), number, settings(crowd)["display"])
    except BaseException:
        stage.roll_back()
        raise
    made[OWN] = True
    give(crowd, place, made)
    discard_idle(crowd, now)  # as many people as before, if this was the only place
    return made


def give(crowd: bpy.types.Collection, place: bpy.types.Object, person: bpy.types.Collection) -> None:
    """Let somebody else of the crowd stand here."""
    before = _person_of(crowd, place)
    place[OWN] = True
    show(place, person, _level_of(place))
    if OWN in before:  # one of the cast stays: stepping through everybody comes back to him
        discard_idle(crowd, before)


def discard_idle(crowd: bpy.types.Collection, person: bpy.types.Collection) -> None:
    """Take somebody out who stands nowhere."""
    if person in people(crowd) and all(place[PERSON] != person[PERSON] for place in placements(crowd)):
        discard([person])


def show(place: bpy.types.Object, person: bpy.types.Collection, level: int = 0) -> None:
    shown = _levels(person)
    place[PERSON] = person[PERSON]
    wanted = shown[min(level, len(shown) - 1)]
    if place.instance_collection != wanted:
        place.instance_collection = wanted


def arrive(context: bpy.types.Context, human: Human, arrival: Arrival) -> bool:
    """Give a person of a crowd body and clothes. False if crowd or person are gone: nothing is changed then."""
    crowd = find(context.scene, arrival.crowd)
    person = next((c for c in people(crowd) if c[PERSON] == arrival.person), None) if crowd is not None else None
    if crowd is None or person is None:
        return False
    stage = scene.Stage()
    try:
        root, objects = scene.build(context, stage, human, with_rig=False)
        levels = _levels(person)
        for made, part in zip(objects, human.parts):
            level = min(part.lod, len(levels) - 1)
            made.parent = None
            made.name = made.data.name = f"{person.name} LOD{level}"
            levels[level].objects.link(made)
        objects[0].populace.fill(uuid.uuid4().hex, human)
    except BaseException:
        stage.roll_back()
        raise
    if root not in objects:
        bpy.data.objects.remove(root)
    _discard_objects(o for o in person.all_objects if o not in objects and PROXY not in o)  # of an earlier arrival
    _show_proxy(crowd, person, settings(crowd)["display"])
    return True


def set_display(crowd: bpy.types.Collection, wanted: str) -> None:
    """How the viewport shows people: FULL by level of detail, LIGHT by the coarsest level, BOX as manikins."""
    for person in people(crowd):
        _show_proxy(crowd, person, wanted)
    crowd[SETTINGS] = json.dumps({**settings(crowd), "display": wanted}, sort_keys=True)


def update_levels(context: bpy.types.Context, crowd: bpy.types.Collection) -> int:
    """Give every placement the level of detail for its distance to the scene's camera. Returns how many changed."""
    camera, placed = context.scene.camera, placements(crowd)
    asked = settings(crowd)
    if camera is None or not placed:
        return 0
    points = np.array([place.matrix_world.translation for place in placed])
    first = asked["lod_distance"] * scene.units_per_metre(context)
    wanted = placement.levels(points, np.array(camera.matrix_world.translation), first, asked["lods"]).tolist()
    by_id = {person[PERSON]: _levels(person) for person in people(crowd)}
    changed = 0
    for place, level in zip(placed, wanted):
        shown = by_id.get(place.get(PERSON, ""))
        if shown and place.instance_collection != (target := shown[min(level, len(shown) - 1)]):
            place.instance_collection = target
            changed += 1
    return changed


def remove(crowd: bpy.types.Collection) -> None:
    """All of it: placements, people, meshes, materials, images. Objects that the user put into it stay in the scene."""
    pool = _pool(crowd)
    manikin = pool.get(PROXY)
    strangers = [o for o in crowd.objects if PLACEMENT not in o]
    for o in strangers:
        if len(o.users_collection) == 1:
            bpy.context.scene.collection.objects.link(o)
    bpy.data.batch_remove(placements(crowd))
    discard(people(crowd))
    bpy.data.batch_remove([pool, crowd])
    if manikin is not None and not manikin.users:
        bpy.data.meshes.remove(manikin)


def discard(persons: Iterable[bpy.types.Collection]) -> None:
    """Take people out of the file, with whatever nobody else uses of them."""
    for person in list(persons):
        _discard_objects(person.all_objects)
        bpy.data.batch_remove([*person.children, person])


def _discard_objects(objects: Iterable[bpy.types.Object]) -> None:
    gone = list(objects)
    meshes = {o.data for o in gone if isinstance(o.data, bpy.types.Mesh) and PROXY not in o.data}
    materials = {m for mesh in meshes for m in mesh.materials if m is not None}
    images = {node.image for m in materials if m.node_tree is not None for node in m.node_tree.nodes
              if isinstance(node, bpy.types.ShaderNodeTexImage) and node.image is not None}  # fmt: skip
    bpy.data.batch_remove(gone)
    for group in (meshes, materials, images):  # in the order in which they let go of each other
        bpy.data.batch_remove([data for data in group if not data.users])


# -------------------------------------------------------------------------------------------------------------- pieces


def _key(want: Request) -> str:
    return json.dumps(want.to_json(), sort_keys=True)


def _new_person(stage: scene.Stage, crowd: bpy.types.Collection, want: Request, number: int,
                shown: str) -> bpy.types.Collection:  # fmt: skip
    """Collections for all levels with the proxy in each, so that an arrival moves no placement."""
    person = stage.new(bpy.data.collections, f"Person {number}")
    person[PERSON] = uuid.uuid4().hex
    person[REQUEST] = _key(want)
    person["populace_number"] = number
    proxy = stage.new(bpy.data.objects, f"Person {number} Proxy", _pool(crowd)[PROXY])
    proxy[PROXY] = True
    proxy.hide_render = True
    for level in range(want.lods):
        made = stage.new(bpy.data.collections, f"Person {number} LOD{level}")
        made[LEVEL] = level
        made.objects.link(proxy)
        person.children.link(made)
    _pool(crowd).children.link(person)
    _show_proxy(crowd, person, shown)
    return person


def _new_placement(stage: scene.Stage, crowd: bpy.types.Collection, number: int) -> bpy.types.Object:
    place = stage.new(bpy.data.objects, "Crowd Placement", None)
    place[PLACEMENT] = number
    place.instance_type = "COLLECTION"
    place.empty_display_type = "ARROWS"
    place.empty_display_size = 0.05
    place.show_in_front = False
    crowd.objects.link(place)
    return place


def _show_proxy(crowd: bpy.types.Collection, person: bpy.types.Collection, wanted: str) -> None:
    """Full meshes or the proxy; the proxy is the coarsest mesh or the manikin in the person's size."""
    bodies = [o for o in person.all_objects if PROXY not in o]
    proxy = next(o for o in person.all_objects if PROXY in o)
    is_full = wanted == "FULL" and bool(bodies)
    for body in bodies:
        body.hide_viewport, body.hide_render = not is_full, False
    proxy.hide_viewport = is_full
    coarsest = [o for o in _levels(person)[-1].objects if PROXY not in o]
    manikin = _pool(crowd)[PROXY]
    data = coarsest[0].data if wanted != "BOX" and len(coarsest) == 1 else manikin
    if proxy.data != data:
        proxy.data = data
    height = next((o.populace.height_m for o in bodies if o.populace.uuid), HEIGHT_M)
    proxy.scale = (1.0, 1.0, height / HEIGHT_M if data == manikin else 1.0)


def _person_of(crowd: bpy.types.Collection, place: bpy.types.Object) -> bpy.types.Collection:
    return next(person for person in people(crowd) if person[PERSON] == place[PERSON])


def _level_of(place: bpy.types.Object) -> int:
    return place.instance_collection.get(LEVEL, 0) if place.instance_collection is not None else 0


def _manikin(stage: scene.Stage, units: float) -> bpy.types.Mesh:
    """Legs, trunk and head as boxes, and a nose, so that one sees who looks where."""
    boxes = [((-0.15, -0.09, 0.0), (0.15, 0.09, 0.85)), ((-0.22, -0.11, 0.85), (0.22, 0.11, 1.48)),
             ((-0.08, -0.1, 1.52), (0.08, 0.1, HEIGHT_M)), ((-0.02, -0.14, 1.6), (0.02, -0.1, 1.66))]  # fmt: skip
    unit = np.array([(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)])
    sides = np.array([(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5)])
    corners = np.concatenate([low + unit * (np.array(high) - low) for low, high in np.array(boxes)]) * units
    mesh = stage.new(bpy.data.meshes, "Crowd Proxy")
    mesh.from_pydata(corners.tolist(), [], np.concatenate([sides + 8 * i for i in range(len(boxes))]).tolist())
    mesh[PROXY] = True
    return mesh
