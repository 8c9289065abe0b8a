# SPDX-License-Identifier: GPL-3.0-or-later
"""What the generator can make: its families with their attributes, parts and poses. Pure Python: no bpy, no sockets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from .messages import BadReply

MAX_FAMILIES: Final = 64
MAX_NAMES: Final = 256  # of one family's attributes, parts, poses or choices
KINDS: Final = frozenset({"number", "color", "choice"})


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said of every person of a family: a slider, a colour, or a choice of names."""

    name: str
    title: str
    kind: str  # one of KINDS
    low: float = 0.0  # of numbers
    high: float = 1.0
    unit: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One kind of generator. `parts` begins with the body; `weights_sha256` is "" where nothing is to be known."""

    name: str
    title: str
    attributes: tuple[Attribute, ...]
    parts: tuple[str, ...]
    poses: tuple[str, ...]
    weights_sha256: str = ""

    def attribute(self, name: str) -> Attribute | None:
        return next((attribute for attribute in self.attributes if attribute.name == name), None)

    @property
    def numbers(self) -> tuple[Attribute, ...]:
        return tuple(attribute for attribute in self.attributes if attribute.kind == "number")


def parse(families: Any, weights: Any = ()) -> tuple[Family, ...]:
    """From the replies of GET /v1/families and GET /v1/weights. Raises `BadReply`."""
    if not isinstance(families, list) or not all(isinstance(raw, dict) for raw in families):
        raise BadReply("a list of families that is none")
    hashes = {raw["name"]: raw.get("sha256") for raw in weights if isinstance(raw, dict) and "name" in raw}
    return tuple(_family(raw, hashes) for raw in families[:MAX_FAMILIES])


def _family(raw: dict[str, Any], hashes: dict[Any, Any]) -> Family:
    attributes = raw.get("attributes", [])
    if not isinstance(attributes, (list, tuple)) or len(attributes) > MAX_NAMES:
        raise BadReply("a family with strange attributes")
    sha256 = hashes.get(raw.get("weights"))
    return Family(_identifier(raw.get("name")), str(raw.get("title", ""))[:60], tuple(map(_attribute, attributes)),
                  _names(raw.get("parts", ())), _names(raw.get("poses", ())),
                  sha256 if isinstance(sha256, str) else "")  # fmt: skip


def _attribute(raw: Any) -> Attribute:
    if not isinstance(raw, dict) or raw.get("kind") not in KINDS:
        raise BadReply("an attribute of an unknown kind")
    low, high = raw.get("low", 0.0), raw.get("high", 1.0)
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (low, high)) or low >= high:
        raise BadReply("an attribute without bounds")
    return Attribute(_identifier(raw.get("name")), str(raw.get("title", ""))[:60], raw["kind"], float(low), float(high),
                     str(raw.get("unit", ""))[:10], _names(raw.get("choices", ())))  # fmt: skip


def _names(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, (list, tuple)) or len(raw) > MAX_NAMES or not all(isinstance(name, str) for name in raw):
        raise BadReply("a list of names that is none")
    return tuple(name[:63] for name in raw)


def _identifier(raw: Any) -> str:
    """A name that may become that of a property."""
    if not isinstance(raw, str) or not raw.isidentifier() or raw.startswith("_") or len(raw) > 32:
        raise BadReply("a name that is none")
    return raw
