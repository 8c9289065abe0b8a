# SPDX-License-Identifier: GPL-3.0-or-later
"""What the add-on says to the backend and hears from it. Pure Python: no bpy, no sockets.

The backend has its own copy of these words (`backend/protocol.py`); tests/contract keep the two alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypedDict, TypeGuard

PROTOCOL_VERSION: Final = 1
CLIENT_PREFIX: Final = "blender"
JOB_STATES: Final = frozenset({"queued", "running", "cancelling", "done", "failed", "cancelled"})
ENDED: Final = frozenset({"done", "failed", "cancelled"})


class BackendError(Exception):
    """A failure for the user: one sentence, one next step. All errors that the add-on raises on purpose are this."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __eq__(self, other: object) -> bool:
        """Equal in what they say, so that a status heard again is not news."""
        return isinstance(other, BackendError) and (self.code, str(self)) == (other.code, str(other))

    def __hash__(self) -> int:
        return hash((self.code, str(self)))


class BadReply(BackendError):
    """The other side does not keep to the protocol."""

    def __init__(self, what: str) -> None:
        super().__init__("bad_reply", f"The generator sent something unexpected: {what}.", "Restart the generator.")


@dataclass(frozen=True)
class Request:
    """Everything about one person. The same request gives the same person."""

    seed: int = 0
    family: str = "people"
    truncation_psi: float = 0.7
    latents: Mapping[str, list[list[float]]] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None  # plain words, before the edits
    edits: list[Mapping[str, Any]] = field(default_factory=list)  # such as {"op": "set", "values": {"height_m": 1.8}}
    pose: str = "rest"
    separate: bool = False  # clothes and hair as objects of their own
    grid_resolution: int = 256
    faces: int = 30000
    lods: int = 1
    texture_size: int = 1024
    maps: str = "pbr"  # "color": no normal and no roughness map
    shape_keys: list[str] = field(default_factory=list)  # numeric attributes, each as two shape keys

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RequestFields(TypedDict, total=False):
    """The fields of `Request` as keyword arguments, for type checkers; tests/contract keep the two alike."""

    seed: int
    family: str
    truncation_psi: float
    latents: Mapping[str, list[list[float]]] | None
    parameters: Mapping[str, Any]
    prompt: str | None
    edits: list[Mapping[str, Any]]
    pose: str
    separate: bool
    grid_resolution: int
    faces: int
    lods: int
    texture_size: int
    maps: str
    shape_keys: list[str]


@dataclass(frozen=True)
class Status:
    """What the backend says of one job."""

    id: str
    state: str
    stage: str = ""
    fraction: float = 0.0  # of the whole job, 0..1
    eta_s: float | None = None
    error: BackendError | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @classmethod
    def from_json(cls, raw: Any) -> Status:
        """Raises `BadReply`. Fields this version does not know are ignored, so that a newer backend may add some."""
        if not isinstance(raw, dict) or not isinstance(raw.get("id"), str) or raw.get("state") not in JOB_STATES:
            raise BadReply("a job status without id or state")
        fraction, eta = raw.get("fraction", 0.0), raw.get("eta_s")
        error = error_from_json(raw["error"]) if raw.get("error") else None
        if raw["state"] == "failed" and error is None:
            error = BackendError("internal_error", "The job failed without a reason.", "Try again.")
        return cls(
            id=raw["id"], state=raw["state"], stage=_text(raw.get("stage"), 80),
            fraction=min(max(float(fraction), 0.0), 1.0) if _is_number(fraction) else 0.0,
            eta_s=max(float(eta), 0.0) if _is_number(eta) else None, error=error,
        )  # fmt: skip


@dataclass(frozen=True)
class Health:
    """The backend's introduction of itself."""

    protocol: int
    version: str
    device: str
    worker: str  # "starting", "ready", "busy", "stopped", "broken"
    worker_error: BackendError | None = None  # why it is broken

    @classmethod
    def from_json(cls, raw: Any) -> Health:
        if not isinstance(raw, dict) or type(raw.get("protocol")) is not int:
            raise BadReply("a greeting without a protocol version")
        error = error_from_json(raw["worker_error"]) if raw.get("worker_error") else None
        return cls(raw["protocol"], _text(raw.get("version"), 40), _text(raw.get("device"), 40),
                   _text(raw.get("worker"), 40), error)  # fmt: skip

    def check(self) -> None:
        """Raises `BackendError` that says which side to update."""
        if self.protocol > PROTOCOL_VERSION:
            raise BackendError("protocol_mismatch",
                               f"The generator {self.version} is newer than this add-on.",
                               "Update the Populace add-on.")  # fmt: skip
        if self.protocol < PROTOCOL_VERSION:
            raise BackendError("protocol_mismatch",
                               f"The generator {self.version} is older than this add-on.",
                               "Update the generator: pip install . in its new source folder.")  # fmt: skip


def error_from_json(raw: Any) -> BackendError:
    """The backend's {"code", "message", "hint"}, cut to lengths that a panel can show. Never raises."""
    if not isinstance(raw, dict) or not _text(raw.get("message"), 1):
        return BackendError("internal_error", "The generator failed without a reason.", "Restart the generator.")
    return BackendError(_text(raw.get("code"), 40) or "internal_error", masked(_text(raw["message"], 600)),
                        masked(_text(raw.get("hint"), 300)))  # fmt: skip


def masked(text: str) -> str:
    """The same text without the user's home folder, so that it can be shown and posted."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 2 else text


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in value[:limit])


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
