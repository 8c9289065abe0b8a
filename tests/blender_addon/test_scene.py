# SPDX-License-Identifier: GPL-3.0-or-later
"""What stands in the scene after an insertion, and that nothing is left after a failed or undone one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.blender_addon import making

COLLECTIONS = ("objects", "meshes", "materials", "images", "armatures", "collections", "scenes", "node_groups",
               "actions", "textures", "worlds", "shape_keys")  # fmt: skip


def counts(bpy: Any) -> dict[str, int]:
    return {name: len(getattr(bpy.data, name)) for name in COLLECTIONS}


def insert(addon: SimpleNamespace, data: bytes, index: int = 0, **batch: Any) -> Any:
    human = addon.packet.read(data)
    made = addon.scene.Batch(**({"name": "Humans", "count": 1, "location": (0.0, 0.0, 0.0)} | batch))
    return addon.scene.insert(addon.bpy.context, human, made, index)[0]


def read(collection: Any, name: str, width: int, kind: type = np.float32) -> Any:
    values = np.empty(len(collection) * width, kind)
    collection.foreach_get(name, values)
    return values.reshape(-1, width)


def test_mesh_is_the_packets_mesh_to_the_bit(addon: SimpleNamespace) -> None:
    root = insert(addon, making.packet(rig=False))
    part, mesh = making.ball(), root.data
    x, y, z = part["vertices"].T
    assert np.array_equal(read(mesh.vertices, "co", 3), np.stack([x, -z, y], 1))
    assert np.array_equal(read(mesh.loops, "vertex_index", 1, np.int32).reshape(-1, 3), part["faces"])
    assert np.array_equal(read(mesh.uv_layers["UVMap"].uv, "vector", 2), part["uvs"][part["face_uvs_idx"].ravel()])
    nx, ny, nz = part["normals"].T
    normals = np.stack([nx, -nz, ny], 1)[part["faces"].ravel()]
    assert np.allclose(read(mesh.corner_normals, "vector", 3), normals, atol=1e-5)
    assert not mesh.validate(verbose=False), "Blender found something to correct"
    edges = Counter(tuple(sorted(edge)) for a, b, c in part["faces"].tolist() for edge in ((a, b), (b, c), (c, a)))
    assert set(edges.values()) == {2}
    assert len(mesh.edges) == len(edges)
    assert all(polygon.use_smooth for polygon in mesh.polygons)


def test_outside_is_outside(addon: SimpleNamespace) -> None:
    """Turning the axes keeps the winding: Blender's own face normals point away from the middle."""
    mesh = insert(addon, making.packet(rig=False)).data
    centre = read(mesh.vertices, "co", 3).mean(0)
    away = read(mesh.polygons, "center", 3) - centre
    assert ((away * read(mesh.polygons, "normal", 3)).sum(1) > 0).all()


def test_material_is_complete_and_the_file_carries_its_textures(addon: SimpleNamespace, tmp_path: Path) -> None:
    root = insert(addon, making.packet(rig=False, texture=32))
    material = root.data.materials[0]
    nodes, links = material.node_tree.nodes, material.node_tree.links
    joined = {(link.from_node.name, link.from_socket.name, link.to_node.name, link.to_socket.name) for link in links}
    assert joined == {
        ("Base Color", "Color", "Principled BSDF", "Base Color"), ("Normal", "Color", "Normal Map", "Color"),
        ("ORM", "Color", "Roughness and Metallic", "Color"),
        ("Roughness and Metallic", "Green", "Principled BSDF", "Roughness"),
        ("Roughness and Metallic", "Blue", "Principled BSDF", "Metallic"),
        ("Normal Map", "Normal", "Principled BSDF", "Normal"), ("Principled BSDF", "BSDF", "Output", "Surface"),
    }  # fmt: skip
    assert nodes.active == nodes["Base Color"]
    assert nodes["Base Color"].image.colorspace_settings.name == "sRGB"
    assert nodes["Normal"].image.colorspace_settings.name == "Non-Color"
    assert nodes["ORM"].image.colorspace_settings.name == "Non-Color"
    path = str(tmp_path / "saved ö 中.blend")
    addon.bpy.ops.wm.save_as_mainfile(filepath=path)
    addon.bpy.ops.wm.open_mainfile(filepath=path)
    nodes = addon.bpy.data.objects["Human"].data.materials[0].node_tree.nodes
    for name, key in (("Base Color", "base_color.png"), ("Normal", "normal.png"), ("ORM", "orm.png")):
        image = nodes[name].image
        assert bytes(image.packed_file.data) == making.ball(texture=32)[key].tobytes()
        assert tuple(image.size) == (32, 32)
    pixel = np.array(nodes["Base Color"].image.pixels[:3])
    assert np.abs(pixel * 255 - (200, 120, 90)).max() < 1


