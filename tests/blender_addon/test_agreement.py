# SPDX-License-Identifier: GPL-3.0-or-later
"""The words that add-on and backend each spell for themselves are the same words."""

from __future__ import annotations

import typing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from backend import exports, protocol, runtime
from backend import packet as backend_packet
from backend.settings import Settings
from blender_addon import messages, packet, posing, process
from blender_addon.setup.installer import home
from tests.contract import golden


def test_protocol_words() -> None:
    assert messages.PROTOCOL_VERSION == protocol.PROTOCOL_VERSION
    assert set(typing.get_args(protocol.JobState)) == messages.JOB_STATES
    assert packet.SCHEMA == backend_packet.SCHEMA
    assert process.RUNTIME_FILE == runtime.RUNTIME_FILE


def test_request_of_the_add_on_is_one_that_the_backend_takes_with_the_same_defaults() -> None:
    theirs = protocol.GenerateRequest()
    ours = protocol.GenerateRequest.model_validate(messages.Request().to_json())
    assert ours == theirs
    plain = theirs.model_dump()
    for field in fields(messages.Request):
        assert getattr(messages.Request(), field.name) == plain[field.name]


def test_a_posed_person_is_the_same_mesh_on_both_sides() -> None:
    human, asset = packet.read(golden.POSED_PATH.read_bytes()), golden.posed_asset()
    for ours, theirs in zip(human.parts, asset.parts, strict=True):
        assert np.allclose(posing.posed(ours, human.rig), exports.posed(asset, theirs)[0], atol=1e-6)
    assert human.rig is not None
    assert np.allclose(posing.bone_matrices(human.rig)[1], [[0, 1, 0, -0.5], [0, 0, -1, 0.75], [-1, 0, 0, 0]])


@pytest.mark.parametrize("variable", ["POPULACE_HOME", "POPULACE_RUNTIME_DIR", "XDG_RUNTIME_DIR", ""])
def test_runtime_file_is_looked_for_where_the_backend_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("POPULACE_HOME", "POPULACE_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        tmp_path.chmod(0o700)
        monkeypatch.setenv(variable, str(tmp_path))
    assert Settings.load().runtime_dir in process.runtime_folders()


@pytest.mark.parametrize("variable", ["POPULACE_HOME", "POPULACE_DATA_DIR", "XDG_DATA_HOME", ""])
def test_the_set_up_generator_lies_in_the_backends_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("POPULACE_HOME", "POPULACE_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert process.setup_folder() == Settings.load().data_dir / "backend"
    assert process.POINTER == home.POINTER
