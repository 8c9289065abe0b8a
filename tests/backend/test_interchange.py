# SPDX-License-Identifier: GPL-3.0-or-later
"""Files for other programs, read back: units, axes, names, skeleton, weights, textures; the same bytes every time."""

from __future__ import annotations

import importlib
import importlib.util
import json
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend import families, interchange, packet, pipeline
from backend.interchange import Format, PresetName
from backend.packet import HumanAsset
from backend.protocol import PopulaceError, parse_request
from backend.settings import Settings

HAS_BPY = importlib.util.find_spec("bpy") is not None
needs_bpy = pytest.mark.skipif(not HAS_BPY, reason="needs the bpy module")


@pytest.fixture(scope="module")
def person() -> HumanAsset:
    """The manikin with two levels of detail."""
    request = parse_request({"family": "capsule", "seed": 3, "grid_resolution": 48, "faces": 1500, "texture_size": 512,
                             "lods": 2})  # fmt: skip
    asset, _ = pipeline.generate(request, families.load("capsule", "cpu", Settings.load(device="cpu")))
    return asset


def glb_json(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    return json.loads(data[20 : 20 + length])


def height_m(asset: HumanAsset) -> float:
    y = asset.parts[0].vertices[:, 1]
    return float(y.max() - y.min())


def test_every_bone_name_of_a_humanoid_is_its_own() -> None:
    for name in ("unity", "godot"):
        bones = interchange.PRESETS[name].bones
        assert len(set(bones.values())) == len(bones) == 6 + 2 * (8 + 5 * 3)
        assert {"Hips", "UpperChest", "LeftUpperArm", "RightLittleDistal", "LeftToes"} <= set(bones.values())
    assert interchange.PRESETS["unity"].bones["thumb_01_l"] == "LeftThumbProximal"
    assert interchange.PRESETS["godot"].bones["thumb_01_l"] == "LeftThumbMetacarpal"


def test_humanoid_names_cover_the_people_family() -> None:
    model = families.load("people", "cpu", Settings.load(device="cpu"))
    assert set(interchange.PRESETS["unity"].bones) == {*model.bones} - {"Root"}  # type: ignore[attr-defined]


def test_glb_per_level_with_the_engines_names(person: HumanAsset, tmp_path: Path) -> None:
    plain = interchange.write(person, tmp_path, "a", "glb")
    assert [path.name for path in plain] == ["a.glb", "a_LOD1.glb"]
    godot = interchange.write(person, tmp_path, "g", "glb", "godot")
    assert [path.name for path in godot] == ["g_LOD0.glb", "g_LOD1.glb"]
    names = [node["name"] for node in glb_json(godot[0])["nodes"]]
    assert "Hips" in names
    assert "pelvis" not in names
    assert plain[0].read_bytes() == packet.to_glb(person)


def obj_points(path: Path) -> np.ndarray[Any, Any]:
    return np.array([line.split()[1:] for line in path.read_text().splitlines() if line.startswith("v ")], float)


def test_obj_has_the_units_and_axes_of_the_engine(person: HumanAsset, tmp_path: Path) -> None:
    (metres, _), (unreal, _) = (interchange.write(person, tmp_path, str(preset), "obj", preset)
                                for preset in ("none", "unreal"))  # fmt: skip
    y_up, z_up = obj_points(metres), obj_points(unreal)
    assert np.allclose(z_up, np.stack([y_up[:, 0], -y_up[:, 2], y_up[:, 1]], 1) * 100, atol=1e-3)
    assert z_up[:, 2].max() - z_up[:, 2].min() == pytest.approx(100 * height_m(person), abs=0.01)


def test_without_blender_there_is_a_sentence(person: HumanAsset, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for form in ("usd", "fbx", "blend"):
        with pytest.raises(PopulaceError, match=rf"Writing {form} needs Blender") as caught:
            interchange.write(person, tmp_path, "a", form)
        assert 'pip install ".[blender]"' in caught.value.hint
    interchange.check(["glb", "obj", "packet"])


@pytest.fixture(scope="module")
def files(person: HumanAsset, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Format, PresetName], Path]:
    """Each written once by a Blender of its own; kept, because that takes seconds."""
    made = {}
    for form, preset in (("fbx", "unreal"), ("fbx", "unity"), ("usd", "none"), ("usd", "unreal"), ("blend", "unity")):
        folder = tmp_path_factory.mktemp(f"{form}-{preset}")
        (made[form, preset],) = interchange.write(person, folder, "guard", form, preset)
    return made


@pytest.fixture
def blender() -> Any:
    """An empty factory scene in this process."""
    bpy = importlib.import_module("bpy")
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    importlib.import_module("addon_utils").enable("io_scene_fbx")
    return bpy


def check_scene(bpy: Any, person: HumanAsset, root_bone: str) -> None:
    """What came back is the person: size in metres, both levels, bones, weights that sum to 1, both maps."""
    meshes = {made.name: made for made in bpy.data.objects if made.type == "MESH"}
    assert set(meshes) == {"guard_LOD0", "guard_LOD1"}
    (armature,) = [made for made in bpy.data.objects if made.type == "ARMATURE"]
    assert len(armature.data.bones) == len(person.meta["bones"])
    assert root_bone in armature.data.bones
    for lod, part in enumerate(person.parts):
        made = meshes[f"guard_LOD{lod}"]
        assert len(made.data.polygons) == len(part.faces)
        world = np.array([made.matrix_world @ vertex.co for vertex in made.data.vertices])
        ours = part.vertices[:, [0, 2, 1]] * np.array([1, -1, 1], np.float32)
        assert np.allclose([world.min(0), world.max(0)], [ours.min(0), ours.max(0)], atol=2e-3)
        sums = [sum(group.weight for group in vertex.groups) for vertex in made.data.vertices]
        assert np.allclose(sums, 1, atol=1e-3)
        assert {group.name for group in made.vertex_groups} <= {bone.name for bone in armature.data.bones}
    hips = armature.matrix_world @ armature.data.bones[root_bone].head_local
    assert np.allclose(hips[2], person.rig.heads[0][1], atol=2e-3)  # type: ignore[union-attr]
    assert len(bpy.data.images) >= 4


@needs_bpy
@pytest.mark.parametrize(("preset", "up", "root"), [("unreal", 2, "pelvis"), ("unity", 1, "Hips")])
def test_fbx(preset: PresetName, up: int, root: str, files: Any, person: HumanAsset, blender: Any) -> None:
    """Centimetres, and no node turned or scaled: engines show such numbers to the user."""
    path = files["fbx", preset]
    parse = importlib.import_module("io_scene_fbx.parse_fbx").parse
    elements = {element.id: element for element in parse(str(path))[0].elems}
    settings = {p.props[0]: p.props[4:] for p in elements[b"GlobalSettings"].elems[1].elems}
    assert (settings[b"UpAxis"], settings[b"UnitScaleFactor"]) == ([up], [1.0])
    for model in (element for element in elements[b"Objects"].elems if element.id == b"Model"):
        if model.props[2] in (b"Mesh", b"Null"):
            own = {p.props[0]: p.props[4:] for e in model.elems if e.id == b"Properties70" for p in e.elems}
            assert np.allclose(own.get(b"Lcl Rotation", 0), 0, atol=1e-4)
            assert np.allclose(own.get(b"Lcl Scaling", 1), 1, atol=1e-6)
    points = [np.array(e.props[0]).reshape(-1, 3) for g in elements[b"Objects"].elems if g.id == b"Geometry"
              for e in g.elems if e.id == b"Vertices"]  # fmt: skip
    assert np.allclose(points[0][:, up].max(), 100 * height_m(person), atol=0.01)
    contents = [e.props[0] for v in elements[b"Objects"].elems if v.id == b"Video" for e in v.elems
                if e.id == b"Content"]  # fmt: skip
    assert {person.parts[0].base_color_png, person.parts[0].normal_png} <= set(contents)
    assert (path.parent / "guard_LOD0_orm.png").read_bytes() == person.parts[0].orm_png
    assert str(path.parent).encode() not in path.read_bytes()
    blender.ops.import_scene.fbx(filepath=str(path))
    check_scene(blender, person, root)


@needs_bpy
@pytest.mark.parametrize("preset", ["none", "unreal"])
def test_usd(preset: PresetName, files: Any, person: HumanAsset, blender: Any) -> None:
    path = files["usd", preset]
    assert sorted(p.name for p in (path.parent / "textures").iterdir()) == sorted(
        f"guard_LOD{lod}_{kind}.png" for lod in (0, 1) for kind in ("base_color", "normal", "orm"))  # fmt: skip
    blender.ops.wm.usd_import(filepath=str(path))
    check_scene(blender, person, "pelvis")


CHECK = """
import json, sys
from pxr import Usd, UsdGeom, UsdSkel, UsdValidation
stage = Usd.Stage.Open(sys.argv[1])
validators = UsdValidation.ValidationRegistry().GetOrLoadAllValidators()
found = UsdValidation.ValidationContext(validators).Validate(stage)
skins = [UsdSkel.BindingAPI(prim) for prim in stage.Traverse() if prim.HasAPI(UsdSkel.BindingAPI)]
print(json.dumps({"validators": len(validators), "found": [[e.GetName(), e.GetMessage()] for e in found],
                  "up": UsdGeom.GetStageUpAxis(stage), "unit": UsdGeom.GetStageMetersPerUnit(stage),
                  "default": bool(stage.GetDefaultPrim()),
                  "skinned": sum(bool(skin.GetSkeletonRel().GetTargets()) for skin in skins)}))
"""


@needs_bpy
@pytest.mark.skipif(importlib.util.find_spec("pxr") is None, reason="needs usd-core")
@pytest.mark.parametrize(("preset", "up"), [("none", "Y"), ("unreal", "Z")])
def test_usd_validators_find_no_fault(preset: PresetName, up: str, files: Any) -> None:
    """In a process of its own: bpy has another USD inside."""
    command = [sys.executable, "-c", CHECK, str(files["usd", preset])]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert said.pop("validators") > 10
    assert said == {"found": [], "up": up, "unit": 1.0, "default": True, "skinned": 2}


@needs_bpy
def test_blend(files: Any, person: HumanAsset, blender: Any) -> None:
    blender.ops.wm.open_mainfile(filepath=str(files["blend", "unity"]))
    check_scene(blender, person, "Hips")


@needs_bpy
@pytest.mark.parametrize(("form", "preset"), [("fbx", "unity"), ("usd", "none")])
def test_the_same_bytes_in_every_folder(
    form: Format, preset: PresetName, files: Any, person: HumanAsset, tmp_path: Path
) -> None:
    (again,) = interchange.write(person, tmp_path, "guard", form, preset)
    assert again.read_bytes() == files[form, preset].read_bytes()


def test_blender_ends_with_whoever_asked(person: HumanAsset, tmp_path: Path) -> None:
    """Its stdin is a leash: nobody is left when the process that wanted the file was killed."""
    parcel, path = tmp_path / "person.safetensors", tmp_path / "person.blend"
    packet.write(parcel, person)
    order = {"packet": str(parcel), "path": str(path), "name": "person", "form": "blend", "up": "Y",
             "trouble": str(tmp_path / "error.json")}  # fmt: skip
    command = [sys.executable, "-m", "backend.interchange_blender", json.dumps(order)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(120) == 1
    assert not path.exists()


@needs_bpy
def test_a_server_that_ends_ends_the_blenders_that_write_for_it(person: HumanAsset, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(interchange.packed, person, "blend")
        began = time.monotonic()
        while not interchange._writing:
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        interchange.end_all()
        with pytest.raises(PopulaceError, match="Blender could not write"):
            written.result(60)
    assert not interchange._writing
