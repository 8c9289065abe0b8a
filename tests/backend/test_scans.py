# SPDX-License-Identifier: GPL-3.0-or-later
"""Folders of foreign meshes: units, axes, colours and parts by hand-made files; people exported and read back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from backend.protocol import PopulaceError
from backend.training import scans
from backend.training.casting import CUT, Garment, cast
from backend.training.makehuman import Kit
from backend.training.person import SampledPerson
from backend.training.sampler import Sampler, template
from backend.training.scans import Reading, listing, part_of, people, read
from backend.training.splits import split_of

KIT = Path(os.environ.get("MAKEHUMAN_DATA", Path(__file__).parents[3] / "shared" / "data" / "makehuman"))
needs_kit = pytest.mark.skipif(not (KIT / "3dobjs" / "base.obj").exists(), reason="no MakeHuman assets here")
SIZE = np.array([0.5, 1.8, 0.3])  # metres


def figure(scale: float = 1.0, z_up: bool = False) -> trimesh.Trimesh:
    """A box with a nose at +Z (where Z is up: at -Y), coloured by height: red below, blue above."""
    body = trimesh.creation.box(SIZE).apply_translation((3.0, 5.0, 0))
    nose = trimesh.creation.box((0.1, 0.1, 0.1)).apply_translation((3.0, 5.7, 0.19))
    mesh = trimesh.util.concatenate([body, nose])
    colors = np.where(mesh.vertices[:, 1:2] > 5.0, [[0, 0, 255, 255]], [[255, 0, 0, 255]]).astype(np.uint8)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colors)
    if z_up:
        mesh.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    mesh.apply_scale(scale)
    return mesh


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
@pytest.mark.parametrize(("scale", "unit"), [(1, "m"), (10, "dm"), (100, "cm"), (1000, "mm"), (39.37, "in")])
def test_units_axes_and_colors_are_found(tmp_path: Path, suffix: str, scale: float, unit: str) -> None:
    z_up = suffix == "ply"
    figure(scale, z_up).export(tmp_path / f"someone.{suffix}")
    person, scan = read(tmp_path / f"someone.{suffix}")
    assert (scan.unit, scan.up, scan.parts) == (unit, "z" if z_up else "y", ("body",))
    assert scan.height_m == pytest.approx(1.8, rel=1e-4)
    assert person.attributes["height_m"] == scan.height_m
    low, high = person.bounds
    assert low == pytest.approx([-0.25, 0, -0.195], abs=1e-4)  # grounded and centred: the nose counts
    assert high == pytest.approx([0.25, 1.8, 0.195], abs=1e-4)
    layer = person.layers[0]
    assert layer.vertices[layer.vertices[:, 2] > 0.1].max(0)[1] > 1.5  # the nose looks to +Z
    colors = layer.color(np.arange(len(layer.faces)), np.tile([1.0, 0, 0], (len(layer.faces), 1)))
    above = layer.vertices[layer.faces[:, 0], 1] > 0.9
    assert colors[above, :3] == pytest.approx(np.tile([0, 0, 1.0], (above.sum(), 1)), abs=1e-6)
    assert colors[~above, :3] == pytest.approx(np.tile([1.0, 0, 0], ((~above).sum(), 1)), abs=1e-6)
    assert person.split == split_of(scans.scan_seed(Path(f"elsewhere/someone.{suffix}")))


def test_guesses_can_be_overruled(tmp_path: Path) -> None:
    figure().export(tmp_path / "a.ply")
    person, scan = read(tmp_path / "a.ply", Reading(unit="cm", facing="+x"))
    assert scan.height_m == pytest.approx(0.018, rel=1e-4)
    assert np.ptp(person.layers[0].vertices, axis=0) == pytest.approx([0.0039, 0.018, 0.005], rel=1e-4)
    with pytest.raises(PopulaceError, match="cannot face"):
        read(tmp_path / "a.ply", Reading(facing="-y"))
    with pytest.raises(PopulaceError, match="furlong"):
        read(tmp_path / "a.ply", Reading(unit="furlong"))


@pytest.mark.parametrize(
    ("name", "part"),
    [("Hair_long.001", "hair"), ("SHOES", "shoes"), ("myShirt", "top"), ("T-Shirt", "top"), ("Laptop", "body"),
     ("Chair", "body"), ("jeans_mat", "bottom"), ("EyeBall.L", "eyes"), ("scan", "body"), ("FedoraHat", "accessory")],
)  # fmt: skip
def test_names_of_objects_tell_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_folder_says_what_is_wrong_with_each_file(tmp_path: Path) -> None:
    with pytest.raises(PopulaceError, match="no folder"):
        listing(tmp_path / "none")
    with pytest.raises(PopulaceError, match="no meshes"):
        listing(tmp_path)
    (tmp_path / "sub").mkdir()
    figure().export(tmp_path / "sub" / "good.glb")
    trimesh.creation.box(SIZE).export(tmp_path / "grey.ply")
    (tmp_path / "junk.glb").write_bytes(b"glTF is something else")
    (tmp_path / "points.obj").write_text("v 0 0 0\nv 0 1 0\n")
    figure(1e6).export(tmp_path / "huge.ply")
    (tmp_path / "notes.txt").write_text("not a mesh")
    found = {s.path.name: s for s in listing(tmp_path)}
    assert set(found) == {"good.glb", "grey.ply", "junk.glb", "points.obj", "huge.ply"}
    assert "texture" in found["grey.ply"].problem
    assert "cannot be read" in found["junk.glb"].problem
    assert "no faces" in found["points.obj"].problem
    assert "no unit" in found["huge.ply"].problem
    assert not found["good.glb"].problem
    assert "1.80 m high, 24 faces" in str(found["good.glb"])
    assert len(list(people(tmp_path))) == 1
    assert len(list(people(tmp_path, split=found["good.glb"].split))) == 1
    others = {"train", "validation", "test"} - {found["good.glb"].split}
    assert all(not list(people(tmp_path, split=s)) for s in others)  # type: ignore[arg-type]


# --- there and back ---------------------------------------------------------------------------------------------------


def save_glb(person: SampledPerson, path: Path) -> None:
    scene = trimesh.Scene()
    for layer in person.layers:
        if layer.part != "brows":
            corners, faces = layer.vertices[layer.faces].reshape(-1, 3), np.arange(layer.faces.size).reshape(-1, 3)
            mesh = trimesh.Trimesh(corners, faces, process=False)
            material = trimesh.visual.material.PBRMaterial(
                baseColorTexture=Image.fromarray(layer.texture), alphaMode="MASK" if layer.cutout else "OPAQUE"
            )
            mesh.visual = trimesh.visual.TextureVisuals(uv=layer.uvs[layer.face_uvs].reshape(-1, 2), material=material)
            scene.add_geometry(mesh, node_name=layer.part, geom_name=layer.part)
    scene.export(path)


def save_obj(person: SampledPerson, path: Path) -> None:
    """In centimetres, one object and one material per layer."""
    lines, materials, v, vt = [f"mtllib {path.stem}.mtl"], [], 1, 1
    for layer in person.layers:
        if layer.part != "brows":
            Image.fromarray(layer.texture).save(path.parent / f"{layer.part}.png")
            materials += [f"newmtl {layer.part}", "Kd 1 1 1", f"map_Kd {layer.part}.png"]
            lines += [f"o {layer.part}", f"usemtl {layer.part}"]
            lines += [f"v {x:.5f} {y:.5f} {z:.5f}" for x, y, z in 100 * layer.vertices]
            lines += [f"vt {u:.6f} {v_:.6f}" for u, v_ in layer.uvs]
            for f, t in zip(layer.faces + v, layer.face_uvs + vt, strict=True):
                lines.append("f " + " ".join(f"{a}/{b}" for a, b in zip(f, t, strict=True)))
            v, vt = v + len(layer.vertices), vt + len(layer.uvs)
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".mtl").write_text("\n".join(materials) + "\n")


@pytest.fixture(scope="module")
def someone() -> SampledPerson:
    """Skin, hair with clear texels, and a garment with a baked pattern: files of few layers are written sooner."""
    kit = Kit(KIT)
    casting = cast(kit, 2)
    top = Garment(CUT, np.linspace(0, 1, 6, dtype=np.float32), "checks", 0.0, (-0.5, 0.0, 0.5, 0.0), 0.008, 0.02)
    person = Sampler(kit, template(kit, 2)).person(replace(casting, parts={"hair": casting.parts["hair"], "top": top}))
    return replace(person, layers=tuple(x for x in person.layers if x.part in ("body", "hair", "top")))


@needs_kit
@pytest.mark.parametrize("save", [save_glb, save_obj])
def test_an_exported_person_comes_back_with_the_same_surface_and_colors(tmp_path: Path, someone, save) -> None:
    person = someone
    path = tmp_path / ("someone" + (".glb" if save is save_glb else ".obj"))
    save(person, path)
    back, scan = read(path)
    assert scan.unit == ("m" if save is save_glb else "cm")
    want = {layer.part: layer for layer in person.layers if layer.part != "brows"}
    assert set(scan.parts) == set(want)
    drawn = [layer for layer in person.layers if layer.part != "brows"]
    points = np.concatenate([layer.vertices[layer.faces].reshape(-1, 3) for layer in drawn])
    middle = (points.min(0) + points.max(0)) / 2 * [1, 0, 1]
    rng = np.random.default_rng(0)
    for part, layer in want.items():
        found = back.layer(part)
        assert found.cutout == (layer.cutout and save is save_glb)  # OBJ cannot say so
        assert len(found.faces) == len(layer.faces)
        face = rng.integers(len(layer.faces), size=3000)
        corners = rng.dirichlet((1, 1, 1), 3000).astype(np.float32)
        here = layer.at(layer.vertices, face, corners) - middle
        there = found.at(found.vertices, face, corners)
        assert np.abs(here - there).max() < 1e-5
        # textures were rounded to bytes, shades taken before the look-up; a baked pattern's edges are a texel wide
        error = np.abs(layer.color(face, corners) - found.color(face, corners))
        assert error.mean() < (0.008 if part == "top" else 0.004)
        assert np.median(error) < 0.003
