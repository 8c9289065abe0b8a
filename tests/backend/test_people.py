# SPDX-License-Identifier: GPL-3.0-or-later
"""The embedded default model: its people are closed, differ, repeat, and its parts keep to themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend import families, weights
from backend.families.base import Latents
from backend.families.people.config import BODY_DIM, PARTS
from backend.families.people.model import REGIONS, PeopleModel, load
from backend.geometry.clean import clean
from backend.geometry.tetgrid import extract_surface
from backend.pipeline import mesh_facts
from backend.protocol import PopulaceError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PeopleModel:
    return load(torch.device("cpu"), weights.locate("people", tmp_path_factory.mktemp("data")))


def naked(model: PeopleModel, seed: int = 1, psi: float = 0.8) -> Latents:
    codes = model.sample(seed, psi).codes
    return Latents("people", {k: v for k, v in codes.items() if k.startswith("body/")})


def dressed(model: PeopleModel, *parts: str) -> Latents:
    """The first person who wears all of `parts`."""
    for seed in range(200):
        latents = model.sample(seed, 0.7)
        if all(f"{p}/shape" in latents.codes for p in parts):
            return latents
    raise AssertionError(f"nobody of 200 wears {parts}")


def test_a_seed_is_one_person(model: PeopleModel) -> None:
    first, again, other = (model.sample(s, 0.7).codes for s in (5, 5, 6))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.allclose(first["body/shape"], other["body/shape"], atol=0.1)


def test_truncation_pulls_together(model: PeopleModel) -> None:
    """Half of psi is half of the way to the mean of a sex; there are two of those."""
    none, half, full = ([model.sample(s, psi).codes["body/shape"] for s in range(40)] for psi in (0.0, 0.5, 1.0))
    assert len({tuple(code[0].tolist()) for code in none}) == 2
    assert all(torch.allclose(b, (a + c) / 2, atol=1e-5) for a, b, c in zip(none, half, full, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_people_are_closed_surfaces(model: PeopleModel, seed: int) -> None:
    mesh = clean(extract_surface(model.decode(model.sample(seed, 0.7))[0], 96))
    facts = mesh_facts(mesh.faces.numpy(), len(mesh.vertices))
    assert facts["closed"]
    assert facts["components"] == 1
    height = float(np.ptp(mesh.vertices[:, 1].numpy()))
    assert 1.35 < height < 2.2


@torch.no_grad()
def test_height_is_the_height_of_the_attribute(model: PeopleModel) -> None:
    for seed in (3, 4):
        latents = naked(model, seed)
        standard = model.networks.attributes(latents.codes["body/shape"])[0, 2]
        mean, std = (
            model.facts[f"attribute_{k}"][model.facts["attributes"].index("height_m")] for k in ("mean", "std")
        )
        mesh = clean(extract_surface(model.decode(latents)[0], 128))
        assert np.ptp(mesh.vertices[:, 1].numpy()) == pytest.approx(mean + std * float(standard), rel=0.02)


@torch.no_grad()
def test_inside_is_negative_and_the_box_holds_everything(model: PeopleModel) -> None:
    field = model.decode(model.sample(2, 0.7))[0]
    lo, hi = field.bounds
    chest = torch.tensor([[0.0, 1.2, 0.03], [0.0, 1.58, 0.04], [0.12, 0.6, 0.02]])
    assert (field.sdf(chest) < -0.02).all()
    grid = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    for axis in range(3):
        for side in (0.0, 1.0):
            face = grid.clone()
            face[:, axis] = side
            assert (field.sdf(lo + face * (hi - lo)) > 0).all()


@torch.no_grad()
def test_clothes_cover_the_skin_and_nothing_else(model: PeopleModel) -> None:
    latents = dressed(model, "top", "bottom", "shoes")
    full = model.decode(latents)[0]
    bare = model.decode(naked_of(latents))[0]
    body = clean(extract_surface(bare, 96)).points
    moved = (full.sdf(body) - bare.sdf(body)).abs()
    region = full.region(body)
    torso, hands = (region == REGIONS.index("torso")), (region == REGIONS.index("hand_l"))
    assert (full.sdf(body)[torso & (body[:, 1] > 1.05) & (body[:, 1] < 1.25)] < -0.002).float().mean() > 0.9
    assert float(moved[hands].median()) < 1e-3
    without_top = {k: v for k, v in latents.codes.items() if not k.startswith("top/")}
    other = model.decode(Latents("people", without_top))[0]
    feet = body[body[:, 1] < 0.15]
    assert torch.equal(full.sdf(feet), other.sdf(feet))
    assert torch.equal(full.color(feet), other.color(feet))


def naked_of(latents: Latents) -> Latents:
    return Latents(latents.family, {k: v for k, v in latents.codes.items() if k.startswith("body/")})


@torch.no_grad()
def test_a_new_texture_moves_no_surface_and_a_palette_colours_it(model: PeopleModel) -> None:
    latents = dressed(model, "top")
    red = dict(latents.codes)
    red["top/tex"] = red["top/tex"].clone()
    red["top/tex"][0, :6] = torch.tensor([0.9, 0.05, 0.05, 0.9, 0.05, 0.05])
    blue = dict(red)
    blue["top/tex"] = red["top/tex"].clone()
    blue["top/tex"][0, :6] = torch.tensor([0.05, 0.05, 0.9, 0.05, 0.05, 0.9])
    fields = [model.decode(Latents("people", c))[0] for c in (red, blue)]
    points = clean(extract_surface(fields[0], 64)).points
    assert torch.equal(fields[0].sdf(points), fields[1].sdf(points))
    top = fields[0].label(points) == 1 + fields[0].worn.index("top")
    assert top.float().mean() > 0.1
    means = [f.color(points)[top].mean(0) for f in fields]
    assert means[0][0] > means[1][0] + 0.2
    assert means[1][2] > means[0][2] + 0.2
    assert torch.equal(fields[0].color(points)[~top], fields[1].color(points)[~top])


@torch.no_grad()
def test_deformation_follows_the_body_decoder(model: PeopleModel) -> None:
    field = model.decode(naked(model, 9, 1.0))[0]
    controls = torch.from_numpy(np.asarray(model.tree.data, np.float32))[::97]
    error = (field.offset(controls) - field.displacement[::97]).norm(dim=1)
    assert float(field.displacement.norm(dim=1).max()) > 0.03
    assert float(error.quantile(0.99)) < 0.004


@torch.no_grad()
def test_rig_binds_the_limbs(model: PeopleModel) -> None:
    codes = dict(naked(model).codes)
    codes["body/shape"] = torch.zeros(1, BODY_DIM)
    field = model.decode(Latents("people", codes))[0]
    points = clean(extract_surface(field, 96)).points
    which, weight = field.skin(points)
    assert torch.allclose(weight.sum(1), torch.ones(len(points)), atol=1e-5)
    strongest = which[torch.arange(len(which)), weight.argmax(1)]
    names = np.array(model.bones)[strongest.numpy()]
    left = points[:, 0].numpy() > 0.42
    assert all(n.endswith("_l") for n in names[left])
    heads = dict(zip(field.rig.names, field.rig.heads, strict=True))
    inner = torch.stack(
        [heads[n] for n in ("spine_02", "thigh_l", "thigh_r", "calf_l", "upperarm_r", "lowerarm_l", "head")]
    )
    assert (field.body_sdf(inner) < 0).all()
    assert heads["hand_l"][0] > 0.3
    assert heads["hand_r"][0] < -0.3


def test_strange_latents_are_refused(model: PeopleModel) -> None:
    good = dict(model.sample(0, 0.7).codes)
    for change in (
        {"wings/shape": torch.zeros(1, 8)},
        {"body/shape": torch.zeros(1, 3)},
        {"body/tex": torch.zeros(2, 32)},
    ):
        with pytest.raises(PopulaceError) as caught:
            model.decode(Latents("people", good | change))
        assert caught.value.code == "invalid_latents"
    with pytest.raises(PopulaceError, match="missing"):
        model.decode(Latents("people", {"body/shape": good["body/shape"]}))


def test_weights_of_another_version_are_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    found = weights.locate("people", tmp_path)
    with safe_open(found.paths[0], "np") as file:
        metadata = file.metadata()
    state = load_file(found.paths[0])
    del state["attributes.bias"]
    save_file(state, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(PopulaceError, match=r"attributes\.bias") as caught:
        load(torch.device("cpu"), weights.Weights("people", "", (tmp_path / "bad.safetensors",)))
    assert caught.value.code == "weights_corrupt"


def test_the_registry_puts_people_first() -> None:
    assert families.infos()[0].name == "people"
    assert set(PARTS) == {"shoes", "bottom", "top", "hair", "accessory"}


@torch.no_grad()
def test_the_height_that_is_asked_for_is_the_height_that_stands_there(model: PeopleModel) -> None:
    latents = naked(model, 5)
    for height in (1.52, 1.93):
        edited = model.edit(latents, {"height_m": height})
        mesh = clean(extract_surface(model.decode(edited)[0], 128))
        assert np.ptp(mesh.vertices[:, 1].numpy()) == pytest.approx(height, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize(
    "values",
    [{"sex": 0.9}, {"sex": 0.1}, {"age_years": 75.0}, {"weight": 0.85}, {"muscle": 0.8}, {"height_m": 1.9},
     {"skin_tone": 0.8}, {"top_color": [0.8, 0.1, 0.1]}, {"hair_color": [0.6, 0.6, 0.6]}, {"eye_color": "blue"},
     {"bottom": "skirt"}, {"top": "none"}, {"top": "suit jacket"}, {"hair": "afro"}, {"accessory": "hat"}],
)  # fmt: skip
def test_an_attribute_is_set_and_little_else_moves(model: PeopleModel, values: dict) -> None:
    latents = dressed(model, "top", "bottom", "shoes", "hair")
    before = model.describe(latents)
    after = model.describe(model.edit(latents, values))
    (name, value), *_ = values.items()
    if isinstance(value, float):
        assert after[name] == pytest.approx(value, rel=0.02, abs=0.02)
    elif isinstance(value, list):
        assert after[name] == pytest.approx(value, abs=1e-3)
    else:
        assert after[name] == value
    part = name.removesuffix("_color")
    for other in before.keys() & after.keys() - {name, part, f"{part}_color"}:
        if isinstance(before[other], float):
            bound = 0.3 if other == "height_m" else 2.0 if other == "age_years" else 0.04
            assert abs(float(after[other]) - float(before[other])) < (0.004 if other == "height_m" else bound), other
        else:
            assert after[other] == before[other], other


def test_every_choice_of_the_family_can_be_worn(model: PeopleModel) -> None:
    latents = model.sample(3, 0.7)
    for attribute in families.info("people").attributes:
        for choice in attribute.choices:
            described = model.describe(model.edit(latents, {attribute.name: choice}))
            assert described[attribute.name] == choice


@torch.no_grad()
def test_a_new_top_leaves_face_hands_and_feet_alone(model: PeopleModel) -> None:
    latents = dressed(model, "top", "bottom", "shoes")
    field = model.decode(latents)[0]
    points = clean(extract_surface(field, 96)).points
    region = torch.tensor([REGIONS[int(r)].split("_")[0] == "hand" for r in field.region(points)])
    kept = region | (points[:, 1] < 0.1) | ((points[:, 1] > 1.52) & (points[:, 2] > 0.05))
    for choice in ("suit jacket", "t-shirt", "none"):
        other = model.decode(model.edit(latents, {"top": choice}))[0]
        assert float((other.sdf(points[kept]) - field.sdf(points[kept])).abs().quantile(0.95)) < 1e-3


@torch.no_grad()
def test_a_mix_of_two_garments_has_its_hem_in_between(model: PeopleModel) -> None:
    latents = model.edit(dressed(model, "top", "bottom"), {"bottom": "trousers"})
    ends = [dict(model.edit(latents, {"bottom": b}).codes) for b in ("long skirt", "skirt")]
    column = torch.stack([torch.zeros(400), torch.linspace(0.05, 0.9, 400), torch.full((400,), 0.02)], 1)

    def hem(share: float) -> float:
        code = torch.lerp(ends[0]["bottom/shape"], ends[1]["bottom/shape"], share)
        field = model.decode(Latents("people", ends[0] | {"bottom/shape": code}))[0]
        inside = field.layers(column)[1 + field.worn.index("bottom")] < 0
        return float(column[inside, 1].min())

    long, middle, short = hem(0), hem(0.5), hem(1)
    assert short - long > 0.2
    assert middle == pytest.approx((short + long) / 2, abs=0.01)


@torch.no_grad()
def test_separate_objects_are_closed_and_make_up_the_person(model: PeopleModel) -> None:
    latents = dressed(model, "top", "bottom", "shoes", "hair")
    fields = model.decode(latents, separate=True)
    assert [f.name for f in fields] == ["body", *fields[0].worn]
    for field in fields:
        mesh = clean(extract_surface(field, 128))
        facts = mesh_facts(mesh.faces.numpy(), len(mesh.vertices))
        assert facts["closed"], field.name
        assert len(mesh.faces) > 200, field.name


@torch.no_grad()
def test_eyes_shine_more_than_skin_and_skin_more_than_cloth(model: PeopleModel) -> None:
    """Roughness on the surface, part by part, from the same field that colours it; nothing is of metal."""
    (field,) = model.decode(dressed(model, "top", "shoes"))
    mesh = extract_surface(field, 160)
    roughness, metallic = field.material(mesh.points).unbind(1)
    label = field.label(mesh.points)
    assert ((roughness >= 0) & (roughness <= 1)).all()
    assert not metallic.any()
    body, top = (roughness[label == field.person.parts.index(part)] for part in ("body", "top"))
    assert body.min() < 0.25 < 0.35 < body.median() < 0.65 < top.median()
    wet = mesh.vertices[(label == 0) & (roughness < 0.2)]
    assert (wet[:, 1] > 0.85 * mesh.vertices[:, 1].amax()).all()  # nowhere but in the face
