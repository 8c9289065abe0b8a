# SPDX-License-Identifier: GPL-3.0-or-later
"""The artists' workflows in Blender, each from end to end over the real socket with the real backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.blender_addon import making
from tests.blender_addon.conftest import PACKAGE, REPOSITORY
from tests.blender_addon.recorder import Layout
from tests.blender_addon.test_blender import people, pump_until
from tests.blender_addon.test_end_to_end import SMALL
from tests.blender_addon.test_scene import counts, read

PEOPLE = {"family": "people", "grid_resolution": 64, "faces": 1500, "texture_size": "512"}
CAPSULE = SMALL | {"texture_size": "512"}
PATIENCE_S = 180


@pytest.fixture(scope="module")
def backend_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One backend for all tests here, since its start is what takes long."""
    home = tmp_path_factory.mktemp("höme 中")
    env = os.environ | {"POPULACE_HOME": str(home), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "backend", "serve", "--stay", "--json"]
    with subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"runtime_file" in process.stdout.readline()
        yield home
        process.terminate()


@pytest.fixture
def at_work(
    addon: SimpleNamespace, backend_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """The add-on connected, with the sliders of the families; operators that wait use the same backend."""
    monkeypatch.setenv("POPULACE_HOME", str(backend_home))
    preferences = addon.bpy.context.preferences.addons[PACKAGE].preferences
    preferences.python = sys.executable
    addon.bpy.ops.populace.start_backend()
    state = addon.tasks.session()
    pump_until(addon, lambda: state.link is addon.session.Link.READY, PATIENCE_S)
    addon.tasks.pump()
    yield addon
    preferences.python = ""


def create(addon: SimpleNamespace, **settings: Any) -> Any:
    assert addon.bpy.ops.populace.generate(**CAPSULE | settings) == {"FINISHED"}
    return people(addon.bpy)[-1]


def body(root: Any) -> Any:
    return next(o for o in (root, *root.children) if o.type == "MESH")


def height_of(root: Any) -> float:
    z = read(body(root).data.vertices, "co", 3)[:, 2]
    return float(np.ptp(z))


def test_slider_previews_then_makes_the_person_in_full(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=3, faces=8000)
    root.location = (1, 2, 3)
    root.name = "Ada"
    modifier = body(root).modifiers.new("Mine", "SUBSURF")
    modifier.levels = 0
    before, original = counts(bpy), body(root).data
    sliders = at_work.attributes.sliders(bpy.context, "capsule")
    assert sliders.height_m == pytest.approx(root.populace.height_m, abs=2e-3)
    sliders.height_m = 1.9
    sliders.top_color = (1.0, 0.0, 0.0)
    assert sliders.height_m == pytest.approx(1.9), "the slider shows what is wanted"
    assert body(root).data == original, "setting only notes"
    pump_until(at_work, lambda: body(root).data != original, PATIENCE_S)
    shown = body(root).data
    assert shown[at_work.replacing.ORIGINAL] == original
    assert len(shown.polygons) <= 6000 < len(original.polygons)
    assert height_of(root) == pytest.approx(1.9, abs=0.02)
    assert root.populace.height_m < 1.89, "a preview is nobody yet"
    pump_until(at_work, lambda: root.populace.height_m > 1.89, PATIENCE_S)
    assert (root.name, tuple(root.location)) == ("Ada", (1, 2, 3))
    assert [m.name for m in body(root).modifiers] == ["Rig", "Mine"]
    assert body(root).modifiers["Rig"].object == root
    assert len(body(root).vertex_groups) == len(root.data.bones)
    assert counts(bpy) == before, "nothing of preview and old person is left"
    assert sliders.height_m == pytest.approx(1.9, abs=2e-3)
    assert sliders.top_color[:] == pytest.approx((1, 0, 0), abs=1e-3)
    assert [version.label for version in root.populace.versions] == ["Created", "Height, Top colour"]
    assert "bpy.ops.populace.set_attributes(values=" in at_work.snippets.last[-1]


def test_the_history_names_a_part_for_its_colour(addon: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a picture a word or two fits: "Bottom colour" did not."""
    titles = {"bottom": "Bottom", "bottom_color": "Bottom colour", "eye_color": "Eye colour", "height_m": "Height"}
    family = SimpleNamespace(attribute={name: SimpleNamespace(title=title) for name, title in titles.items()}.get)
    monkeypatch.setattr(addon.editing.tasks, "session", lambda: SimpleNamespace(family=lambda name: family))
    root = SimpleNamespace(populace=SimpleNamespace(family="people"))
    wanted = dict.fromkeys(("height_m", "bottom_color", "bottom", "eye_color"))
    assert addon.editing._label(root, SimpleNamespace(mix=None, values=wanted)) == "Height, Bottom, Eye colour"
    assert addon.editing._label(root, SimpleNamespace(mix=("id", 0.5), values={})) == "Mixed"


def test_one_undo_step_for_an_edit_and_none_for_previews(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    create(at_work, seed=3)
    bpy.ops.ed.undo_push(message="made")
    sliders = at_work.attributes.sliders(bpy.context, "capsule")
    root = people(bpy)[0]
    original = body(root).data.name
    for wanted in (1.6, 1.7, 1.8):
        sliders.height_m = wanted
        pump_until(at_work, lambda: at_work.replacing.ORIGINAL in body(people(bpy)[0]).data, PATIENCE_S)
    bpy.ops.ed.undo_push(message="something of the user's")
    bpy.ops.ed.undo()
    root = people(bpy)[0]
    assert body(root).data.name == original, "undo finds no preview"
    was = root.populace.height_m
    assert sliders.height_m == pytest.approx(was, abs=2e-3), "and nothing is wanted any more"
    sliders.height_m = 1.85
    pump_until(at_work, lambda: people(bpy)[0].populace.height_m > 1.84, PATIENCE_S)
    bpy.ops.ed.undo()
    assert people(bpy)[0].populace.height_m == pytest.approx(was)
    bpy.ops.ed.redo()
    assert people(bpy)[0].populace.height_m == pytest.approx(1.85, abs=2e-3)


def test_mix_two_people(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    a, b = create(at_work, seed=1), create(at_work, seed=2)
    latents = [at_work.packet.recipe_latents(json.loads(p.populace.recipe))["body/shape"][0] for p in (a, b)]
    a.select_set(True)
    bpy.context.view_layer.objects.active = a
    assert bpy.ops.populace.mix(amount=0.25, other=b.populace.uuid) == {"FINISHED"}
    now = at_work.packet.recipe_latents(json.loads(a.populace.recipe))["body/shape"][0]
    assert np.allclose(now, 0.75 * np.array(latents[0]) + 0.25 * np.array(latents[1]), atol=1e-6)
    b.select_set(True)
    tools = bpy.context.window_manager.populace
    tools.mix = 1.0
    pump_until(at_work, lambda: len(a.populace.versions) == 3, PATIENCE_S)
    now = at_work.packet.recipe_latents(json.loads(a.populace.recipe))["body/shape"][0]
    assert np.allclose(now, latents[1], atol=1e-6)
    assert tools.mix == 0, "the slider is back"


def test_versions_come_back_to_the_bit(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=5)
    first = read(body(root).data.vertices, "co", 3)
    bpy.ops.populace.set_attributes(values='{"weight": 0.9}')
    second = read(body(root).data.vertices, "co", 3)
    assert len(root.populace.versions) == 2
    bpy.ops.populace.restore_version(index=0)
    assert np.array_equal(read(body(root).data.vertices, "co", 3), first)
    bpy.ops.populace.restore_version(index=1)
    assert np.array_equal(read(body(root).data.vertices, "co", 3), second)
    assert len(root.populace.versions) == 2, "nothing new was made"
    assert all(version.thumbnail for version in root.populace.versions)
    with pytest.raises(RuntimeError, match="no version 9"):
        bpy.ops.populace.restore_version(index=9)


def test_versions_are_bounded_and_the_first_one_stays(addon: SimpleNamespace) -> None:
    human = addon.packet.read(making.packet())
    root, _ = addon.scene.insert(addon.bpy.context, human, addon.scene.Batch("H", 1, (0, 0, 0)))
    first = root.populace.versions[0].recipe
    for seed in range(100, 140):
        root.populace.fill("u", addon.packet.read(making.packet(seed=seed)), f"{seed}")
    versions = root.populace.versions
    assert len(versions) == addon.properties.MAX_VERSIONS
    assert versions[0].recipe == first
    assert [v.label for v in versions][1:] == [str(seed) for seed in range(140 - len(versions) + 1, 140)]


def test_sheet_of_variants(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=5)
    before = counts(bpy)
    assert bpy.ops.populace.make_variants(amount=0.4, seed=70) == {"FINISHED"}
    sheet = at_work.editing.sheet(root)
    assert [variant.seed for variant in sheet] == list(range(70, 76))
    pump_until(at_work, lambda: all(variant.key for variant in sheet), PATIENCE_S)
    assert len({variant.key for variant in sheet}) == 6, "six different people"
    assert counts(bpy) == before, "pictures make no datablocks"
    assert not at_work.tasks.session().jobs
    was = read(body(root).data.vertices, "co", 3)
    bpy.ops.populace.vary(seed=72, amount=0.4)
    assert not at_work.editing.sheet(root), "chosen"
    now = read(body(root).data.vertices, "co", 3)
    assert now.shape != was.shape or not np.array_equal(now, was)


def test_saved_reopened_and_edited_again(at_work: SimpleNamespace, tmp_path: Any) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=5)
    bpy.ops.populace.set_attributes(values='{"height_m": 1.6}')
    path = str(tmp_path / "people ö.blend")
    bpy.ops.wm.save_as_mainfile(filepath=path)
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    bpy.ops.wm.open_mainfile(filepath=path)
    root = people(bpy)[0]
    bpy.context.view_layer.objects.active = root
    assert len(root.populace.versions) == 2
    assert at_work.attributes.sliders(bpy.context, "capsule").height_m == pytest.approx(1.6, abs=2e-3)
    bpy.ops.populace.set_attributes(values='{"weight": 0.1}')
    assert height_of(root) == pytest.approx(1.6, abs=0.02), "what was set before stays"
    bpy.ops.populace.restore_version(index=0)
    assert len(root.populace.versions) == 3


def test_saving_during_a_preview_saves_the_person(at_work: SimpleNamespace, tmp_path: Any) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=5, faces=3000)
    original = body(root).data.name
    at_work.attributes.sliders(bpy.context, "capsule").height_m = 1.9
    pump_until(at_work, lambda: at_work.replacing.ORIGINAL in body(root).data, PATIENCE_S)
    path = str(tmp_path / "preview.blend")
    bpy.ops.wm.save_as_mainfile(filepath=path)
    bpy.ops.wm.open_mainfile(filepath=path)
    assert body(people(bpy)[0]).data.name == original
    assert not any(at_work.replacing.ORIGINAL in mesh for mesh in bpy.data.meshes)


def history_of(addon: SimpleNamespace) -> Layout:
    layout = Layout(addon.bpy)
    addon.human_panel.POPULACE_PT_history.draw.__wrapped__(SimpleNamespace(layout=layout), addon.bpy.context)
    return layout


def test_favourite_is_there_in_another_file(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=8)
    was = read(body(root).data.vertices, "co", 3)
    bpy.ops.populace.add_favourite(name="Grace")
    assert "POPULACE_favourites" in history_of(at_work).folding
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    kept = next(f for f in at_work.history.favourites() if f.name == "Grace")
    assert kept.key
    shown = history_of(at_work)  # nobody is active: what was folded while somebody was does not hide them
    assert "Grace" in shown.texts
    assert not shown.folding
    bpy.ops.populace.use_favourite(favourite=kept.id)
    assert np.array_equal(read(body(people(bpy)[0]).data.vertices, "co", 3), was)
    bpy.ops.populace.remove_favourite(favourite=kept.id)
    assert kept.id not in [f.id for f in at_work.history.favourites()]
    with pytest.raises(RuntimeError, match="favourite is gone"):
        bpy.ops.populace.use_favourite(favourite=kept.id)


def test_parts_of_people(at_work: SimpleNamespace) -> None:
    """Separate garments: re-roll, take off, colour, lock, swap; every object keeps its name and place."""
    bpy = at_work.bpy
    at_work.bpy.ops.populace.generate(**PEOPLE, seed=3, separate=True, prompt="long hair, shirt, jeans, sneakers")
    root = people(bpy)[0]
    parts = at_work.replacing.meshes(root)
    assert {"hair", "top", "bottom", "shoes"} <= parts.keys()
    clean = counts(bpy)

    def codes() -> dict[str, Any]:
        return at_work.packet.recipe_latents(json.loads(root.populace.recipe))

    was = codes()
    bpy.ops.populace.reroll(part="hair", seed=11)
    now = codes()
    assert root.populace.versions[-1].label == "Hair", "the history says which part"
    assert now["top/shape"] == was["top/shape"]
    assert now.get("hair/shape") != was["hair/shape"]
    bpy.ops.populace.set_attributes(values='{"top_color": [1.0, 0.0, 0.0], "hair": "bob"}')
    assert json.loads(root.populace.attributes)["hair"] == "bob"
    assert json.loads(root.populace.attributes)["top_color"] == [1.0, 0.0, 0.0]
    bpy.ops.populace.remove_part(part="shoes")
    assert "shoes" not in at_work.replacing.meshes(root)
    assert not any("Shoes" in o.name for o in bpy.data.objects)
    bpy.ops.populace.lock_part(part="top")
    was = codes()
    bpy.ops.populace.reroll(seed=12)
    assert codes()["top/shape"] == was["top/shape"]
    assert codes()["body/shape"] != was["body/shape"]
    was = codes()
    bpy.ops.populace.reroll(seed=13, kinds="TEX")
    assert codes()["body/shape"] == was["body/shape"]
    assert codes()["body/tex"] != was["body/tex"]
    assert codes()["top/tex"] == was["top/tex"], "locked"
    bpy.ops.populace.generate(**PEOPLE, seed=4, prompt="leather shoes")
    other = people(bpy)[-1] if people(bpy)[-1] != root else people(bpy)[0]
    theirs = at_work.packet.recipe_latents(json.loads(other.populace.recipe))
    root.select_set(True)
    bpy.context.view_layer.objects.active = root
    bpy.ops.populace.swap_part(part="shoes")
    assert codes()["shoes/shape"] == theirs["shoes/shape"]
    assert at_work.replacing.meshes(root)["shoes"].parent == root
    bpy.data.batch_remove([*other.children_recursive, other])
    bpy.data.orphans_purge()
    assert counts(bpy)["armatures"] == clean["armatures"]


def test_words_and_output(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=3)
    bpy.ops.populace.change_by_words(text="tall")
    assert len(root.populace.versions) == 2
    bpy.ops.populace.set_output(texture_size="512", faces=1500, grid_resolution=48, maps="color", lods=2,
                                with_rig=True)  # fmt: skip
    names = {o.populace.part for o in root.children}
    assert names == {"human", "human_LOD1"}
    nodes = body(root).data.materials[0].node_tree.nodes
    assert "Normal" not in nodes
    uuid = root.populace.uuid
    bpy.ops.populace.set_output(texture_size="512", faces=1500, grid_resolution=48, with_rig=False)
    root = at_work.replacing.find(uuid)
    assert (root.type, len(people(bpy))) == ("MESH", 1)
    assert not bpy.data.armatures
    assert len(root.populace.versions) == 4
    bpy.ops.populace.set_output(texture_size="512", faces=1500, grid_resolution=48, with_rig=True, pose="walking")
    root = at_work.replacing.find(uuid)
    assert root.type == "ARMATURE"
    assert len(bpy.data.meshes) == 1


def test_refusals_say_why(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=3)
    with pytest.raises(RuntimeError, match="not JSON"):
        bpy.ops.populace.set_attributes(values="{")
    with pytest.raises(RuntimeError, match="attribute"):
        bpy.ops.populace.set_attributes(values='{"tail": 3}')
    recipe = json.loads(root.populace.recipe)
    families = at_work.tasks.session().families
    say = at_work.recipes.remark
    assert say(recipe, at_work.tasks.session().family("capsule"), families) == ""
    assert "other weights" in say({**recipe, "weights_sha256": "cd" * 32},
                                  at_work.tasks.session().family("people"), families)  # fmt: skip
    assert "no family" in say({**recipe, "family": "cats"}, None, families)
    bpy.ops.object.select_all(action="DESELECT")
    bpy.context.view_layer.objects.active = None
    assert not bpy.ops.populace.vary.poll()


def test_deleted_during_an_edit_comes_back_as_new(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=3)
    target = at_work.editing.Edit(root.populace.uuid, "Edit")
    job = at_work.tasks.send(at_work.editing.request(root, [{"op": "set", "values": {"weight": 0.9}}]), target)
    bpy.data.batch_remove([*root.children, root])
    pump_until(at_work, lambda: job.taken, PATIENCE_S)
    assert len(people(bpy)) == 1
    assert "was deleted" in job.note


def test_a_copy_that_blender_made_is_edited_alone(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=3)
    bpy.ops.object.duplicate()
    copy = bpy.context.view_layer.objects.active
    assert copy.populace.uuid == root.populace.uuid
    was = read(body(root).data.vertices, "co", 3)
    bpy.ops.populace.set_attributes(values='{"weight": 0.9}')
    assert copy.populace.uuid != root.populace.uuid
    assert np.array_equal(read(body(root).data.vertices, "co", 3), was)


def test_fifty_edits_leave_nothing_behind(at_work: SimpleNamespace) -> None:
    """Without the backend's part: the same person again and again in the place of another."""
    bpy = at_work.bpy
    root = create(at_work, seed=3)
    humans = list(at_work.client.Client(sys.executable).generate_all(
        at_work.messages.Request(seed=i, **SMALL) for i in (4, 5)))  # fmt: skip
    before = counts(bpy)
    for i in range(50):
        human = humans[i % 2]
        at_work.replacing.show_preview(bpy.context, root, human)
        root = at_work.replacing.replace(bpy.context, root, human, with_rig=True)
        root.populace.fill(root.populace.uuid, human)
    assert counts(bpy) == before


def test_an_edit_that_follows_at_once_contains_the_first(at_work: SimpleNamespace) -> None:
    root = create(at_work, seed=3)
    editing, send = at_work.editing, at_work.tasks.send
    wanted = editing.request(root, [{"op": "set", "values": {"height_m": 1.9}}])
    first = send(wanted, editing.target(root, "Height"))
    wanted = editing.request(root, [{"op": "set", "values": {"top_color": [0.0, 1.0, 0.0]}}])
    second = send(wanted, editing.target(root, "Colour"))
    assert first.id not in at_work.tasks.session().jobs
    pump_until(at_work, lambda: second.taken, PATIENCE_S)
    assert root.populace.height_m == pytest.approx(1.9, abs=2e-3)
    assert json.loads(root.populace.attributes)["top_color"] == pytest.approx([0, 1, 0], abs=1e-3)
    assert [version.label for version in root.populace.versions] == ["Created", "Height, Colour"]


def test_what_is_copied_as_python_runs(at_work: SimpleNamespace) -> None:
    bpy = at_work.bpy
    root = create(at_work, seed=3)
    was = read(body(root).data.vertices, "co", 3)
    for line in at_work.snippets.last:
        compile(line, "snippet", "exec")
    request = at_work.recipes.request_of(at_work.recipes.parse(root.populace.recipe))
    script = at_work.snippets.script(at_work.snippets.person(request, True))
    exec(compile(script, "snippet", "exec"), {})
    assert len(people(bpy)) == 2
    other = next(p for p in people(bpy) if p != root)
    assert np.array_equal(read(body(other).data.vertices, "co", 3), was)
    assert at_work.snippets.last[-1].startswith("bpy.ops.populace.generate(")
    compile(at_work.snippets.client_script(request, PACKAGE), "snippet", "exec")


def test_what_the_generator_tells_of_itself(at_work: SimpleNamespace) -> None:
    families = at_work.tasks.session().families
    people_of = at_work.tasks.session().family("people")
    assert len(people_of.weights_sha256) == 64
    assert {"height_m", "top_color", "hair"} <= {a.name for a in people_of.attributes}
    assert "walking" in people_of.poses
    assert people_of.parts[0] == "body"
    assert at_work.recipes.remark({"family": "people", "weights_sha256": ""}, people_of, families)
