# SPDX-License-Identifier: GPL-3.0-or-later
"""What the add-on says and hears, and what the backend hears and says: two texts, one meaning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from backend import protocol
from blender_addon import messages
from tests.contract import golden


def test_both_sides_speak_the_same_version() -> None:
    assert messages.PROTOCOL_VERSION == protocol.PROTOCOL_VERSION
    assert set(get_args(protocol.JobState)) == messages.JOB_STATES
    assert messages.ENDED == protocol.ENDED


def test_the_addons_defaults_are_the_backends() -> None:
    said = messages.Request().to_json()
    assert protocol.parse_request(json.loads(json.dumps(said))) == protocol.GenerateRequest()
    assert said == protocol.GenerateRequest().model_dump(include=set(said))


def test_keyword_arguments_are_the_fields() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(messages.Request)}
    assert fields == {name: hint.__forward_arg__ for name, hint in messages.RequestFields.__annotations__.items()}


def test_every_field_of_a_request_arrives() -> None:
    asset = golden.asset()
    latents = {name: codes.tolist() for name, codes in asset.latents.items()}
    request = messages.Request(
        seed=2**53 - 1, family="capsule", truncation_psi=1, latents=latents, parameters={"single": True},
        latent_maps={"body/photo": "a" * 64}, inversion={"steps": 0, "seconds": 2.5},
        joint_rotations={"head": [1, 0, 0, 0]},
        prompt="tall", edits=[{"op": "remove", "parts": ["top"]}], pose="sitting", separate=True,
        grid_resolution=64, faces=500, lods=4, texture_size=4096,
        maps="color", shape_keys=["height_m"],
    )  # fmt: skip
    heard = protocol.parse_request(protocol.parse_json(json.dumps(request.to_json()).encode()))
    arrived = heard.model_dump()
    for field in dataclasses.fields(request):
        assert arrived[field.name] == getattr(request, field.name), field.name


def test_photos_arrive_as_ids_and_their_pose_is_the_default() -> None:
    photo = {"image": "b" * 64, "mask": None, "person": 1}
    request = messages.Request(photos=[photo, "c" * 64])
    heard = protocol.parse_request(json.loads(json.dumps(request.to_json())))
    assert (
        [p.model_dump() for p in heard.photos] == request.photos == [photo, {**photo, "image": "c" * 64, "person": 0}]
    )
    assert heard.pose == request.pose == protocol.parse_request({"photos": [photo]}).pose == "photo"
    assert messages.Request(photos=[photo], pose="rest").pose == "rest"
    assert heard.inversion == protocol.Inversion()
    assert messages.MAX_IMAGE_BYTES == protocol.MAX_IMAGE_BYTES


def test_images_are_found_wherever_a_request_names_them(tmp_path: Path) -> None:
    latents = {"top/shape": [[0.0]]}
    other = {"latents": latents, "latent_maps": {"top/photo": messages.inline(b"png")}}
    edits = [{"op": "part", "parts": ["top"], "other": other}, {"op": "mix", "other": {"seed": 1}, "amount": 0.5}]
    raw = messages.Request(photos=[{"image": tmp_path / "a.jpg", "mask": b"mask"}], edits=edits).to_json()
    found = [holder[key] for holder, key in messages.image_slots(raw)]
    assert found == [str(tmp_path / "a.jpg"), messages.inline(b"mask"), messages.inline(b"png")]
    assert not any(map(messages.is_image_id, found))
    json.dumps(raw)
    for number, (holder, key) in enumerate(messages.image_slots(raw)):
        holder[key] = f"{number:064x}"
    assert protocol.parse_request(raw).images() == [f"{number:064x}" for number in range(3)]
    assert edits[0]["other"] is other  # the caller's own is as it was
    assert other["latent_maps"] == {"top/photo": messages.inline(b"png")}


def test_pieces_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "photo.bin"
    path.write_bytes(bytes(range(256)) * 3)
    for image in (str(path), messages.inline(path.read_bytes())):
        size, *pieces = messages.image_pieces(image, 500)
        assert (int(size), b"".join(pieces), len(pieces)) == (768, path.read_bytes(), 2)
    for image, said in ((str(tmp_path / "none.png"), "No such file"), (str(tmp_path), "directory"),
                        (messages.inline(b"abc") + "!", "damaged")):  # fmt: skip
        with pytest.raises(messages.BackendError, match=said) as caught:
            list(messages.image_pieces(image))
        assert caught.value.code == "image_unreadable"


@pytest.mark.parametrize("state", get_args(protocol.JobState))
def test_every_status_is_understood(state: str) -> None:
    error = protocol.Error(code="empty_surface", message="Seed 3 gave no surface.", hint="Try another seed.")
    said = protocol.JobStatus(id="0" * 32, client="blender-1", state=state, stage="bake", fraction=0.5, eta_s=1.5,
                              error=error if state == "failed" else None)  # fmt: skip
    heard = messages.Status.from_json(json.loads(said.model_dump_json()))
    assert (heard.id, heard.state, heard.stage, heard.fraction, heard.eta_s) == ("0" * 32, state, "bake", 0.5, 1.5)
    assert heard.ended == (state in protocol.ENDED)
    if state == "failed":
        assert heard.error is not None
        assert (heard.error.code, heard.error.message, heard.error.hint) == (error.code, error.message, error.hint)


def test_the_greeting_is_understood_and_versions_are_compared() -> None:
    said = protocol.Health(protocol=1, version="0.1.0", pid=1, device="cpu", worker="ready")
    heard = messages.Health.from_json(json.loads(said.model_dump_json()))
    heard.check()
    assert (heard.version, heard.device, heard.worker) == ("0.1.0", "cpu", "ready")
    for version, side in ((0, "pip install"), (2, "Update the Populace add-on")):
        other = messages.Health.from_json(json.loads(said.model_copy(update={"protocol": version}).model_dump_json()))
        with pytest.raises(messages.BackendError, match=side) as caught:
            other.check()
        assert caught.value.code == "protocol_mismatch"
