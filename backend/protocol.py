# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said between a client and the backend: requests, replies, errors, limits. No torch, no I/O."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

PROTOCOL_VERSION: Final = 1

MAX_JSON_BYTES: Final = 1 << 20
MAX_JSON_DEPTH: Final = 32

ErrorCode = Literal[
    "unauthorized", "forbidden", "not_found", "method_not_allowed", "conflict", "too_large", "invalid_request",
    "unknown_family", "invalid_latents", "weights_missing", "weights_corrupt", "empty_surface", "out_of_memory",
    "no_gpu", "out_of_gpu_memory", "out_of_disk", "worker_crashed", "deadline_exceeded", "cancelled", "queue_full",
    "shutting_down", "protocol_mismatch", "internal_error",
]  # fmt: skip

HTTP_STATUS: Final[dict[ErrorCode, int]] = {
    "unauthorized": 401, "forbidden": 403, "not_found": 404, "method_not_allowed": 405, "conflict": 409,
    "too_large": 413, "invalid_request": 422, "unknown_family": 422, "invalid_latents": 422, "queue_full": 429,
    "shutting_down": 503, "worker_crashed": 503, "out_of_disk": 507,
}  # fmt: skip
"""Others are 500."""


class PopulaceError(Exception):
    """A failure with a sentence for the user and a next step. Travels over the API as `Error`."""

    def __init__(self, code: ErrorCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class Cancelled(PopulaceError):
    """Raised by `step` when the user cancelled the job."""

    def __init__(self) -> None:
        super().__init__("cancelled", "The job was cancelled.")


class Model(BaseModel):
    """Strict: no unknown fields, no numbers in quotes, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Error(Model):
    code: ErrorCode
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: PopulaceError) -> Error:
        return cls(code=error.code, message=error.message, hint=error.hint)


JobId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="32 lower-case hex digits, made by the caller")]
ClientName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="who asks; one per Blender or script")]


class GenerateRequest(Model):
    """Everything about one person. The same request gives the same packet on the same device and version."""

    family: str = Field(default="people", pattern=r"^[a-z][a-z0-9_]{0,31}$")
    seed: int = Field(default=0, ge=0, le=2**53 - 1)
    truncation_psi: float = Field(default=0.7, ge=0, le=1.5, description="0: the mean person, 1: the full variety")
    latents: dict[str, list[list[float]]] | None = Field(default=None, description="codes in place of the seed's")
    parameters: dict[str, Any] = Field(default_factory=dict, description="family parameters, see GET /v1/families")
    grid_resolution: int = Field(default=256, ge=16, le=512, description="lattice cells along the height")
    faces: int = Field(default=30000, ge=500, le=2_000_000, description="face budget of the whole person")
    texture_size: Literal[512, 1024, 2048, 4096] = 1024
    unwrap: Literal["atlas", "xatlas"] = "atlas"

    @field_validator("latents")
    @classmethod
    def _rows(cls, value: dict[str, list[list[float]]] | None) -> dict[str, list[list[float]]] | None:
        """Rows of equal length, finite. Whether they fit the family only its model knows."""
        for rows in (value or {}).values():
            if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
                raise ValueError("latents must be rows of equal length")
            if not all(math.isfinite(x) for row in rows for x in row):
                raise ValueError("latents must hold finite numbers only")
        return value


class JobRequest(Model):
    id: JobId
    client: ClientName = "script"
    request: GenerateRequest


JobState = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]
ENDED: Final = frozenset({"done", "failed", "cancelled"})


class JobStatus(Model):
    id: JobId
    client: ClientName
    state: JobState
    stage: str = ""
    fraction: float = 0.0  # of the whole job, 0..1
    eta_s: float | None = None
    error: Error | None = None
    created: float = 0.0  # seconds since the epoch
    seed: int = 0
    family: str = "people"


class Health(Model):
    """The backend's introduction of itself."""

    protocol: int
    version: str
    pid: int
    device: str
    worker: Literal["stopped", "starting", "ready", "busy", "broken"]
    worker_error: Error | None = None  # why it is broken


def parse_json(data: bytes) -> Any:
    """JSON without the holes of JSON: UTF-8 only, each name once, finite numbers, at most `MAX_JSON_DEPTH` deep.

    Raises `invalid_request`; nothing of the input is repeated.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
        _check_depth(value, MAX_JSON_DEPTH)
    except UnicodeDecodeError:
        raise PopulaceError("invalid_request", "The body is not UTF-8.", "Send JSON in UTF-8.") from None
    except RecursionError:
        raise PopulaceError(
            "invalid_request", f"The body is nested more than {MAX_JSON_DEPTH} deep.", "Send plainer JSON."
        ) from None
    except json.JSONDecodeError as error:
        raise PopulaceError(
            "invalid_request", f"The body is not JSON: line {error.lineno}, column {error.colno}.", "Correct it."
        ) from None
    except _BadJson as error:
        raise PopulaceError("invalid_request", f"The body is not strict JSON: {error}.", "Correct it.") from None
    except ValueError:  # an integer of thousands of digits
        raise PopulaceError("invalid_request", "The body holds a number that is too long.", "Correct it.") from None
    return value


def invalid(errors: list[Any]) -> PopulaceError:
    """One sentence for what pydantic found: the field and the rule, never the value."""
    first = errors[0]
    path = ".".join(_printable(part) for part in first["loc"] if part not in ("body", "query", "path"))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return PopulaceError("invalid_request", f"{path or 'body'}: {first['msg']}{more}.", "See /v1/openapi.json.")


def parse_request(raw: Any) -> GenerateRequest:
    """Raises `invalid_request`."""
    try:
        return GenerateRequest.model_validate(raw)
    except ValidationError as error:
        raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None


class _BadJson(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _BadJson("a name appears twice")
    return found


def _refuse(text: str) -> float:
    raise _BadJson("NaN and Infinity are not numbers")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadJson("a number is too large")
    return value


def _check_depth(value: Any, left: int) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        if isinstance(item, (dict, list)):
            if left == 0:
                raise RecursionError
            _check_depth(item, left - 1)


def _printable(part: Any) -> str:
    text = str(part)
    return text if len(text) <= 40 and text.isascii() and text.isprintable() else "(unknown field)"