def test_a_person_with_colour_alone_has_one_map_and_one_roughness(addon: SimpleNamespace) -> None:
    part = {name: array for name, array in making.ball(4).items() if name not in ("normal.png", "orm.png")}
    root = insert(addon, making.pack(making.tensors([part], rig=False), making.meta(rig=False)))
    nodes = root.data.materials[0].node_tree.nodes
    assert set(nodes.keys()) == {"Output", "Principled BSDF", "Base Color"}
    assert nodes["Principled BSDF"].inputs["Roughness"].default_value == pytest.approx(addon.scene.ROUGHNESS)


KEYS = np.stack([making.ball(6)["vertices"] * np.float32([0, -0.5, 0]), 0.1 * making.ball(6)["normals"]])


def keyed() -> bytes:
    """A posed person with two shape keys: half as tall, and 10 cm thicker."""
    meta = {**making.meta(), "shape_keys": ["height_m_min", "weight_max"]}
    return making.pack(making.tensors([making.ball(6) | {"shape_keys": KEYS}], posed=True), meta)


@pytest.mark.parametrize("with_rig", [True, False])
def test_shape_keys_are_blenders_and_stand_at_zero(addon: SimpleNamespace, with_rig: bool) -> None:
    """Without an armature they are those of the posed mesh."""
    data, part = keyed(), making.ball(6) | {"shape_keys": KEYS}
    human = addon.packet.read(data)
    root = insert(addon, data, with_rig=with_rig)
    body = root.children[0] if with_rig else root
    keys = body.data.shape_keys.key_blocks
    assert keys.keys() == ["Basis", "height_m_min", "weight_max"]
    assert [key.value for key in keys[1:]] == [0, 0]
    assert (keys[1].slider_min, keys[1].slider_max) == (0, 1)
    for key, value in ((0, 0.0), (1, 0.5), (0, 1.0)):
        keys[key + 1].value = value
        addon.bpy.context.view_layer.update()
        moved = replace(human.parts[0], vertices=part["vertices"] + value * part["shape_keys"][key])
        x, y, z = addon.posing.posed(moved, human.rig).T
        wanted = np.stack([x, -z, y], 1)
        assert np.abs(evaluated(addon, body) - wanted).max() < 1e-4
        shown = body.evaluated_get(addon.bpy.context.evaluated_depsgraph_get()).data
        seen = read(shown.corner_normals, "vector", 3)  # they turn with bones and keys
        assert np.abs(seen - making.normals(wanted, part["faces"])[part["faces"].ravel()]).max() < 1e-3
        keys[key + 1].value = 0.0
    if with_rig:  # the rest mesh to the bit, and the armature still there
        x, y, z = (part["vertices"] + part["shape_keys"][0]).T
        assert np.array_equal(read(keys["height_m_min"].data, "co", 3), np.stack([x, -z, y], 1))
        assert [m.type for m in body.modifiers] == ["ARMATURE"]


KEY_HEADS = np.float32([[(0, 0, 0), (0.02, -0.5, 0.1), (0.1, -0.9, 0)], [(0, 0, 0), (0.2, 0, 0.1), (0, 0.1, 0)]])
LIFTS = np.float32([(0, 0.25, 0), (0, -0.125, 0)])


def jointed(rings: int = 6) -> bytes:
    """A posed person of two garments and two levels of detail, whose joints go with the keys."""
    balls = [making.ball(n) for n in (rings, rings, 4, 4)]
    moves = [np.stack([b["vertices"] * np.float32([0, -0.5, 0]), 0.1 * b["normals"]]) for b in balls]
    meta = {**making.meta(4), "shape_keys": ["height_m_min", "weight_max"]}
    meta["parts"] = [{"name": "body"}, {"name": "top"},
                     {"name": "body_LOD1", "lod": 1}, {"name": "top_LOD1", "lod": 1}]  # fmt: skip
    arrays = making.tensors([b | {"shape_keys": m} for b, m in zip(balls, moves)], posed=True)
    return making.pack(arrays | {"rig/key_heads": KEY_HEADS, "rig/key_translation": LIFTS}, meta)


