# SPDX-License-Identifier: GPL-3.0-or-later
"""The reader of MakeHuman formats: hand-made files with answers by hand, and the kit's published check values."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from backend.training.makehuman import BODY, Kit, macro_weights, read_material, read_obj, read_proxy, read_target

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
