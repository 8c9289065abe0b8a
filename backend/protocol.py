# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said between a client and the backend: requests, replies, errors, limits. No torch, no I/O."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PROTOCOL_VERSION = 1

MAX_JSON_BYTES = 1 << 20
MAX_QUEUED_JOBS = 1000

ErrorCode = Literal[
    "unauthorized", "forbidden", "not_found", "method_not_allowed", "conflict", "too_large", "invalid_request",
    "unknown_family", "invalid_latents", "weights_missing", "weights_corrupt", "empty_surface", "out_of_memory",
    "no_gpu", "out_of_gpu_memory", "out_of_disk", "worker_crashed", "deadline_exceeded", "cancelled", "queue_full",
    "shutting_down", "protocol_mismatch", "internal_error",
]


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
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Error(Model):
    code: ErrorCode
    message: str
    hint: str = ""


JobId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="32 lower-case hex digits, made by the caller")]


class GenerateRequest(Model):
    """Everything about one person. The same request gives the same packet on the same device and version."""

    family: str = Field("people", pattern=r"^[a-z][a-z0-9_]{0,31}$")
    seed: int = Field(0, ge=0, le=2**53 - 1)
    truncation_psi: float = Field(0.7, ge=0, le=1.5, description="0: the mean person, 1: the full variety")
    latents: dict[str, list[list[float]]] | None = Field(None, description="codes that replace those of the seed")
    parameters: dict[str, Any] = Field(default_factory=dict, description="family parameters, see GET /v1/families")
    grid_resolution: int = Field(256, ge=16, le=512, description="lattice cells along the height")
    faces: int = Field(30000, ge=500, le=2_000_000, description="face budget of the whole person")
    texture_size: Literal[512, 1024, 2048, 4096] = 1024
    unwrap: Literal["atlas", "xatlas"] = "atlas"

    @field_validator("latents")
    @classmethod
    def _finite(cls, value: dict[str, list[list[float]]] | None) -> dict[str, list[list[float]]] | None:
        for name, rows in (value or {}).items():
            if not rows or not all(math.isfinite(x) for row in rows for x in row):
                raise ValueError(f"latents[{name!r}] must hold finite numbers only")
        return value


class JobRequest(Model):
    id: JobId
    client: str = Field("script", max_length=64, pattern=r"^[\w.-]+$")
    request: GenerateRequest


JobState = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]


class JobStatus(Model):
    id: JobId
    client: str
    state: JobState
    stage: str = ""
    fraction: float = 0.0  # of the whole job, 0..1
    eta_s: float | None = None
    error: Error | None = None
    created: float = 0.0  # seconds since the epoch
    seed: int = 0
    family: str = "people"
