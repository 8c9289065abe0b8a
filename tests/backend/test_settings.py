# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings: who beats whom, and that nothing misspelt is swallowed."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from backend.protocol import PopulaceError
from backend.settings import Settings, private_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("POPULACE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_everything_is_below_one_folder(home: Path) -> None:
    settings = Settings.load()
    assert settings == Settings()
    assert settings.runtime_dir == home / "run"  # the add-on looks there
    for folder in (settings.data_dir, settings.jobs_dir, settings.logs_dir):
        assert folder.is_relative_to(home)
    assert not home.exists()  # nothing is made by looking
    with pytest.raises(FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


def test_flags_beat_environment_beats_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "settings.toml").write_text('port = 1\ndevice = "cpu"\njob_deadline_s = 5\nstay = true\n')
    monkeypatch.setenv("POPULACE_PORT", "2")
    monkeypatch.setenv("POPULACE_DEVICE", "cuda")
    settings = Settings.load(port=3, device=None, data_dir="relative")
    assert (settings.port, settings.device, settings.job_deadline_s, settings.stay) == (3, "cuda", 5.0, True)
    assert settings.data_dir == Path.cwd() / "relative"
    monkeypatch.setenv("POPULACE_CONFIG", str(home / "other.toml"))
    with pytest.raises(PopulaceError, match=r"no settings file .*other\.toml"):
        Settings.load()


def test_without_home_the_system_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POPULACE_HOME")
    settings = Settings.load()
    assert settings.data_dir.is_absolute()
    assert "populace" in str(settings.runtime_dir).lower()


@pytest.mark.parametrize(
    ("name", "value"),
    [("POPULACE_PROT", "1"), ("POPULACE_PORT", "-1"), ("POPULACE_PORT", "x"), ("POPULACE_STAY", "perhaps"),
     ("POPULACE_DEVICE", "tpu"), ("POPULACE_JOB_DEADLINE_S", "nan"), ("POPULACE_DATA_DIR", "")],
)  # fmt: skip
def test_wrong_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(PopulaceError, match=name.removeprefix("POPULACE_").lower()) as caught:
        Settings.load()
    assert caught.value.code == "invalid_request"
    assert "environment" in caught.value.message


@pytest.mark.parametrize("text", ["prot = 1", "port = 1.5", "port = true", 'port = "', "[port]\na = 1", "stay = 2"])
def test_wrong_file(home: Path, text: str) -> None:
    home.mkdir()
    (home / "settings.toml").write_text(text)
    with pytest.raises(PopulaceError, match=r"settings file"):
        Settings.load()


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_private_folder(tmp_path: Path) -> None:
    open_one = tmp_path / "open"
    open_one.mkdir(mode=0o755)
    assert private_folder(open_one).stat().st_mode & 0o777 == 0o700
    assert private_folder(tmp_path / "new" / "inner").stat().st_mode & 0o777 == 0o700
