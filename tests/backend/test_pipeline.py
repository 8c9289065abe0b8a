# SPDX-License-Identifier: GPL-3.0-or-later
"""The road from request to human, on the analytic family: whole, repeatable, honest about progress and failure."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backend import packet, pipeline
from backend.families.capsule.model import load
from backend.protocol import Cancelled, GenerateRequest, PopulaceError

MODEL = load(torch.device("cpu"))
REQUEST = GenerateRequest(family="capsule", seed=5, grid_resolution=64, faces=3000, texture_size=512)


def changed(**changes: Any) -> GenerateRequest:
    return REQUEST.model_copy(update=changes)


@pytest.fixture(scope="module")
def person() -> packet.HumanAsset:
    return pipeline.generate(REQUEST, MODEL)[0]


def sha256(asset: packet.HumanAsset) -> str:
    return hashlib.sha256(packet.dumps(asset)).hexdigest()


def test_same_request_same_bytes_other_seed_other_person(person: packet.HumanAsset) -> None:
    again, _ = pipeline.generate(REQUEST, MODEL)
    assert sha256(again) == sha256(person)
    other, _ = pipeline.generate(changed(seed=6), MODEL)
    assert sha256(other) != sha256(person)
    assert other.meta["attributes"]["height_m"] != person.meta["attributes"]["height_m"]


def test_person_stands_on_the_floor_closed_and_within_budget(person: packet.HumanAsset) -> None:
    (part,) = person.parts
    assert part.vertices[:, 1].min() == 0
    assert part.vertices[:, 1].max() == pytest.approx(person.meta["attributes"]["height_m"], abs=1e-4)
    assert 1.3 < part.vertices[:, 1].max() < 2.1
    facts = person.meta["parts"][0]
    assert facts["closed"]
    assert facts["components"] == 1
    assert len(part.faces) == facts["faces"] == pytest.approx(3000, rel=0.02)
    outward = np.einsum("ij,ij->", part.vertices[part.faces[:, 0]].astype(np.float64),
                        np.cross(part.vertices[part.faces[:, 1]], part.vertices[part.faces[:, 2]]))  # fmt: skip
    assert outward > 0  # six times the volume


def test_packet_is_complete_and_reads_back(person: packet.HumanAsset) -> None:
    read = packet.loads(packet.dumps(person))
    (part,) = read.parts
    for png in (part.base_color_png, part.normal_png):
        assert Image.open(io.BytesIO(png)).size == (512, 512)
    assert part.uvs.min() >= 0
    assert part.uvs.max() <= 1
    assert np.allclose(np.linalg.norm(part.normals, axis=1), 1, atol=1e-4)
    assert read.rig is not None
    assert part.skin_weights is not None
    assert np.allclose(part.skin_weights.sum(1), 1, atol=1e-5)
    assert read.meta["recipe"] == {**REQUEST.model_dump(mode="json", exclude={"latents", "prompt", "edits"}), "weights_sha256": None,
                                   "version": read.meta["recipe"]["version"]}  # fmt: skip


def test_progress_never_falls_and_names_every_stage() -> None:
    seen: list[tuple[str, float]] = []
    _, stats = pipeline.generate(REQUEST, MODEL, lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == pytest.approx(1)
    assert list(dict.fromkeys(stage for stage, _ in seen)) == list(pipeline.STAGES)
    assert stats["seconds"].keys() == {*pipeline.STAGES, "total"}
    assert stats["counts"]["fine_faces"] > stats["counts"]["faces"]
    assert all(mib > 10 for mib in stats["peak_rss_mib"].values())


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_cancel_is_heard_in_every_stage(stage: str) -> None:
    def step(now: str, fraction: float) -> None:
        if now == stage:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.generate(REQUEST, MODEL, step)


def test_latents_of_a_person_replace_those_of_the_seed(person: packet.HumanAsset) -> None:
    latents = {name: codes.tolist() for name, codes in person.latents.items()}
    copy, _ = pipeline.generate(changed(seed=99, latents=latents), MODEL)
    assert np.array_equal(copy.parts[0].vertices, person.parts[0].vertices)
    assert copy.parts[0].base_color_png == person.parts[0].base_color_png


@pytest.mark.parametrize(
    ("latents", "says"),
    [
        ({"nose": [[0.0]]}, "no latents called 'nose'"),
        ({"body/shape": [[0.0, 0.0]]}, "1x2 numbers instead of 1x8"),
        ({"body/shape": [[0.0] * 8, [0.0] * 8]}, "2x8 numbers instead of 1x8"),
        ({"body/shape": [[1e300] * 8]}, "too large"),
    ],
)
def test_f16_wrong_latents_fail_before_any_work(latents: dict[str, list[list[float]]], says: str) -> None:
    class Untouchable(type(MODEL)):
        def decode(self, latents: object, separate: bool = False) -> list[Any]:
            raise AssertionError("decoded")

    with pytest.raises(PopulaceError, match=says) as caught:
        pipeline.generate(changed(latents=latents), Untouchable(torch.device("cpu")))
    assert caught.value.code == "invalid_latents"
    assert caught.value.hint


@pytest.mark.parametrize("parameters", [{"singel": True}, {"single": 1}, {"single": "yes"}])
def test_wrong_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(PopulaceError) as caught:
        pipeline.generate(changed(parameters=parameters), MODEL)
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize("value", [1.0, -1.0, float("nan")], ids=["all outside", "all inside", "NaN"])
def test_f17_field_without_a_surface_gives_empty_surface(value: float) -> None:
    field = MODEL.decode(MODEL.sample(0, 0.7, {}))[0]

    class Nothing(type(field)):
        def sdf(self, points: torch.Tensor) -> torch.Tensor:
            return torch.full_like(points[:, 0], value)

    class Empty(type(MODEL)):
        def decode(self, latents: Any, separate: bool = False) -> list[Any]:
            found = super().decode(latents)[0]
            found.__class__ = Nothing
            return [found]

    with pytest.raises(PopulaceError, match="5") as caught:
        pipeline.generate(REQUEST, Empty(torch.device("cpu")))
    assert caught.value.code == "empty_surface"


def test_two_parts_share_the_budget_and_the_floor() -> None:
    class Two(type(MODEL)):
        def decode(self, latents: Any, separate: bool = False) -> list[Any]:
            small = load(self.device)
            return [*super().decode(latents), *small.decode(small.sample(1, 0.5, {"single": True}))]

    asset, _ = pipeline.generate(REQUEST, Two(torch.device("cpu")))
    assert len(asset.parts) == 2
    assert asset.parts[1].skin_indices is None
    assert sum(len(part.faces) for part in asset.parts) == pytest.approx(3000, rel=0.02)
    assert min(part.vertices[:, 1].min() for part in asset.parts) == 0
    assert packet.loads(packet.dumps(asset)).meta == asset.meta


def test_mesh_facts_see_holes_and_shells() -> None:
    tetrahedron = np.array([(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)])
    assert pipeline.mesh_facts(tetrahedron, 4) == {"faces": 4, "closed": True, "components": 1}
    assert not pipeline.mesh_facts(tetrahedron[:3], 4)["closed"]
    assert not pipeline.mesh_facts(np.concatenate([tetrahedron[:3], tetrahedron[3:, ::-1]]), 4)["closed"]
    two = np.concatenate([tetrahedron, tetrahedron + 4])
    assert pipeline.mesh_facts(two, 8) == {"faces": 8, "closed": True, "components": 2}
