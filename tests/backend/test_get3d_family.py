# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D on the main road, with small random weights: closed meshes, the same bytes, texture apart from shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from backend import checks, packet, pipeline
from backend.families.base import LatticeField
from backend.families.get3d.config import Config
from backend.families.get3d.model import Get3dField, Get3dModel, PlaneField, load, metadata_of
from backend.families.get3d.networks import Generator
from backend.geometry import reference
from backend.geometry.mesh import signed_volume
from backend.geometry.tetgrid import extract_surface
from backend.protocol import GenerateRequest, Mix, Person, PopulaceError, Reroll
from backend.tensors import dump_tensors
from backend.weights import Weights

CPU = torch.device("cpu")
SMALL = {"family": "get3d", "grid_resolution": 32, "faces": 1000, "texture_size": 512, "maps": "color"}


def generator(kind: str = "unified", **changes) -> Generator:
    """Random shapes with a surface; the mean codes are not zero."""
    torch.manual_seed(0)
    net = Generator(Config.tiny(kind=kind, resolution=16, **changes))
    with torch.no_grad():
        for mapping in (net.mapping, net.mapping_geo):
            mapping.w_avg.normal_(0, 0.1)
    return net


@pytest.fixture(scope="module")
def model() -> Get3dModel:
    return Get3dModel(generator(), CPU, "0" * 64)


def request(**changes) -> GenerateRequest:
    return GenerateRequest.model_validate({**SMALL, **changes})


def test_seed_to_closed_object_and_the_same_seed_the_same_bytes(model: Get3dModel) -> None:
    (first, stats), (again, _) = (pipeline.generate(request(seed=3), model) for _ in range(2))
    assert first.meta["stats"]["closed"]
    assert first.meta["parts"][0]["name"] == "object"
    assert first.meta["attributes"]["height_m"] == pytest.approx(1.7, rel=0.05)
    assert packet.dumps(first) == packet.dumps(again)
    assert stats["counts"]["fine_faces"] > 1000
    volume = signed_volume(torch.from_numpy(first.parts[0].vertices), torch.from_numpy(first.parts[0].faces).long())
    assert volume > 0
    other, _ = pipeline.generate(request(seed=4), model)
    assert packet.dumps(other) != packet.dumps(first)


def test_another_texture_changes_no_vertex_bit(model: Get3dModel) -> None:
    plain, _ = pipeline.generate(request(seed=3), model)
    again, _ = pipeline.generate(request(seed=3, edits=[Reroll(op="reroll", seed=9, kinds=["tex"])]), model)
    for name in ("vertices", "faces", "normals", "uvs", "face_uvs_idx"):
        assert np.array_equal(getattr(plain.parts[0], name), getattr(again.parts[0], name)), name
    assert plain.parts[0].base_color_png != again.parts[0].base_color_png


def test_latents_of_a_packet_make_the_object_again(model: Get3dModel) -> None:
    made, _ = pipeline.generate(request(seed=3), model)
    rows = {name: code.tolist() for name, code in made.latents.items()}
    expected = {"body/shape": (model.config.geo_rows, 32), "body/tex": (model.config.tex_rows, 32), "body/size": (1, 1)}
    assert {name: (len(r), len(r[0])) for name, r in rows.items()} == expected
    again, _ = pipeline.generate(request(seed=77, latents=rows), model)
    assert np.array_equal(made.parts[0].vertices, again.parts[0].vertices)
    assert made.parts[0].base_color_png == again.parts[0].base_color_png
    rows["body/shape"].pop()
    checks.check(request(latents=rows))  # how many rows there must be only the weights know
    with pytest.raises(PopulaceError, match="'body/shape' are 9x32 numbers; these weights take 10x32") as caught:
        pipeline.generate(request(latents=rows), model)
    assert caught.value.code == "invalid_latents"


def test_interpolation_is_a_straight_line_in_w_and_ends_where_it_should(model: Get3dModel) -> None:
    def codes(*edits) -> dict[str, Tensor]:
        from backend.edits import choose_latents

        return dict(choose_latents(request(seed=1, edits=list(edits)), model).codes)

    def mix(amount: float) -> Mix:
        return Mix(op="mix", other=Person(seed=2, truncation_psi=0.7), amount=amount)

    here, there, middle = codes(), codes(mix(1.0)), codes(mix(0.5))
    expected = model.sample(2, 0.7, {}).codes
    for name in ("body/shape", "body/tex"):
        assert torch.equal(there[name], expected[name])
        assert torch.allclose(middle[name], (here[name] + there[name]) / 2, atol=1e-6)


def test_truncation_and_style_mixing_by_rows(model: Get3dModel) -> None:
    mean = model.sample(5, 0.0, {}).codes
    assert torch.allclose(mean["body/shape"], model.generator.mapping_geo.w_avg.expand(10, -1))
    own, other = model.sample(5, 0.7, {}).codes, model.sample(6, 0.7, {}).codes
    asked = {"style_seed": 6, "style_shape_row": 4}
    checks.check(request(parameters=asked))
    mixed = model.sample(5, 0.7, asked).codes
    assert torch.equal(mixed["body/shape"][:4], own["body/shape"][:4])
    assert torch.equal(mixed["body/shape"][4:], other["body/shape"][4:])
    assert torch.equal(mixed["body/tex"], own["body/tex"])
    with pytest.raises(PopulaceError, match="style_shape_row"):
        checks.check(request(parameters={"style_shape_row": 100}))