def test_bones_garments_and_levels_follow_the_shape_keys(addon: SimpleNamespace) -> None:
    """Every mesh stands at any value of the first one's keys as the skinning of that body with its own joints says, in
    any scene units; a bone that is turned later turns about the joint as well; the bones' channels are the user's."""
    for scale in (1.0, 0.01):
        addon.bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
        addon.bpy.context.scene.unit_settings.scale_length = scale
        human = addon.packet.read(jointed())
        root = insert(addon, jointed())
        parts = {part.name: part for part in human.parts}
        bodies = {child.populace.part: child for child in root.children}
        for child in bodies.values():
            child.hide_viewport = False  # else it is not evaluated
        keys = bodies["body"].data.shape_keys.key_blocks
        moved_later = root.pose.bones["head"]
        assert all(bone.location.length == 0 for bone in root.pose.bones if bone.parent is not None)
        for tall, thick in ((0, 0), (0.5, 0), (1, 0), (0.3, 0.8)):
            keys["height_m_min"].value, keys["weight_max"].value = tall, thick
            addon.bpy.context.view_layer.update()
            amounts = np.float32([tall, thick])
            rig = replace(human.rig, heads=human.rig.heads + np.einsum("k,kji->ji", amounts, KEY_HEADS),
                          translation=human.rig.translation + amounts @ LIFTS)  # fmt: skip
            for name, body in bodies.items():
                moves = np.einsum("k,kvi->vi", amounts, np.stack(list(parts[name].shape_keys.values())))
                x, y, z = addon.posing.posed(replace(parts[name], vertices=parts[name].vertices + moves), rig).T
                wanted = np.stack([x, -z, y], 1) / scale
                assert np.abs(evaluated(addon, body) - wanted).max() < 3e-4 / scale, (name, tall, thick)
        keys["height_m_min"].value, keys["weight_max"].value = 1, 0
        rotations = human.rig.rotations.copy()
        rotations[2] = 1, 0, 0, 0
        moved_later.rotation_quaternion = 1, 0, 0, 0
        addon.bpy.context.view_layer.update()
        rig = replace(human.rig.at_key("height_m_min"), rotations=rotations)
        part = replace(parts["body"], vertices=parts["body"].vertices + parts["body"].shape_keys["height_m_min"])
        x, y, z = addon.posing.posed(part, rig).T
        assert np.abs(evaluated(addon, bodies["body"]) - np.stack([x, -z, y], 1) / scale).max() < 3e-4 / scale
    drivers = root.animation_data.drivers
    assert all(curve.driver.is_valid and curve.driver.is_simple_expression for curve in drivers)


def test_joints_of_a_replaced_person_are_the_new_ones(addon: SimpleNamespace) -> None:
    """Edits exchange meshes and bones of the same objects; nothing follows the old keys, and without keys nothing is
    left of it."""
    root = insert(addon, jointed())
    before = {curve.data_path for curve in root.animation_data.drivers}
    addon.replacing.replace(addon.bpy.context, root, addon.packet.read(jointed(8)), True)
    assert {curve.data_path for curve in root.animation_data.drivers} == before
    leader = next(c for c in root.children if c.populace.part == "body").data.shape_keys
    used = [v for curve in root.animation_data.drivers for v in curve.driver.variables]
    assert {target.id for variable in used for target in variable.targets} == {leader}
    assert [len(bone.constraints) for bone in root.pose.bones] == [0, 1, 1], "the first joint does not move"
    body = next(c for c in root.children if c.populace.part == "body")
    body.data.shape_keys.key_blocks["height_m_min"].value = 1.0
    human = addon.packet.read(jointed(8))
    part = replace(human.parts[0], vertices=human.parts[0].vertices + human.parts[0].shape_keys["height_m_min"])
    x, y, z = addon.posing.posed(part, human.rig.at_key("height_m_min")).T
    addon.bpy.context.view_layer.update()
    assert np.abs(evaluated(addon, body) - np.stack([x, -z, y], 1)).max() < 3e-4
    addon.replacing.replace(addon.bpy.context, root, addon.packet.read(making.packet()), True)
    assert not list(root.animation_data.drivers)
    assert not any(bone.constraints for bone in root.pose.bones)
    assert root.delta_location.length == 0


