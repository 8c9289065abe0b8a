# SPDX-License-Identifier: GPL-3.0-or-later
"""`blender --command populace ...` as Blender calls it: the list of arguments in, the exit code out."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.blender_addon import making
from tests.blender_addon.conftest import PACKAGE


@pytest.fixture
def command(addon: SimpleNamespace, home: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module in Blender; people come from a drawer instead of a generator."""
    module = importlib.import_module(f"{PACKAGE}.command_line")
    actions = importlib.import_module(f"{PACKAGE}.actions")

    class Drawer:
        def __init__(self, *_: Any) -> None:
            pass

        def generate_all(self, requests: Any) -> Any:
            for request in requests:
                if request.seed == 13:
                    raise addon.messages.BackendError("empty_surface", "Seed 13 has no surface.", "Try another.")
                yield addon.packet.read(making.packet())

    monkeypatch.setattr(actions, "Client", Drawer)
    monkeypatch.setenv("POPULACE_PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return module


@pytest.mark.parametrize("suffix", [".blend", ".glb", ".fbx", ".usdc"])
def test_generate_writes_what_can_be_opened(suffix: str, command: ModuleType, bpy: Any, tmp_path: Path) -> None:
    path = tmp_path / "ö 中" / f"people{suffix}"
    assert command.main(["generate", "--seed", "3", "--count", "2", "--pose", "rest", "--out", str(path)]) == 0
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    {".blend": bpy.ops.wm.open_mainfile, ".glb": bpy.ops.import_scene.gltf, ".fbx": bpy.ops.import_scene.fbx,
     ".usdc": bpy.ops.wm.usd_import}[suffix](filepath=str(path))  # fmt: skip
    ball, faces = making.ball(), len(making.ball()["faces"])
    meshes = [made for made in bpy.data.objects if made.type == "MESH" and len(made.data.polygons) == faces]
    assert len(meshes) == 2
    bpy.context.view_layer.update()
    tops = [max((made.matrix_world @ vertex.co).z for vertex in made.data.vertices) for made in meshes]
    assert np.allclose(tops, np.ptp(ball["vertices"][:, 1]), atol=0.01)


def test_into_a_file_keeps_what_is_there(command: ModuleType, bpy: Any, tmp_path: Path) -> None:
    path = tmp_path / "set.blend"
    bpy.data.objects.new("Chair", None)
    bpy.context.scene.collection.objects.link(bpy.data.objects["Chair"])
    bpy.ops.wm.save_as_mainfile(filepath=str(path))
    assert command.main(["generate", "--into", str(path), "--out", str(path)]) == 0
    bpy.ops.wm.open_mainfile(filepath=str(path))
    assert "Chair" in bpy.data.objects
    assert [made for made in bpy.data.objects if made.populace.uuid]


def test_failures_are_a_sentence_and_exit_code_1(command: ModuleType, tmp_path: Path, capsys: Any) -> None:
    assert command.main(["generate", "--seed", "13", "--out", str(tmp_path / "x.blend")]) == 1
    assert "Seed 13 has no surface." in capsys.readouterr().err
    assert not (tmp_path / "x.blend").exists()


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate"], ["generate", "--out", "x.gif"],
                                       ["generate", "--out", "x.blend", "--texture-size", "7"]])  # fmt: skip
def test_wrong_arguments_are_exit_code_2(arguments: list[str], command: ModuleType) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2


def test_the_generators_commands_run_in_its_own_python(
    command: ModuleType, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backend").mkdir()
    (tmp_path / "backend" / "__main__.py").write_text("raise SystemExit(99)")
    assert command.main(["plan", "--count", "2"]) == 0
    assert capfd.readouterr().out.count('"seed"') == 2
    assert command.main(["batch", "none.jsonl", "--out", "out"]) == 2
    assert "none.jsonl cannot be read" in capfd.readouterr().err


def test_the_reference_names_every_operator_for_scripts(command: ModuleType, bpy: Any, capsys: Any) -> None:
    assert command.main(["operators"]) == 0
    text = capsys.readouterr().out
    assert "\n| seed | int" in text
    public = {name for name in dir(bpy.ops.populace)
              if "INTERNAL" not in getattr(getattr(bpy.types, f"POPULACE_OT_{name}"), "bl_options", ())}  # fmt: skip
    assert "generate" in public
    assert {line.partition(".")[2] for line in text.splitlines() if line.startswith("## ")} == public
