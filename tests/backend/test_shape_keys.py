# SPDX-License-Identifier: GPL-3.0-or-later
"""Shape keys: the same mesh as another person of the same request with one attribute at an end of its range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from backend import checks, exports, families, packet, pipeline, shape_keys, weights
from backend.families.base import FamilyModel
from backend.families.capsule import model as capsule
from backend.families.people import model as people
from backend.protocol import GenerateRequest, PopulaceError, parse_request
from tests.backend.geometry_fields import Shape, ball

SMALL = {"grid_resolution": 64, "faces": 3000, "texture_size": 512, "maps": "color"}


@pytest.fixture(scope="module", params=["capsule", "people"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    device = torch.device("cpu")
    if request.param == "capsule":
        return capsule.load(device)
    return people.load(device, weights.locate("people", tmp_path_factory.mktemp("data")))


def made(model: FamilyModel, **asked: Any) -> packet.HumanAsset:
    raw = {"family": model.name, "seed": 7, **SMALL, **asked}
    return packet.loads(packet.dumps(pipeline.generate(parse_request(raw), model)[0]))


def at_key(asset: packet.HumanAsset, name: str, lod: int = 0) -> np.ndarray:
    k = asset.shape_keys.index(name)
    return np.concatenate([asset.parts[i].vertices + asset.parts[i].shape_keys[k] for i in asset.at_lod(lod)])


def turned(part: packet.Part, moves: np.ndarray) -> float:
    """Share of the triangles that face away from where they faced."""

    def facing(vertices: np.ndarray) -> np.ndarray:
        a, b, c = (vertices[part.faces[:, i]] for i in range(3))
        return np.cross(b - a, c - a)

    return float(((facing(part.vertices) * facing(part.vertices + moves)).sum(1) < 0).mean())


def test_keys_are_the_edited_people_on_the_same_mesh(model: FamilyModel) -> None:
    """Heights within 1 % of those of people made with that attribute, soles on the floor, no folds, at every level of
    detail and in every garment."""
    asset = made(model, shape_keys=["height_m", "weight"], separate=True, lods=2)
    assert asset.shape_keys == ["height_m_min", "height_m_max", "weight_min", "weight_max"]
    bounds = {a.name: (a.low, a.high) for a in families.info(model.name).attributes}
    for name in ("height_m", "weight"):
        for end, value in zip(("min", "max"), bounds[name]):
            edited = made(model, edits=[{"op": "set", "values": {name: value}}])
            for lod in (0, 1):
                y = at_key(asset, f"{name}_{end}", lod)[:, 1]
                assert y.max() - y.min() == pytest.approx(edited.meta["attributes"]["height_m"], rel=0.01)
                assert y.min() == pytest.approx(0, abs=1e-6 if lod == 0 else 0.01)
    assert all(turned(part, moves) < 0.01 for part in asset.parts for moves in part.shape_keys)
    tall, heavy = (at_key(asset, key) for key in ("height_m_max", "weight_max"))
    assert tall[:, 1].max() > heavy[:, 1].max() + 0.1
    assert {"shape_keys": ["height_m", "weight"], "maps": "color"}.items() <= asset.meta["recipe"].items()


def surface_error(asset: packet.HumanAsset, points: np.ndarray) -> float:
    """Mean distance in metres of points to 400,000 others on the surface of the posed person."""
    part, rng = asset.parts[0], np.random.default_rng(0)
    a, b, c = (exports.posed(asset, part)[0][part.faces[:, i]].astype(np.float64) for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    at = rng.choice(len(area), 400_000, p=area / area.sum())
    u, v = rng.random((2, len(at), 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return float(cKDTree(a[at] + u * (b - a)[at] + v * (c - a)[at]).query(points)[0].mean())


@pytest.mark.parametrize("pose", ["walking", "running", "sitting"])
def test_a_posed_person_made_taller_by_a_key_is_the_tall_person_in_that_pose(model: FamilyModel, pose: str) -> None:
    """With the joints of the key: soles on the floor, the surface within 2 mm of the person made so. With those of the
    person at 0 it is centimetres off. A seat's height is the same for all, so thighs of other lengths slope otherwise
    and the key is only nearer."""
    if model.name == "capsule":
        pytest.skip("has no limbs")
    asset = made(model, shape_keys=["height_m"], pose=pose)
    rig, part = asset.rig, asset.parts[0]
    assert rig is not None
    assert part.shape_keys is not None
    ends = {a.name: (a.low, a.high) for a in families.info(model.name).attributes}["height_m"]
    for k, value in enumerate(ends):
        tall = made(model, edits=[{"op": "set", "values": {"height_m": value}}], pose=pose)
        moved = replace(part, vertices=part.vertices + part.shape_keys[k])
        with_joints, _ = exports.posed(replace(asset, rig=rig.at_key(k)), moved)
        without, _ = exports.posed(asset, moved)
        assert with_joints[:, 1].min() == pytest.approx(0, abs=1e-5)
        errors = [surface_error(tall, points) for points in (with_joints, without)]
        assert errors[0] < (errors[1] / 2 if pose == "sitting" else 0.0025)
        assert errors[1] > 0.01


def test_without_keys_nothing_is_said_of_them_and_the_mesh_is_the_same(model: FamilyModel) -> None:
    plain, keyed = made(model), made(model, shape_keys=["weight"])
    assert "shape_keys" not in plain.meta
    assert all(part.shape_keys is None for part in plain.parts)
    for a, b in zip(plain.parts, keyed.parts, strict=True):
        assert np.array_equal(a.vertices, b.vertices)
        assert a.base_color_png == b.base_color_png


def test_what_changes_nothing_moves_nothing(model: FamilyModel) -> None:
    (field,) = model.decode(model.sample(3, 0.7, {}))
    low, high = field.bounds
    points = low + torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * (high - low)
    if model.name == "capsule":
        points = points[field.sdf(points).abs() < 0.05]
    with torch.no_grad():
        assert shape_keys.carried(field, field, points).abs().max() < 1e-6


def test_vertices_keep_their_distance_to_a_surface_that_grows() -> None:
    """A ball of 40 cm that becomes one of 47: points on it and 5 mm inside move outwards by exactly 7 cm."""
    field, other = (Shape(ball(radius)) for radius in (0.40, 0.47))
    field.counterpart = lambda points, _: points  # type: ignore[attr-defined]
    ray = torch.nn.functional.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    for radius in (0.40, 0.395):
        with torch.no_grad():
            moves = shape_keys.carried(field, other, radius * ray)  # type: ignore[arg-type]
        assert torch.allclose(moves, 0.07 * ray, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name", "has"),
    [("people", "sesame", "sex, age_years, height_m, weight, muscle"), ("people", "top_color", "height_m"),
     ("people", "skin_tone", "height_m"), ("capsule", "pattern", "height_m, weight")],
)  # fmt: skip
def test_only_numbers_that_move_the_surface_are_keys(family: str, name: str, has: str) -> None:
    with pytest.raises(PopulaceError, match=f"has no shape keys of '{name}'. It has them of: .*{has}") as caught:
        checks.check(GenerateRequest(family=family, shape_keys=[name]))
    assert caught.value.code == "invalid_request"


def test_a_single_capsule_says_that_it_has_no_attributes(tmp_path: Path) -> None:
    with pytest.raises(PopulaceError, match="no attributes to set"):
        made(capsule.load(torch.device("cpu")), parameters={"single": True}, shape_keys=["weight"])