def test_feet_stand_at_the_cursor_in_the_scenes_units(addon: SimpleNamespace) -> None:
    addon.bpy.context.scene.unit_settings.scale_length = 0.01  # centimetres
    part = making.ball()
    part["vertices"] = part["vertices"] - np.float32([0, 0.25, 0])  # soles below the packet's floor
    data = making.pack(making.tensors([part]), making.meta())
    root = insert(addon, data, location=(5.0, 6.0, 7.0))
    addon.bpy.context.view_layer.update()
    mesh = next(child for child in root.children if child.type == "MESH")
    world = np.array([mesh.matrix_world @ v.co for v in mesh.data.vertices])
    assert world[:, 2].min() == pytest.approx(7.0, abs=1e-4)
    assert np.ptp(world[:, 2]) == pytest.approx(180, rel=1e-4)
    assert world[:, :2].mean(0) == pytest.approx([5, 6], abs=0.1)
    assert tuple(root.scale) == (1, 1, 1)
    assert root.populace.height_m == pytest.approx(1.8)


def test_a_person_is_put_on_the_face_under_the_mouse(addon: SimpleNamespace) -> None:
    """The ray of a click passes the person's own faces and stops at the first other one; the move is an operator."""
    import importlib

    from mathutils import Matrix, Vector

    placing = importlib.import_module(f"{addon.scene.__package__}.placing")
    bpy = addon.bpy
    root = insert(addon, making.packet(rings=6))
    bpy.ops.mesh.primitive_plane_add(size=10, location=(0, 0, 0.25))
    bpy.ops.mesh.primitive_plane_add(size=10, location=(0, 0, -3))
    root.matrix_world = Matrix.Rotation(0.5, 4, "Z")
    bpy.context.view_layer.update()
    down = Vector((0, 0, -1))
    place = placing.point_under(bpy.context, Vector((0.1, 0.2, 5)), down, root)
    assert place[:] == pytest.approx((0.1, 0.2, 0.25))
    assert placing.point_under(bpy.context, Vector((0, 0, 5)), -down, root) is None
    bpy.context.view_layer.objects.active = root.children[0]
    assert bpy.ops.populace.stand_at("EXEC_DEFAULT", True, location=place) == {"FINISHED"}
    assert root.matrix_world.translation[:] == pytest.approx((0.1, 0.2, 0.25))
    assert root.matrix_world.to_euler().z == pytest.approx(0.5), "turned as before"
    assert addon.snippets.last[-1].startswith("bpy.ops.populace.stand_at(location=")
    with pytest.raises(RuntimeError, match="stand_at"):
        bpy.ops.populace.place_human()


def test_a_click_on_the_sidebar_places_nobody(addon: SimpleNamespace) -> None:
    """The sidebar lies over the view: what is behind it was not meant. A region that is folded up hides nothing."""
    import importlib

    from mathutils import Matrix

    placing = importlib.import_module(f"{addon.scene.__package__}.placing")
    view = SimpleNamespace(view_matrix=Matrix(), perspective_matrix=Matrix(), is_perspective=True)
    regions = [SimpleNamespace(type=kind, x=x, y=0, width=width, height=500)
               for kind, x, width in (("WINDOW", 0, 800), ("UI", 600, 200), ("TOOLS", 0, 1))]  # fmt: skip
    spaces = SimpleNamespace(active=SimpleNamespace(region_3d=view))
    area = SimpleNamespace(type="VIEW_3D", regions=regions, spaces=spaces)
    context = SimpleNamespace(screen=SimpleNamespace(areas=[SimpleNamespace(type="OUTLINER"), area]))
    assert placing._ray(context, 700, 250) is None
    assert placing._ray(context, 900, 250) is None
    (_, left), (_, middle) = (placing._ray(context, x, 250) for x in (0, 400))
    assert left.x != pytest.approx(0)
    assert middle.x == pytest.approx(0)


def test_a_batch_stands_in_a_row_in_one_collection(addon: SimpleNamespace) -> None:
    human = addon.packet.read(making.packet(rings=4))
    batch = addon.scene.Batch("Humans 7-9", 3, (1.0, 2.0, 0.0))
    roots = [addon.scene.insert(addon.bpy.context, human, batch, i)[0] for i in range(3)]
    assert [round(root.location.x, 5) for root in roots] == [-0.4, 1.0, 2.4]
    assert {c.name for root in roots for c in root.users_collection} == {"Humans 7-9"}
    assert len({root.populace.uuid for root in roots}) == 3
    assert {o.name for o in addon.bpy.context.view_layer.objects.selected} == {
        o.name for root in roots for o in (root, *root.children)}  # fmt: skip
    assert addon.bpy.context.view_layer.objects.active == roots[2]


