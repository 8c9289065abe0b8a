# SPDX-License-Identifier: GPL-3.0-or-later
"""The road from request to human, on the analytic family: whole, repeatable, honest about progress and failure."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
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
    for png in (part.base_color_png, part.normal_png, part.orm_png):
        assert png is not None
        assert Image.open(io.BytesIO(png)).size == (512, 512)
    assert part.uvs.min() >= 0
    assert part.uvs.max() <= 1
    assert np.allclose(np.linalg.norm(part.normals, axis=1), 1, atol=1e-4)
    assert read.rig is not None
    assert part.skin_weights is not None
    assert np.allclose(part.skin_weights.sum(1), 1, atol=1e-5)
    left_out = {"latents", "latent_maps", "photos", "inversion", "prompt", "edits"}
    asked = REQUEST.model_dump(mode="json", exclude=left_out)
    assert read.meta["recipe"] == {**asked, "weights_sha256": None, "version": read.meta["recipe"]["version"]}


def test_colour_alone_leaves_the_other_maps_out(person: packet.HumanAsset) -> None:
    plain, _ = pipeline.generate(changed(maps="color"), MODEL)
    assert plain.parts[0].normal_png is plain.parts[0].orm_png is None
    assert plain.parts[0].base_color_png == person.parts[0].base_color_png
    assert len(packet.dumps(plain)) < len(packet.dumps(person))


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


@pytest.fixture(scope="module")
def detailed() -> packet.HumanAsset:
    return pipeline.generate(changed(faces=4000, lods=4, texture_size=1024), MODEL)[0]


def test_levels_of_detail_quarter_the_faces_and_halve_the_textures(detailed: packet.HumanAsset) -> None:
    facts = detailed.meta["parts"]
    assert [fact["name"] for fact in facts] == ["human", "human_LOD1", "human_LOD2", "human_LOD3"]
    assert [fact["lod"] for fact in facts] == [0, 1, 2, 3]
    assert all(fact["closed"] and fact["components"] == 1 for fact in facts)
    assert [fact["faces"] for fact in facts] == [pytest.approx(n, abs=2) for n in (4000, 1000, 250, pipeline.MIN_FACES)]
    sizes = [Image.open(io.BytesIO(part.base_color_png)).size for part in detailed.parts]
    assert sizes == [(n, n) for n in (1024, 512, 256, 256)]
    assert detailed.meta["stats"]["faces"] == facts[0]["faces"]
    assert packet.loads(packet.dumps(detailed)).meta == detailed.meta


def test_levels_of_detail_are_the_same_person_on_one_skeleton(detailed: packet.HumanAsset) -> None:
    """The full level does not depend on the others, and every level lies on the analytic surface with its skin."""
    alone, _ = pipeline.generate(changed(faces=4000, texture_size=1024), MODEL)
    assert np.array_equal(alone.parts[0].vertices, detailed.parts[0].vertices)
    assert alone.parts[0].base_color_png == detailed.parts[0].base_color_png
    (field,) = MODEL.decode(MODEL.sample(5, 0.7, {}))
    full = {tuple(v): (i, w) for v, i, w in zip(detailed.parts[0].vertices.tolist(),
            detailed.parts[0].skin_indices.tolist(), detailed.parts[0].skin_weights.tolist())}  # fmt: skip
    for part in detailed.parts[1:]:
        on_surface = field.sdf(torch.from_numpy(part.vertices))
        assert on_surface.abs().max() < 0.006  # metres: a cell is 27 mm
        skin = zip(part.skin_indices.tolist(), part.skin_weights.tolist())
        assert [full[tuple(v)] for v in part.vertices.tolist()] == list(skin)  # its vertices are some of the full ones


def test_separate_objects_are_asked_for() -> None:
    class Apart(type(MODEL)):
        def decode(self, latents: Any, separate: bool = False) -> list[Any]:
            small = load(self.device)
            extra = small.decode(small.sample(1, 0.5, {"single": True}))
            extra[0].name = "hat"
            return [*super().decode(latents), *extra[: int(separate)]]

    model = Apart(torch.device("cpu"))
    assert len(pipeline.generate(REQUEST, model)[0].parts) == 1
    asset, _ = pipeline.generate(changed(separate=True, lods=2), model)
    assert [fact["name"] for fact in asset.meta["parts"]] == ["human", "hat", "human_LOD1", "hat_LOD1"]
    for lod, faces in ((0, 3000), (1, 750)):
        found = [fact["faces"] for fact in asset.meta["parts"] if fact["lod"] == lod]
        assert sum(found) == pytest.approx(faces, rel=0.02)


def test_same_request_same_bytes_with_everything_asked_for() -> None:
    request = pipeline.GenerateRequest.model_validate({
        **REQUEST.model_dump(), "prompt": "tall, red top, with a beard", "lods": 2, "pose": "sitting", "edits": [
            {"op": "vary", "seed": 3, "amount": 0.5}, {"op": "words", "text": "glasses"},
            {"op": "set", "values": {"height_m": 1.85}}]})  # fmt: skip
    first, again = (pipeline.generate(request, MODEL)[0] for _ in range(2))
    assert sha256(first) == sha256(again)
    assert first.meta["words_ignored"] == ["beard", "glasses"]
    assert first.meta["attributes"]["height_m"] == pytest.approx(1.85, abs=0.006)  # measured on the mesh
    assert first.meta["asked"]["prompt"] == request.prompt
    assert [edit["op"] for edit in first.meta["asked"]["edits"]] == ["vary", "words", "set"]
    assert first.rig.rotations is None or first.rig.rotations.shape == (len(first.meta["bones"]), 4)
    latents = {name: codes.tolist() for name, codes in first.latents.items()}
    recipe = {k: v for k, v in first.meta["recipe"].items() if k not in ("version", "weights_sha256")}
    copy, _ = pipeline.generate(pipeline.GenerateRequest.model_validate({**recipe, "latents": latents}), MODEL)
    for mine, theirs in zip(first.parts, copy.parts, strict=True):
        assert np.array_equal(mine.vertices, theirs.vertices)
        assert mine.base_color_png == theirs.base_color_png


def test_new_looks_leave_geometry_and_uvs_alone(person: packet.HumanAsset) -> None:
    request = pipeline.GenerateRequest.model_validate(
        {**REQUEST.model_dump(), "edits": [{"op": "reroll", "seed": 77, "kinds": ["tex"]}]})  # fmt: skip
    (mine,), (theirs,) = person.parts, pipeline.generate(request, MODEL)[0].parts
    for name in ("vertices", "faces", "normals", "uvs", "face_uvs_idx", "skin_indices", "skin_weights"):
        assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    assert mine.normal_png == theirs.normal_png
    assert mine.base_color_png != theirs.base_color_png


def test_attributes_are_told_and_the_height_is_measured(person: packet.HumanAsset) -> None:
    said = MODEL.describe(MODEL.sample(5, 0.7, {}))
    assert {k: v for k, v in person.meta["attributes"].items() if k != "height_m"} == {
        k: v for k, v in said.items() if k != "height_m"}  # fmt: skip
    assert person.meta["attributes"]["height_m"] == pytest.approx(said["height_m"], abs=0.006)
    assert "words_ignored" not in person.meta
    assert "asked" not in person.meta


def test_a_pose_wants_a_skeleton() -> None:
    with pytest.raises(PopulaceError, match="no skeleton"):
        pipeline.generate(changed(pose="sitting", parameters={"single": True}), MODEL)


def test_mesh_facts_see_holes_and_shells() -> None:
    tetrahedron = np.array([(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)])
    assert pipeline.mesh_facts(tetrahedron, 4) == {"faces": 4, "closed": True, "components": 1}
    assert not pipeline.mesh_facts(tetrahedron[:3], 4)["closed"]
    assert not pipeline.mesh_facts(np.concatenate([tetrahedron[:3], tetrahedron[3:, ::-1]]), 4)["closed"]
    two = np.concatenate([tetrahedron, tetrahedron + 4])
    assert pipeline.mesh_facts(two, 8) == {"faces": 8, "closed": True, "components": 2}


def test_the_same_bytes_on_any_number_of_threads() -> None:
    """A farm's machines differ in processors; sums that hang on how work is split would differ with them."""
    code = ("import hashlib; from backend import families, packet, pipeline;"
            "from backend.protocol import parse_request;"
            "from backend.settings import Settings; model = families.load('capsule', 'cpu', Settings.load());"
            "asset = pipeline.generate(parse_request({'family': 'capsule', 'seed': 3, 'texture_size': 512}), model)[0];"
            "print(hashlib.sha256(packet.to_glb(asset)).hexdigest())")  # fmt: skip
    found = []
    for threads in ("1", "3"):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        env = {**os.environ, **dict.fromkeys(names, threads)}
        found.append(subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout)
    assert found[0] == found[1]
