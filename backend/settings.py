# SPDX-License-Identifier: GPL-3.0-or-later
"""Where things are kept and what is allowed: one frozen object, read once from flags, environment and a TOML file."""

from __future__ import annotations

import math
import os
import stat
import tomllib
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import platformdirs

from backend.protocol import PopulaceError

_OTHER_VARIABLES = {"POPULACE_HOME", "POPULACE_CONFIG", "POPULACE_PYTHON", "POPULACE_TORCH_INDEX"}
"""The last two are the add-on's and its installer's."""
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """Every field can be set by a flag of `load`, by POPULACE_<FIELD>, or by a line in the settings file."""

    data_dir: Path = field(default_factory=lambda: _folder("data"))  # jobs, results, logs, weights, caches
    runtime_dir: Path = field(default_factory=lambda: _folder("run"))  # the address and token of a running backend
    device: Literal["auto", "cpu", "cuda"] = "auto"
    port: int = 0  # 0: one that the system chooses
    stay: bool = False  # go on when the last client has left
    job_deadline_s: float = 600.0  # a job that runs longer is ended
    max_queued_jobs: int = 1000
    max_results_bytes: int = 2 << 30  # results kept; the oldest go first
    max_results_age_s: float = 24 * 3600.0
    worker_restarts: int = 3  # of a crashed worker within 5 min, then a person decides

    @classmethod
    def load(cls, **flags: Any) -> Settings:
        """Flags beat the environment, which beats the file; a flag that is None was not given.

        The file is $POPULACE_CONFIG, else $POPULACE_HOME/settings.toml, else settings.toml in the user's configuration
        folder. Raises `invalid_request` for unknown names and values that do not fit.
        """
        variables = {
            name.removeprefix("POPULACE_").lower(): text for name, text in os.environ.items()
            if name.startswith("POPULACE_") and name not in _OTHER_VARIABLES
        }  # fmt: skip
        given = {name: value for name, value in flags.items() if value is not None}
        return cls(**(_checked(_from_file(), "the settings file") | _checked(variables, "the environment")
                      | _checked(given, "the command line")))  # fmt: skip

    @property
    def jobs_dir(self) -> Path:
        return self.data_dir / "jobs"

    @property
    def images_dir(self) -> Path:
        return self.data_dir / "images"

    @property
    def logs_dir(self) -> Path:
        return self.data_dir / "logs"


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter. Raises OSError, also when it belongs to somebody else."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        about = path.stat()
        if about.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        if stat.S_IMODE(about.st_mode) & 0o077:
            path.chmod(0o700)
    return path


def _folder(kind: Literal["data", "run", "config"]) -> Path:
    """One of our folders: below $POPULACE_HOME if that is set, else where the system keeps such things."""
    if home := os.environ.get("POPULACE_HOME"):
        base = Path(home).expanduser().absolute()
        return base if kind == "config" else base / kind
    find = {"data": platformdirs.user_data_dir, "run": platformdirs.user_runtime_dir,
            "config": platformdirs.user_config_dir}[kind]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no XDG_RUNTIME_DIR: it falls back to a folder that `private_folder` checks
        return Path(find("populace"))


def _from_file() -> dict[str, Any]:
    named = os.environ.get("POPULACE_CONFIG")
    path = Path(named).expanduser() if named else _folder("config") / "settings.toml"
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if named:
            raise PopulaceError(
                "invalid_request", f"There is no settings file {path}.", "Correct POPULACE_CONFIG."
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise PopulaceError(
            "invalid_request", f"The settings file {path} cannot be read: {error}.", "Correct it."
        ) from None


def _checked(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    types = typing.get_type_hints(Settings)
    known = {f.name for f in fields(Settings)}
    found = {}
    for name, value in raw.items():
        if name not in known:
            raise PopulaceError(
                "invalid_request", f"There is no setting {name!r} ({source}).",
                f"There are: {', '.join(sorted(known))}."
            )  # fmt: skip
        try:
            found[name] = _converted(value, types[name])
        except (ValueError, TypeError):
            wanted = {Path: "a folder", bool: "true or false", int: "a whole number, not negative",
                      float: "a number, not negative"}.get(types[name], f"one of {', '.join(_DEVICES)}")  # fmt: skip
            raise PopulaceError("invalid_request", f"{name} must be {wanted} ({source}).", "Correct it.") from None
    return found


def _converted(value: Any, kind: Any) -> Any:
    """Raises ValueError or TypeError."""
    if kind is Path:
        if not str(value):
            raise ValueError
        return Path(value).expanduser().absolute()
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0"):
            raise ValueError
        return text in ("true", "1")
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise TypeError
        number = kind(value)
        if not math.isfinite(number) or number < 0:
            raise ValueError
        return number
    if value not in _DEVICES:
        raise ValueError
    return value