def test_rig_bends_the_mesh(addon: SimpleNamespace) -> None:
    root = insert(addon, making.packet())
    assert root.type == "ARMATURE"
    assert [bone.name for bone in root.data.bones] == ["root", "spine", "head"]
    assert root.data.bones["head"].parent == root.data.bones["spine"]
    assert root.data.bones["root"].tail_local[:] == pytest.approx((0, 0, 0.9))
    body = root.children[0]
    part = making.ball()
    for vertex in (0, 100, len(body.data.vertices) - 1):
        found = {body.vertex_groups[g.group].name: g.weight for g in body.data.vertices[vertex].groups}
        wanted = dict.fromkeys(("root", "spine", "head"), 0.0)
        for bone, weight in zip(part["skin_indices"][vertex], part["skin_weights"][vertex]):
            wanted[("root", "spine", "head")[bone]] += float(weight)
        assert sum(found.values()) == pytest.approx(1, abs=1e-6)
        assert all(found.get(name, 0) == pytest.approx(weight, abs=1 / 8192) for name, weight in wanted.items())
    before = read(body.data.vertices, "co", 3)
    root.pose.bones["root"].location = (0, 0, 1)  # bone space: its z points to the world's -y
    addon.bpy.context.view_layer.update()
    evaluated = body.evaluated_get(addon.bpy.context.evaluated_depsgraph_get()).data
    moved = read(evaluated.vertices, "co", 3) - before
    assert np.linalg.norm(moved, axis=1) == pytest.approx(np.ones(len(before)), abs=1e-3), "all follow the root"


def evaluated(addon: SimpleNamespace, body: Any) -> Any:
    """Vertices in the world as Blender shows them."""
    shown = body.evaluated_get(addon.bpy.context.evaluated_depsgraph_get())
    world = np.array(shown.matrix_world)
    return read(shown.data.vertices, "co", 3) @ world[:3, :3].T + world[:3, 3]


@pytest.mark.parametrize("centimetres", [False, True])
@pytest.mark.parametrize("with_rig", [True, False])
def test_posed_person_stands_as_the_packet_says(addon: SimpleNamespace, with_rig: bool, centimetres: bool) -> None:
    """The armature's bones and, without one, the mesh itself give the linear blend of the packet's rotations."""
    if centimetres:
        addon.bpy.context.scene.unit_settings.scale_length = 0.01
    data = making.pack(making.tensors(posed=True), making.meta())
    root = insert(addon, data, with_rig=with_rig, location=(1.0, 2.0, 3.0))
    human = addon.packet.read(data)
    x, y, z = addon.posing.posed(human.parts[0], human.rig).T * (100 if centimetres else 1)
    body = root.children[0] if with_rig else root
    assert np.abs(evaluated(addon, body) - (1, 2, 3) - np.stack([x, -z, y], 1)).max() < (1e-2 if centimetres else 1e-4)
    if with_rig:  # the mesh is left in rest
        assert np.allclose(read(body.data.vertices, "co", 3)[:, 2].min(), 0, atol=1e-6)
        assert {bone.rotation_mode for bone in root.pose.bones} == {"QUATERNION"}


def test_one_bone_turns_about_its_head(addon: SimpleNamespace) -> None:
    """By hand: the spine bows by 90 degrees about +x; what hangs on it alone goes from 0.9 m up to 0.9 m ahead."""
    half = np.float32(np.sqrt(0.5))
    part = making.ball(4)
    part["skin_indices"][:], part["skin_weights"][:] = 1, np.float32([1, 0, 0, 0])
    arrays = making.tensors([part]) | {"rig/rotations": np.float32([(1, 0, 0, 0), (half, half, 0, 0), (1, 0, 0, 0)]),
                                       "rig/translation": np.zeros((1, 3), np.float32)}  # fmt: skip
    root = insert(addon, making.pack(arrays, making.meta()))
    top = part["vertices"][:, 1].argmax()
    assert part["vertices"][top] == pytest.approx([0, 1.8, 0], abs=1e-6)
    assert evaluated(addon, root.children[0])[top] == pytest.approx([0, -0.9, 0.9], abs=1e-5)


