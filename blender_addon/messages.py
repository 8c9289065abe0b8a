# SPDX-License-Identifier: GPL-3.0-or-later
"""What the add-on says to the backend and hears from it. Pure Python: no bpy, no sockets.

The backend has its own copy of these words (`backend/protocol.py`); tests/contract keep the two alike.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias, TypedDict, TypeGuard

PROTOCOL_VERSION: Final = 1
CLIENT_PREFIX: Final = "blender"
JOB_STATES: Final = frozenset({"queued", "running", "cancelling", "done", "failed", "cancelled"})
ENDED: Final = frozenset({"done", "failed", "cancelled"})
MAX_IMAGE_BYTES: Final = 64 << 20
PHOTO_POSE: Final = "photo"
INVERSION: Final[Mapping[str, Any]] = {"steps": 60, "seconds": None, "texture": True, "delight": True,
                                       "symmetric": True, "refine": "none"}  # fmt: skip
_INLINE: Final = "data:application/octet-stream;base64,"


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


Image: TypeAlias = "str | os.PathLike[str] | bytes"
"""A file, the bytes of one, or what `inline` made of them. PNG, JPEG or WebP."""


@dataclass(frozen=True)
class Request:
    """Everything about one person. The same request gives the same person.

    Where the backend wants the id of an image, there is the path of a file or an `inline` text; the session sends such
    images ahead. `photos` may be given as paths; they become {"image": path, "mask": path or None, "person": 0}.
    """

    seed: int = 0
    family: str = "people"
    truncation_psi: float = 0.7
    latents: Mapping[str, list[list[float]]] | None = None
    latent_maps: Mapping[str, str] = field(default_factory=dict)  # what photos showed of parts; goes with `latents`
    photos: Sequence[Image | Mapping[str, Any]] = field(default_factory=list)  # of one person
    inversion: Mapping[str, Any] = field(default_factory=dict)  # how a person is made from photos, see INVERSION
    parameters: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None  # plain words, before the edits
    edits: list[Mapping[str, Any]] = field(default_factory=list)  # such as {"op": "set", "values": {"height_m": 1.8}}
    pose: str = ""  # "rest", or with photos "photo": as in the first one
    joint_rotations: Mapping[str, Sequence[float]] | None = None  # w, x, y, z by bone, over the pose
    separate: bool = False  # clothes and hair as objects of their own
    grid_resolution: int = 256
    faces: int = 30000
    lods: int = 1
    texture_size: int = 1024
    maps: str = "pbr"  # "color": no normal and no roughness map
    shape_keys: list[str] = field(default_factory=list)  # numeric attributes, each as two shape keys

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen
        set_field(self, "photos", [_photo(photo) for photo in self.photos])
        set_field(self, "inversion", {**INVERSION, **self.inversion})
        set_field(self, "pose", self.pose or (PHOTO_POSE if self.photos else "rest"))

    def to_json(self) -> dict[str, Any]:
        """As the backend has it, but for images that it has not got yet."""
        return asdict(self)


def image_slots(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a request as JSON names images: objects, and the keys in them."""
    for photo in raw["photos"]:
        yield from ((photo, key) for key in ("image", "mask") if photo.get(key))
    others = [edit.get("other") for edit in raw["edits"]]
    for holder in (raw, *(other for other in others if isinstance(other, dict))):
        maps: dict[str, Any] = holder.get("latent_maps") or {}
        yield from ((maps, key) for key in maps)


def is_image_id(text: str) -> bool:
    """Whether the backend gave this name to an image, or would."""
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def inline(data: bytes) -> str:
    """Bytes of an image as text that can be stored and sent."""
    return _INLINE + base64.b64encode(data).decode()


def is_inline(image: str) -> bool:
    return image.startswith(_INLINE)


def image_pieces(image: str, size: int = 1 << 18) -> Iterator[bytes]:
    """The bytes of a file or of an `inline` text; the first piece is their number. Raises `BackendError`."""
    try:
        if is_inline(image):
            data = base64.b64decode(image.removeprefix(_INLINE), validate=True)
            yield str(len(data)).encode()
            yield from (data[i : i + size] for i in range(0, len(data), size))
            return
        with open(image, "rb") as file:
            total = left = os.fstat(file.fileno()).st_size
            if total > MAX_IMAGE_BYTES:
                name, limit = os.path.basename(image), MAX_IMAGE_BYTES >> 20
                raise BackendError("too_large", f"{name} is larger than {limit} MiB.", "Make it smaller.")
            yield str(total).encode()
            while left and (piece := file.read(min(size, left))):
                left -= len(piece)
                yield piece
    except OSError as error:
        raise BackendError("image_unreadable", masked(f"{image[:300]}: {error.strerror or type(error).__name__}."),
                           "Choose the photo again.") from None  # fmt: skip
    except ValueError:
        raise BackendError("image_unreadable", "A stored picture is damaged.", "Make the person anew.") from None


def _photo(photo: Image | Mapping[str, Any]) -> dict[str, Any]:
    given = dict(photo) if isinstance(photo, Mapping) else {"image": photo}
    texts = {key: given[key] for key in ("image", "mask") if given.get(key) is not None}
    texts = {key: inline(said) if isinstance(said, bytes) else os.fspath(said) for key, said in texts.items()}
    return {"mask": None, "person": 0, **given, **texts}


class RequestFields(TypedDict, total=False):
    """The fields of `Request` as keyword arguments, for type checkers; tests/contract keep the two alike."""

    seed: int
    family: str
    truncation_psi: float
    latents: Mapping[str, list[list[float]]] | None
    latent_maps: Mapping[str, str]
    photos: Sequence[Image | Mapping[str, Any]]
    inversion: Mapping[str, Any]
    parameters: Mapping[str, Any]
    prompt: str | None
    edits: list[Mapping[str, Any]]
    pose: str
    joint_rotations: Mapping[str, Sequence[float]] | None
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
