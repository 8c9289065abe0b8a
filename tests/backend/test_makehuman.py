# SPDX-License-Identifier: GPL-3.0-or-later
"""The reader of MakeHuman formats: hand-made files with answers by hand, and the kit's published check values."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from backend.protocol import PopulaceError
from backend.training.casting import cast
from backend.training.makehuman import BODY, Kit, macro_weights, read_material, read_obj, read_proxy, read_target
from backend.training.wardrobe import classify, label_of

KIT = Path(os.environ.get("MAKEHUMAN_DATA", Path(__file__).parents[3] / "shared" / "data" / "makehuman"))
needs_kit = pytest.mark.skipif(not (KIT / "3dobjs" / "base.obj").exists(), reason="no MakeHuman assets here")
MIDDLE = ("gender", "age", "muscle", "weight", "height", "proportions", "cup", "firmness")
SLIDERS = dict.fromkeys(MIDDLE, 0.5) | {"african": 0.0, "asian": 0.0, "caucasian": 1.0}


def sliders(**changes: float) -> dict[str, np.ndarray]:
    return {k: np.array([v]) for k, v in (SLIDERS | changes).items()}


def test_obj_splits_quads_and_drops_collapsed_triangles(tmp_path: Path) -> None:
    (tmp_path / "m.obj").write_text(
        "# c\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        "g a\nf 1/1 2/2 3/3 4/4\ng b\nf 1/1 2/2 3/3 3/3\n"
    )
    mesh = read_obj(tmp_path / "m.obj")
    faces, uvs = mesh.triangles()
    assert faces.tolist() == [[0, 1, 2], [0, 1, 2], [0, 2, 3]]
    assert uvs.tolist() == faces.tolist()
    assert mesh.groups["b"].tolist() == [1]


@pytest.mark.parametrize("zipped", [True, False])
def test_target_reads_bare_decimals_and_comments(tmp_path: Path, zipped: bool) -> None:
    text = b"# note\n\n3 .5 -.25 0\n7 0 0 1.5\n"
    path = tmp_path / ("x.target.gz" if zipped else "x.target")
    path.write_bytes(gzip.compress(text) if zipped else text)
    index, delta = read_target(path)
    assert index.tolist() == [3, 7]
    assert delta.tolist() == [[0.5, -0.25, 0], [0, 0, 1.5]]


def test_proxy_follows_the_base_with_scaled_offsets(tmp_path: Path) -> None:
    (tmp_path / "p.obj").write_text("v 0 0 0\nv 0 0 0\nvt 0 0\nf 1/1 2/1 2/1\n")
    (tmp_path / "p.mhclo").write_text(
        "name p\nobj_file p.obj\nx_scale 0 1 2.0\ny_scale 0 2 1.0\nz_scale 0 3 4.0\nverts 0\n"
        "0 1 2 0.5 0.25 0.25 1 1 1\n3\nmaterial p.mhmat\ndelete_verts\n4 - 6 9\n"
    )
    base = np.array([[0, 0, 0], [4, 0, 0], [0, 3, 0], [0, 0, 2.0]])
    proxy = read_proxy(tmp_path / "p.mhclo")
    # factors |4|/2, |3|/1, |2|/4; point 0.25*(4,0,0) + 0.25*(0,3,0) + (2, 3, 0.5)
    assert np.allclose(proxy.fit(base), [[3.0, 3.75, 0.5], [0, 0, 2]])
    assert proxy.delete.tolist() == [4, 5, 6, 9]
    assert proxy.material == tmp_path / "p.mhmat"


def test_material_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "a.mhmat").write_text("# c\nname a\ndiffuseTexture ../t.png\n")
    assert read_material(tmp_path / "a.mhmat") == {"name": "a", "diffuseTexture": str(tmp_path / "../t.png")}


def test_macro_weights_follow_the_product_rule_and_the_fallback() -> None:
    names = {"caucasian-male-young", "universal-male-young-averagemuscle-averageweight",
             "male-young-averagemuscle-averageweight-maxheight"}  # fmt: skip
    weights = macro_weights(sliders(gender=0.8, age=0.75, height=0.6, weight=0.25), names)
    assert weights["caucasian-male-young"] == pytest.approx(0.8 * 0.5)
    assert weights["universal-male-young-averagemuscle-averageweight"] == pytest.approx(0.8 * 0.5 * 0.5)
    # minweight has no height file of its own, so both weight levels use the average one
    assert weights["male-young-averagemuscle-averageweight-maxheight"] == pytest.approx(0.8 * 0.5 * 0.2)
    with pytest.raises(ValueError, match="adults"):
        macro_weights(sliders(age=0.3), names)


@needs_kit
@pytest.mark.parametrize(
    ("changes", "count", "height", "width", "lowest"),
    [
        ({"gender": 0}, 2, 16.0542, 4.9007, -8.1899),
        ({"gender": 1}, 2, 17.4813, 5.6857, -8.1810),
        ({"african": 1, "asian": 1}, 8, 16.5938, 5.2582, -8.1776),
        ({"gender": 1, "age": 0.75, "muscle": 0.8, "weight": 0.3, "height": 0.6, "proportions": 0.9,
          "african": 0.5, "asian": 0.2, "caucasian": 0.3}, 18, 18.8666, 6.1818, -8.2005),
        ({"gender": 0, "muscle": 0, "weight": 1, "cup": 0.8, "firmness": 0.3}, 5, 16.0542, 4.9007, -8.1899),
    ],
)  # fmt: skip
def test_kit_bodies_have_the_published_sizes(changes, count, height, width, lowest) -> None:
    kit = Kit(KIT)
    assert len(macro_weights(sliders(**changes), set(kit.target_paths))) == count
    body = kit.people(sliders(**changes))[0, BODY]
    assert np.ptp(body[:, 1]) == pytest.approx(height, abs=1e-4)
    assert body[:, 0].max() == pytest.approx(width, abs=1e-4)
    assert body[:, 1].min() == pytest.approx(lowest, abs=1e-4)


@needs_kit
def test_kit_assets_fit_where_they_should() -> None:
    kit = Kit(KIT)
    base = kit.people(sliders(gender=1))[0].astype(np.float64)
    expected = {"clothes/male_casualsuit02/male_casualsuit02.mhclo": (-7.5253, 6.9657),
                "hair/short01/short01.mhclo": (7.4139, 9.4671), "clothes/shoes02/shoes02.mhclo": (-8.3474, -6.0151),
                "eyes/low-poly/low-poly.mhclo": (8.0800, 8.3613)}  # fmt: skip
    for path, (low, high) in expected.items():
        y = read_proxy(KIT / path).fit(base)[:, 1]
        assert (y.min(), y.max()) == pytest.approx((low, high), abs=2e-4)


@needs_kit
def test_rig_lists_parents_first_and_weights_sum_to_one() -> None:
    names, parents, weights = Kit(KIT).rig_weights()
    assert all(p < i for i, p in enumerate(parents))
    assert names[0] == "Root"
    body = weights[BODY].sum(1)
    assert np.allclose(body[body > 0], 1, atol=1e-5)
    assert (body == 0).mean() < 0.02  # the tongue side of the mouth: only bones that the small rig lacks


# --- a user's own folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """The kit without the metadata that only the kit has."""
    for path in KIT.iterdir():
        if path.name not in ("garments.json", "rigs"):
            (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    (tmp_path / "rigs").mkdir()
    for path in (KIT / "rigs").iterdir():
        (tmp_path / "rigs" / path.name).symlink_to(path)
    return tmp_path


def test_clothes_are_told_by_where_they_sit() -> None:
    """A body of 20 dm; boxes of cloth by their heights in dm."""
    body = np.zeros((BODY.stop, 3))
    body[:, 1] = np.linspace(0, 20, BODY.stop)

    def cloth(low: float, high: float, x: float = 0.0) -> np.ndarray:
        y = np.linspace(low, high, 50)
        return np.stack([np.full(50, x), y, np.zeros(50)], 1)

    assert label_of(cloth(17.5, 21), body) == "hat"
    assert label_of(cloth(0, 3, x=1.5), body) == "shoes"
    assert label_of(cloth(1, 12), body) == "bottom"
    assert label_of(cloth(9, 16), body) == "top"
    assert label_of(cloth(6.5, 16.5), body) == "top"  # a coat
    assert label_of(cloth(1, 16), body) == "onepiece"
    assert label_of(cloth(8, 11, x=6), body) is None  # a glove


@needs_kit
def test_garments_found_without_a_list_are_those_of_the_list(own_folder: Path) -> None:
    kit, listed = Kit(own_folder), Kit(KIT).garments()
    found = kit.garments()
    assert found == classify(kit)
    assert set(found) == set(listed)
    one = {"male_casualsuit01"}  # shirt and jeans of one connected mesh
    assert [p["label"] for p in found["male_casualsuit01"]["parts"]] == ["onepiece"]
    for name in set(listed) - one:
        want = {"top" if p["label"] == "outer" else p["label"] for p in listed[name]["parts"]}
        assert {p["label"] for p in found[name]["parts"]} == want, name
        assert found[name]["gender"] == listed[name]["gender"]
    parts = {p["label"]: p for p in found["female_casualsuit02"]["parts"]}
    assert parts["top"]["faces"] == [[1482, 2743]]
    assert parts["bottom"]["faces"] == [[0, 1481]]
    hides = sum(b - a + 1 for a, b in parts["top"]["hides"])
    assert hides == pytest.approx(1396, rel=0.02)
    assert cast(kit, 3).parts.keys() >= {"top", "bottom"}


@needs_kit
def test_missing_folders_are_named(own_folder: Path, tmp_path: Path) -> None:
    assert Kit(own_folder).check().root == own_folder
    (own_folder / "hair").unlink()
    (own_folder / "rigs" / "game_engine.mhskel").unlink()
    with pytest.raises(PopulaceError, match=r"lacks hair, rigs \(game_engine\)"):
        Kit(own_folder).check()
    with pytest.raises(PopulaceError, match=r"base\.obj is missing"):
        Kit(tmp_path / "nowhere").check()


@needs_kit
def test_rigs_in_the_form_of_mpfb_are_read(own_folder: Path) -> None:
    kit = Kit(KIT)
    names, parents, weights = kit.rig_weights()
    (own_folder / "rigs" / "game_engine.mhskel").unlink()
    folder = own_folder / "rigs" / "standard"
    folder.mkdir()
    corner = int(kit.base.quads[kit.base.groups["joint-l-elbow"]][0, 0])
    ends = {
        "head": {"strategy": "CUBE", "cube_name": "joint-pelvis"},
        "tail": {"strategy": "VERTEX", "vertex_index": 5},
    }
    arm = {"head": {"strategy": "CUBE", "cube_name": "joint-l-elbow"},
           "tail": {"strategy": "MEAN", "vertex_indices": [7, 9]}}  # fmt: skip
    rig = {"arm": arm | {"parent": "root"}, "root": ends | {"parent": ""}}
    (folder / "rig.game_engine.json").write_text(json.dumps(rig))
    table = {"root": [[0, 1.0], [1, 0.5]], "arm": [[1, 1.5]]}
    (folder / "weights.game_engine.json").write_text(json.dumps({"weights": table}))
    own = Kit(own_folder).check()
    bones, joints = own.rig
    assert len(joints[bones["arm"]["head"]]) == 8
    assert corner in joints[bones["arm"]["head"]]
    assert joints[bones["arm"]["tail"]] == [7, 9]
    assert joints[bones["root"]["tail"]] == [5]
    names, parents, weights = own.rig_weights()
    assert (names, parents) == (["root", "arm"], [-1, 0])
    assert weights[:3].tolist() == [[1, 0], [0.25, 0.75], [0, 0]]


@needs_kit
def test_defective_targets_are_noticed(own_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    targets = own_folder / "targets"
    targets.unlink()
    targets.mkdir()
    name = "female-old-minmuscle-minweight-maxcup-averagefirmness"
    other = name.replace("minweight", "averageweight")
    y = Kit(KIT).base.vertices[BODY, 1]
    head, chest = int(y.argmax()), int(np.abs(y - 3).argmin())
    (targets / f"{name}.target").write_text(f"{chest} 0 .1 0\n{head} 0 1 0\n")  # moves the crown by 10 cm
    (targets / f"{other}.target").write_text(f"{chest} 0 .2 0\n")
    (targets / "male-old-maxmuscle-maxweight-minheight.target").write_text("3 0 .1 0\n")
    kit = Kit(own_folder)
    with caplog.at_level("WARNING"):
        index, delta = kit.target(name)
    assert index.tolist() == [chest]
    assert delta.tolist() == [[0, 0.2, 0]]
    assert "known defect" in caplog.text
    assert "male-old-maxmuscle-maxweight-minheight" not in kit.target_paths  # so that the average one is used
    assert (
        Kit(KIT).target(name)[0].tolist() == read_target(Kit(KIT).target_paths[name])[0].tolist()
    )  # the kit's is sound


@needs_kit
def test_sliders_pair_up_without_a_list(own_folder: Path) -> None:
    (own_folder / "modifiers").unlink()
    paired, listed = Kit(own_folder).details, Kit(KIT).details
    assert len(set(listed) & set(paired)) > 0.8 * len(listed)
    assert ("neck-scale-vert-decr", "neck-scale-vert-incr") in paired