def test_levels_of_detail_and_garments_are_objects_of_one_person(addon: SimpleNamespace) -> None:
    asset = making.meta(4)
    asset["parts"] = [{"name": "body"}, {"name": "top"},
                      {"name": "body_LOD1", "lod": 1}, {"name": "top_LOD1", "lod": 1}]  # fmt: skip
    balls = [making.ball(6), making.ball(6), making.ball(4), making.ball(4)]
    root = insert(addon, making.pack(making.tensors(balls, posed=True), asset))
    assert root.type == "ARMATURE"
    assert {child.name for child in root.children} == {"Human Body", "Human Top", "Human Body_LOD1", "Human Top_LOD1"}
    assert len({c.name for o in (root, *root.children) for c in o.users_collection}) == 1
    for child in root.children:
        coarse = "_LOD" in child.name
        assert (child.hide_viewport, child.hide_render) == (coarse, coarse)
        assert child.select_get() is not coarse
        assert [m.object for m in child.modifiers] == [root]
    assert addon.bpy.context.view_layer.objects.active == root
    assert root.populace.height_m == pytest.approx(1.8)


def test_levels_of_detail_of_one_mesh_have_its_name(addon: SimpleNamespace) -> None:
    asset = making.meta(2, rig=False)
    asset["parts"] = [{"name": "human"}, {"name": "human_LOD1", "lod": 1}]
    root = insert(addon, making.pack(making.tensors([making.ball(6), making.ball(4)], rig=False), asset))
    assert root.type == "EMPTY"
    assert {child.name: child.hide_render for child in root.children} == {"Human": False, "Human_LOD1": True}


def test_rounded_weights_sum_exactly(addon: SimpleNamespace) -> None:
    rng = np.random.default_rng(1)
    bones = rng.integers(0, 5, (500, 4)).astype(np.int32)
    weights = rng.dirichlet([0.3] * 4, 500).astype(np.float32)
    weights[0] = 0
    _, steps = addon.scene.rounded_weights(bones, weights)
    assert (steps.sum(1) == addon.scene.WEIGHT_STEPS).all()
    assert steps.min() >= 0
    for row, of, given in zip(steps[1:], bones[1:], weights[1:], strict=True):
        for bone in range(5):
            assert abs(row[of == bone].sum() / addon.scene.WEIGHT_STEPS - given[of == bone].sum()) < 4 / 8192
            assert (row[of == bone] > 0).sum() <= 1


def test_several_parts_hang_on_one_root(addon: SimpleNamespace) -> None:
    root = insert(addon, making.packet(rings=4, rig=False, parts=3))
    assert (root.type, root.name) == ("EMPTY", "Human")
    assert {child.name for child in root.children} == {"Human Human", "Human Part 1", "Human Part 2"}
    addon.bpy.context.view_layer.objects.active = root.children[1]
    assert addon.properties.active_human(addon.bpy.context) == root


@pytest.mark.parametrize("fails_in", ["_material", "_add_shape_keys", "_armature", "_bind", "_link"])
def test_failure_leaves_no_datablock(addon: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fails_in: str) -> None:
    before = counts(addon.bpy)
    real = getattr(addon.scene, fails_in)

    def fails(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise OSError("full")

    monkeypatch.setattr(addon.scene, fails_in, fails)
    with pytest.raises(OSError, match="full"):
        insert(addon, keyed())
    assert counts(addon.bpy) == before
    monkeypatch.undo()
    assert insert(addon, making.packet()).name == "Human Rig"


def test_recipe_survives_saving(addon: SimpleNamespace, tmp_path: Path) -> None:
    root = insert(addon, making.packet(seed=2**53 - 1, truncation_psi=0.7))
    kept = (root.populace.uuid, root.populace.recipe)
    path = str(tmp_path / "recipe.blend")
    addon.bpy.ops.wm.save_as_mainfile(filepath=path)
    addon.bpy.ops.wm.open_mainfile(filepath=path)
    about = addon.bpy.data.objects["Human Rig"].populace
    assert (about.uuid, about.recipe) == kept
    assert (about.seed, about.family, about.weights_sha256) == (str(2**53 - 1), "ball", "ab" * 32)
    latents = addon.packet.recipe_latents(json.loads(about.recipe))
    assert np.array_equal(np.float32(latents["body/shape"]), making.tensors()["latents/body/shape"])


def test_degenerate_faces_are_cleaned_by_blender(addon: SimpleNamespace) -> None:
    part = making.ball(4)
    part["faces"][3] = part["faces"][3][0]
    mesh = insert(addon, making.pack(making.tensors([part], rig=False), making.meta(rig=False))).data
    assert len(mesh.polygons) == len(part["faces"]) - 1
    assert len(mesh.uv_layers["UVMap"].uv) == len(mesh.loops)