def test_height_is_metres_and_scales_everything(model: Get3dModel) -> None:
    latents = model.sample(3, 0.7, {})
    assert model.describe(latents) == {"height_m": pytest.approx(1.7)}
    taller = model.edit(latents, {"height_m": 3.4})
    small, large = (extract_surface(model.decode(x)[0], 32) for x in (latents, taller))
    assert torch.allclose(2 * small.vertices, large.vertices, atol=1e-5)
    assert torch.equal(small.faces, large.faces)


@pytest.mark.parametrize("kind", ["unified", "separate"])
def test_the_fast_extraction_is_the_dense_one(kind: str) -> None:
    field = Get3dModel(generator(kind), CPU).decode(Get3dModel(generator(kind), CPU).sample(3, 0.7, {}))[0]
    assert isinstance(field, LatticeField) == (kind == "unified")
    fast, dense = extract_surface(field, 24), reference.extract_dense(field, 24)
    assert len(fast.faces) == len(dense.faces)
    order = [np.lexsort(mesh.vertices.numpy().round(3).T) for mesh in (fast, dense)]
    points = [mesh.vertices.numpy()[o] for mesh, o in zip((fast, dense), order)]
    assert np.median(np.abs(points[0] - points[1])) < 1e-5
    volumes = [signed_volume(mesh.vertices, mesh.faces) for mesh in (fast, dense)]
    assert volumes[0] == pytest.approx(volumes[1], rel=1e-4)


def test_vertices_are_the_generators_own(model: Get3dModel) -> None:
    """Node by node: -sdf is the raw value, vertices move by tanh(def) / tet_res, colours are (rgb + 1) / 2 there."""
    latents = model.sample(3, 0.7, {})
    field = model.decode(latents)[0]
    points = 0.3 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    codes = latents.codes
    with torch.no_grad():
        decoded = model.generator.synthesis(codes["body/shape"][None], codes["body/tex"][None])
        raw, rgb, moved = decoded.sdf(points[None])[0], decoded.color(points[None])[0], decoded.offset(points[None])[0]
        deform = decoded.deform(points[None])[0]
    metres = points * field.metres
    assert torch.equal(field.sdf(metres) < 0, raw > 0)
    assert torch.allclose(field.sdf(metres) * (-field.steepness / field.metres), raw, atol=1e-4)
    assert torch.allclose(field.offset(metres), moved * field.metres, atol=1e-5)
    assert torch.allclose(moved, torch.tanh(deform) / 64)
    assert torch.allclose(field.color(metres), ((rgb + 1) / 2).clamp(0, 1), atol=1e-4)
    assert field.material(metres).shape == (50, 2)


@pytest.mark.parametrize(("value", "says"), [(-50.0, "is empty"), (50.0, "fills its whole cube")])
def test_shapes_without_a_surface_are_a_sentence(value: float, says: str) -> None:
    net = generator()
    torch.nn.init.constant_(net.synthesis.generator.mlp_synthesis_sdf.layers[1].bias, value)
    model = Get3dModel(net, CPU)
    with pytest.raises(PopulaceError, match=f"Seed 3: .*{says}|{says}") as caught:
        pipeline.generate(request(seed=3), model)
    assert caught.value.code == "empty_surface"


def test_shapes_that_reach_the_border_are_capped() -> None:
    net = generator()
    torch.nn.init.constant_(net.synthesis.generator.mlp_synthesis_sdf.layers[1].bias, 2.0)  # nearly everything inside
    model = Get3dModel(net, CPU)
    field = model.decode(model.sample(3, 0.7, {}))[0]
    assert isinstance(field, PlaneField)
    inside = [field.sdf(torch.rand(1000, 3, generator=torch.Generator().manual_seed(1)) - 0.5) < 0
              for field in (field, Get3dModel(generator(), CPU).decode(model.sample(3, 0.7, {}))[0])]  # fmt: skip
    assert inside[0].sum() > inside[1].sum() > 0
    asset, _ = pipeline.generate(request(seed=3), model)
    assert asset.meta["stats"]["closed"]


def test_weights_without_a_generators_description_are_refused(tmp_path) -> None:
    net = generator()
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}

    def written(notes: dict[str, str]) -> Weights:
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"".join(dump_tensors(arrays, notes)))
        return Weights("get3d", "0" * 64, (path,))

    loaded = load(CPU, written(metadata_of(net.config)))
    assert loaded.config == net.config
    codes = [x.sample(3, 0.7, {}).codes["body/tex"] for x in (loaded, Get3dModel(net, CPU))]
    assert torch.equal(*codes)
    for notes in ({}, {"get3d": "{"}, {"get3d": '{"colour": 1}'}):
        with pytest.raises(PopulaceError, match="which GET3D generator"):
            load(CPU, written(notes))
    with pytest.raises(PopulaceError, match="has shape"):
        load(CPU, written(metadata_of(dataclasses.replace(net.config, limit=16))))


def test_fields_can_be_asked_by_many_points_at_once(model: Get3dModel, monkeypatch: pytest.MonkeyPatch) -> None:
    field = model.decode(model.sample(3, 0.7, {}))[0]
    points = torch.rand(1000, 3) - 0.5
    whole = field.sdf(points), field.color(points), field.offset(points)
    monkeypatch.setattr("backend.families.get3d.model._CHUNK", 64)
    for a, b in zip(whole, (field.sdf(points), field.color(points), field.offset(points))):
        assert torch.allclose(a, b, atol=1e-6)
    assert isinstance(field, Get3dField)
