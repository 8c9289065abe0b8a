# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said between a client and the backend: requests, replies, errors, limits. No torch, no I/O."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

PROTOCOL_VERSION: Final = 1
PHOTO_POSE: Final = "photo"

MAX_JSON_BYTES: Final = 1 << 20
MAX_JSON_DEPTH: Final = 32
MAX_EDITS: Final = 64
MAX_LODS: Final = 4
MAX_SHAPE_KEYS: Final = 16
MAX_PHOTOS: Final = 8
MAX_IMAGE_BYTES: Final = 64 << 20

ErrorCode = Literal[
    "unauthorized", "forbidden", "not_found", "method_not_allowed", "conflict", "too_large", "invalid_request",
    "unknown_family", "invalid_latents", "weights_missing", "weights_corrupt", "empty_surface", "out_of_memory",
    "no_gpu", "out_of_gpu_memory", "out_of_disk", "worker_crashed", "deadline_exceeded", "cancelled", "queue_full",
    "shutting_down", "protocol_mismatch", "internal_error", "image_missing", "image_unreadable", "no_person_found",
    "mask_needed",
]  # fmt: skip

HTTP_STATUS: Final[dict[ErrorCode, int]] = {
    "unauthorized": 401, "forbidden": 403, "not_found": 404, "method_not_allowed": 405, "conflict": 409,
    "too_large": 413, "invalid_request": 422, "unknown_family": 422, "invalid_latents": 422, "image_missing": 422,
    "image_unreadable": 422, "no_person_found": 422, "mask_needed": 422, "queue_full": 429,
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


def _rows(value: list[list[float]]) -> list[list[float]]:
    """Whether they fit the family `checks` knows."""
    if len({len(row) for row in value}) > 1:
        raise ValueError("latents must be rows of equal length")
    return value


def _once(value: list[Any]) -> list[Any]:
    if len(set(value)) < len(value):
        raise ValueError("a name appears twice")
    return value


Row = Annotated[list[float], Field(min_length=1, max_length=4096)]
Rows = Annotated[list[Row], Field(min_length=1, max_length=64), AfterValidator(_rows)]
Codes = Annotated[dict[Annotated[str, Field(max_length=64)], Rows], Field(max_length=64)]
"""Latents as JSON: rows of numbers by name, e.g. {"top/shape": [[...]], "top/tex": [[...]]}."""

Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]
Psi = Annotated[float, Field(ge=0, le=1.5, description="0: the mean person, 1: the full variety")]
Amount = Annotated[float, Field(ge=0, le=1, description="0: nothing changes")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Parts = Annotated[list[Name], Field(min_length=1, max_length=16), AfterValidator(_once)]
Kinds = Annotated[list[Literal["shape", "tex"]], Field(min_length=1, max_length=2), AfterValidator(_once)]
Text = Annotated[str, Field(max_length=1000, description="English words, see GET /v1/families for what can be said")]
Choice = Annotated[str, Field(max_length=64)]
Color = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=3, max_length=3)]
Value = Annotated[
    Annotated[float, Tag("number")] | Annotated[Color, Tag("color")] | Annotated[Choice, Tag("choice")],
    Discriminator(lambda value: {list: "color", str: "choice"}.get(type(value), "number")),  # then errors name one
]


def _rotation(value: list[float]) -> list[float]:
    if abs(math.hypot(*value) - 1) > 0.01:
        raise ValueError("a rotation is a quaternion w, x, y, z of length 1")
    return value


ImageId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="as POST /v1/images told: the bytes' SHA-256")]
MapName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}/photo$", description="PART/photo")]
Maps = Annotated[dict[MapName, ImageId], Field(max_length=64)]
"""What photos showed of parts: RGBA PNGs from an earlier packet, sent by POST /v1/images."""
Bone = Annotated[str, Field(pattern=r"^[A-Za-z0-9_. -]{1,63}$")]
Rotation = Annotated[list[float], Field(min_length=4, max_length=4), AfterValidator(_rotation)]


def _both() -> list[Literal["shape", "tex"]]:
    return ["shape", "tex"]


def _belong(maps: dict[str, str], latents: dict[str, Any] | None) -> None:
    parts = {name.partition("/")[0] for name in latents or ()}
    if any(name.partition("/")[0] not in parts for name in maps):
        raise ValueError("latent_maps belong to parts whose codes are given in latents")


class Person(Model):
    """Another person: that of a seed, or one whose complete latents are given."""

    seed: Seed | None = None
    truncation_psi: Psi = 0.7
    latents: Codes | None = None
    latent_maps: Maps = Field(default_factory=dict)  # that belong to the latents

    @model_validator(mode="after")
    def _one_of_two(self) -> Person:
        if (self.seed is None) == (self.latents is None):
            raise ValueError("a person is given by seed or by latents, one of the two")
        _belong(self.latent_maps, self.latents)
        return self


class Mix(Model):
    """Towards another person; at 1 it is that person. What only one of the two wears changes sides at 0.5."""

    op: Literal["mix"]
    other: Person
    amount: Amount
    kinds: Kinds = Field(default_factory=_both)


class Vary(Model):
    """Towards the person of an independent seed, with the variety of the family: 0 the same person, 1 a stranger."""

    op: Literal["vary"]
    seed: Seed
    amount: Amount
    parts: Parts | None = None  # all
    kinds: Kinds = Field(default_factory=_both)


class TakeParts(Model):
    """These parts from another person. What the other does not wear is taken off."""

    op: Literal["part"]
    parts: Parts
    other: Person
    kinds: Kinds = Field(default_factory=_both)


class Remove(Model):
    """Take these parts off."""

    op: Literal["remove"]
    parts: Parts


class Reroll(Model):
    """Everything but the locked parts from the person of another seed; with kinds ["tex"] only the looks."""

    op: Literal["reroll"]
    seed: Seed
    lock: Annotated[list[Name], Field(max_length=16), AfterValidator(_once)] = Field(default_factory=list)
    kinds: Kinds = Field(default_factory=_both)


class SetValues(Model):
    """Attributes of the family by name."""

    op: Literal["set"]
    values: Annotated[dict[Name, Value], Field(min_length=1, max_length=64)]


class Words(Model):
    """Attributes in plain words."""

    op: Literal["words"]
    text: Text


OPS: Final = ("mix", "vary", "part", "remove", "reroll", "set", "words")
Edit = Annotated[Mix | Vary | TakeParts | Remove | Reroll | SetValues | Words, Field(discriminator="op")]


class Photo(Model):
    """One photo of the person. Several of them show the same person."""

    image: ImageId
    mask: ImageId | None = Field(default=None, description="a picture of the same shape: white or opaque where the "
                                 "person is")  # fmt: skip
    person: int = Field(default=0, ge=0, le=63, description="which one, where there are several, from the left")


class Inversion(Model):
    """How a person is made from photos."""

    steps: int = Field(default=60, ge=0, le=1000, description="of the fit; 0: what the encoder sees at first glance")
    seconds: Annotated[float, Field(gt=0, le=3600)] | None = Field(
        default=None, description="end the fit after this time; how far it comes then depends on the machine"
    )
    texture: bool = Field(default=True, description="what the photos show stays as they show it")
    delight: bool = Field(default=True, description="take the photos' light and shade off")
    symmetric: bool = Field(default=True, description="let the side that is seen tell of the one that is not")
    refine: Literal["none", "diffusion"] = "none"


class GenerateRequest(Model):
    """Everything about one person. The same request gives the same packet on the same device and version.

    The person is that of the photos or else of the seed, the latter with `latents` in place of some of its codes; then
    come `prompt` and `edits`, in this order. `latents` that hold a whole body are a whole person: the seed plays no
    role.
    """

    family: Name = "people"
    seed: Seed = 0
    truncation_psi: Psi = 0.7
    latents: Codes | None = Field(default=None, description="codes in place of the seed's")
    latent_maps: Maps = Field(default_factory=dict, description="of the parts in latents that photos showed")
    photos: list[Photo] = Field(default_factory=list, max_length=MAX_PHOTOS, description="of one person; the first one "
                                "tells the pose")  # fmt: skip
    inversion: Inversion = Field(default_factory=Inversion)
    parameters: dict[str, Any] = Field(default_factory=dict, description="family parameters, see GET /v1/families")
    prompt: Text | None = None
    edits: list[Edit] = Field(default_factory=list, max_length=MAX_EDITS, description="applied in order")
    pose: str = Field(
        default="rest",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_ -]{0,63}$",
        description='see GET /v1/families; "photo" is that of the first photo, and the default where there are photos',
    )
    joint_rotations: Annotated[dict[Bone, Rotation], Field(max_length=512)] | None = Field(
        default=None, description="over the pose: quaternions w, x, y, z by bone, parent-relative in world-aligned axes"
    )
    separate: bool = Field(default=False, description="clothes and hair as objects of their own")
    grid_resolution: int = Field(default=256, ge=16, le=512, description="lattice cells along the height")
    faces: int = Field(default=30000, ge=500, le=2_000_000, description="face budget of the whole person")
    lods: int = Field(default=1, ge=1, le=MAX_LODS, description="levels of detail, each with a quarter of the faces")
    texture_size: Literal[512, 1024, 2048, 4096] = 1024
    unwrap: Literal["atlas", "xatlas"] = "atlas"
    maps: Literal["pbr", "color"] = Field(default="pbr", description="color: no normal and no roughness map")
    shape_keys: Annotated[list[Name], Field(max_length=MAX_SHAPE_KEYS), AfterValidator(_once)] = Field(
        default_factory=list, description="numeric attributes; each gives two keys, NAME_min and NAME_max"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_photo(cls, raw: Any) -> Any:
        return {"pose": PHOTO_POSE, **raw} if isinstance(raw, dict) and raw.get("photos") else raw

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.photos and self.latents is not None:
            raise ValueError("a person is given by photos or by latents, one of the two")
        if self.pose == PHOTO_POSE and not self.photos:
            raise ValueError('the pose "photo" is that of a photo, and there is none')
        _belong(self.latent_maps, self.latents)
        return self

    def images(self) -> list[str]:
        """Ids of all images that are needed, each once, in order."""
        others = [edit.other for edit in self.edits if isinstance(edit, Mix | TakeParts)]
        found = [name for photo in self.photos for name in (photo.image, photo.mask) if name]
        return list(dict.fromkeys([*found, *(name for who in (self, *others) for name in who.latent_maps.values())]))


class StoredImage(Model):
    """An image that was sent. It is kept until the server ends, or for an hour after it was needed last."""

    id: ImageId
    width: int  # of the upright picture, pixels
    height: int


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
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"].startswith("union_tag"):  # pydantic's sentence repeats the value
        rule = f"op must be one of: {', '.join(OPS)}"
    return PopulaceError("invalid_request", f"{path or 'body'}: {rule}{more}.", "See /v1/openapi.json.")


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
