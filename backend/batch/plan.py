# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan: a text file with one request per line. What may be in it, how it is read, and how one is written.

Each line is a JSON object: the fields of a request (`backend.protocol.GenerateRequest`: seed, prompt, edits, pose, ...)
and, all optional:

    id       name of the files, letters, digits, - and _ (default: person_<seed>)
    count    this many people, with seeds from `seed` on; ids then end in _0000, _0001, ...
    formats  list of glb, obj, usd, fbx, blend, packet (default: what the command line says)
    preset   none, unreal, unity or godot: units, axes and names of bones in the files
    photos   of one person: paths of files, relative to the plan's folder, or objects with image, mask (both paths) and
             person; also the paths in latent_maps. What counts is what is in the files, not where they are

Empty lines do not count. A plan is read whole and every mistake in it is named before anything is made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

from backend import __version__, checks, families
from backend.families.base import Attribute
from backend.interchange import Format, PresetName, default_formats
from backend.photo.album import Album
from backend.protocol import GenerateRequest, PopulaceError, invalid, parse_json
from backend.settings import Settings

MAX_ITEMS: Final = 100_000
MAX_PLAN_BYTES: Final = 256 << 20
SHOWN_MISTAKES: Final = 20
PHOTO_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
_WINDOWS_NAMES: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


def _usable(name: str) -> str:
    if _WINDOWS_NAMES.fullmatch(name):
        raise ValueError(f"{name} cannot be the name of a file on Windows")
    return name


def _once(formats: list[Format]) -> list[Format]:
    if len(set(formats)) < len(formats):
        raise ValueError("a format appears twice")
    return formats


Formats = Annotated[list[Format], Field(min_length=1), AfterValidator(_once)]


class PlanLine(GenerateRequest):
    """One line of a plan."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"), AfterValidator(_usable)] | None = None
    count: int = Field(default=1, ge=1, le=MAX_ITEMS)
    formats: Formats | None = None
    preset: PresetName | None = None


_OWN = frozenset(PlanLine.model_fields) - frozenset(GenerateRequest.model_fields)


@dataclass(frozen=True)
class Item:
    """One person to be made, and the files to be written of them."""

    id: str
    request: GenerateRequest
    formats: tuple[Format, ...]
    preset: PresetName
    line: int = 0  # of the plan
    images: Mapping[str, str] = field(default_factory=dict)  # files by id, where the request names images

    @cached_property
    def digest(self) -> str:
        """Changes with everything that the files depend on: request, formats, version, weights."""
        used = _weights_sha256(self.request.family, Settings.load().data_dir)
        said = {name: value for name, value in self.to_json().items() if name != "images"}
        text = json.dumps([__version__, used, said], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "request": self.request.model_dump(mode="json"), "formats": list(self.formats),
                "preset": self.preset, "images": dict(self.images)}  # fmt: skip

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Item:
        request = GenerateRequest.model_validate(raw["request"])
        return cls(raw["id"], request, tuple(raw["formats"]), raw["preset"], images=raw["images"])


@cache
def _weights_sha256(family: str, data_dir: Path) -> str | None:
    """Of the weights that will be used: those that the user put in their place, if any."""
    from backend import weights

    name = families.info(family).weights
    chosen = weights.replacements(data_dir).get(name, name) if name else None
    return next((m.sha256 for m in weights.manifests(data_dir=data_dir) if m.name == chosen), None)


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path, formats: Sequence[Format] = (), preset: PresetName = "none") -> list[Item]:
    """All people of a plan, in order; `formats` and `preset` are for lines that name none.

    Raises `invalid_request` with the number of every bad line and what is wrong with it.
    """
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise PopulaceError("invalid_request", f"{path} is larger than {MAX_PLAN_BYTES >> 20} MiB.", "Split it.")
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise PopulaceError("invalid_request", f"The plan {path} cannot be read: {error.strerror}.",
                            "Name a file with one JSON request per line.") from None  # fmt: skip
    items: list[Item] = []
    mistakes: list[str] = []
    taken: dict[str, int] = {}  # by how ids compare on disks that ignore case
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            found = list(_items(text, number, formats, preset, path.absolute().parent))
            for item in found:
                if (first := taken.setdefault(item.id.casefold(), number)) != number:
                    raise PopulaceError("invalid_request", f"its id {item.id!r} is that of line {first} already.")
        except PopulaceError as error:
            mistakes.append(f"line {number}: {error.message}")
            continue
        items += found
        if len(items) > MAX_ITEMS:
            raise PopulaceError("invalid_request", f"{path} asks for more than {MAX_ITEMS} people.", "Split the plan.")
    if mistakes:
        more = [f"and {len(mistakes) - SHOWN_MISTAKES} more"] if len(mistakes) > SHOWN_MISTAKES else []
        count = "one bad line" if len(mistakes) == 1 else f"{len(mistakes)} bad lines"
        raise PopulaceError("invalid_request", "\n  ".join([f"{path} has {count}.", *mistakes[:SHOWN_MISTAKES], *more]),
                            "Nothing was made. Correct the plan.")  # fmt: skip
    if not items:
        raise PopulaceError("invalid_request", f"The plan {path} is empty.", "Write one JSON request per line.")
    return items


def _items(text: bytes, number: int, formats: Sequence[Format], preset: PresetName, folder: Path) -> Iterator[Item]:
    """The people of one line; photos are looked for in `folder`."""
    raw = parse_json(text)
    if not isinstance(raw, dict):
        raise PopulaceError("invalid_request", "it is not a JSON object.")
    album = Album()
    raw = _with_ids(raw, album, folder)
    try:
        line = PlanLine.model_validate(raw)
        first = GenerateRequest.model_validate({k: v for k, v in raw.items() if k not in _OWN})
        requests = [GenerateRequest.model_validate({**first.model_dump(), "seed": first.seed + i})
                    for i in range(line.count)]  # fmt: skip
    except ValidationError as error:
        raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None
    checks.check(first)
    chosen = line.preset or preset
    for i, request in enumerate(requests):
        name = f"person_{request.seed:06d}" if line.id is None else f"{line.id}_{i:04d}" if line.count > 1 else line.id
        yield Item(name, request, tuple(line.formats or formats or default_formats(chosen)), chosen, number,
                   album.paths())  # fmt: skip


def _with_ids(raw: dict[str, Any], album: Album, folder: Path) -> dict[str, Any]:
    """The line with ids in the place of paths; what is no path stays for the request's own checks."""

    def named(said: Any) -> Any:
        return album.add(folder / said) if isinstance(said, str) and said else said

    raw = dict(raw)
    if isinstance(raw.get("photos"), list):
        photos = [{"image": photo} if isinstance(photo, str) else photo for photo in raw["photos"]]
        raw["photos"] = [{k: named(v) if k in ("image", "mask") else v for k, v in photo.items()}
                         if isinstance(photo, dict) else photo for photo in photos]  # fmt: skip
    if isinstance(raw.get("latent_maps"), dict):
        raw["latent_maps"] = {name: named(said) for name, said in raw["latent_maps"].items()}
    return raw


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Spread:
    """How an attribute, the pose or words are spread over the people of a plan: shares of `values`, or evenly between
    `low` and `high`."""

    name: str
    values: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Spread:
        """From `age_years=25..70`, `pose=walking:30,sitting:70` or `words=woman:60,man:40`. Raises ValueError."""
        name, found, rest = text.partition("=")
        if not (name and found and rest):
            raise ValueError("must look like NAME=LOW..HIGH or NAME=VALUE:PERCENT,VALUE:PERCENT")
        if ".." in rest:
            low, _, high = rest.partition("..")
            return cls(name, low=float(low), high=float(high))
        pairs = [pair.rpartition(":") if ":" in pair else (pair, ":", "1") for pair in rest.split(",")]
        weights = tuple(float(weight) for _, _, weight in pairs)
        if not all(value for value, _, _ in pairs) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError("must look like NAME=VALUE:PERCENT,VALUE:PERCENT")
        return cls(name, tuple(value for value, _, _ in pairs), weights)

    def draw(self, count: int, seed: int) -> list[Any]:
        """A value per person: exact shares, or as even as it gets, in an order that depends on seed and spread."""
        digest = hashlib.sha256(f"{seed}/{self}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        if not self.values:
            steps = (rng.permutation(count) + rng.random(count)) / count
            return [round(self.low + (self.high - self.low) * float(t), 4) for t in steps]
        exact = np.array(self.weights) / sum(self.weights) * count
        shares = np.floor(exact).astype(int)
        shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
        return [self.values[i] for i in rng.permutation(np.repeat(np.arange(len(shares)), shares))]


def write(request: GenerateRequest, count: int, spreads: Sequence[Spread], formats: Sequence[Format],
          preset: PresetName) -> Iterator[str]:  # fmt: skip
    """The lines of a plan of `count` people with seeds from the request's on. Raises `invalid_request`."""
    known = {attribute.name: attribute for attribute in families.info(request.family).attributes}
    drawn = [(spread.name, spread.draw(count, request.seed)) for spread in spreads]
    extra = {**({"formats": list(formats)} if formats else {}), **({"preset": preset} if preset != "none" else {})}
    base = request.model_dump(mode="json", exclude_defaults=True)
    for i in range(count):
        line = {"id": f"person_{request.seed + i:06d}", **base, "seed": request.seed + i, **extra}
        values: dict[str, Any] = {}
        edits: list[Any] = [*base.get("edits", ())]
        for name, column in drawn:
            if name == "pose":
                line["pose"] = column[i]
            elif name == "words":
                edits.append({"op": "words", "text": column[i]})
            else:
                values[name] = _value(name, known, column[i])
        if values:
            edits.append({"op": "set", "values": values})
        if edits:
            line["edits"] = edits
        text = json.dumps(line)
        list(_items(text.encode(), i + 1, (), "none", Path()))  # raises what reading it would
        yield text


def of_photos(request: GenerateRequest, folder: Path, formats: Sequence[Format], preset: PresetName) -> Iterator[str]:
    """The lines of a plan with a person per photo in `folder`, or per folder of photos in it; `folder` as the plan has
    to name it. A file NAME.mask.png is the mask of the photo NAME. Raises `invalid_request` and what photos raise."""
    extra = {**({"formats": list(formats)} if formats else {}), **({"preset": preset} if preset != "none" else {})}
    base = request.model_dump(mode="json", exclude_defaults=True)
    taken: set[str] = set()
    for place in sorted(folder.iterdir()):
        shown = _photos_of(sorted(place.iterdir()) if place.is_dir() else [place])
        if not shown:
            continue
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in place.stem).lstrip("-_")[:60]
        while not name or name.casefold() in taken or _WINDOWS_NAMES.fullmatch(name):
            name = f"{name or 'person'}_{len(taken) + 1}"
        taken.add(name.casefold())
        text = json.dumps({"id": name, **base, "photos": shown, **extra})
        list(_items(text.encode(), len(taken), (), "none", Path()))
        yield text
    if not taken:
        raise PopulaceError("invalid_request", f"There are no photos in {folder}.", "PNG, JPEG and WebP are photos.")


def _photos_of(paths: Sequence[Path]) -> list[dict[str, str]]:
    photos = [path for path in paths if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file()]
    masks = {path.name[: -len(path.suffix) - len(".mask")]: path for path in photos if path.stem.endswith(".mask")}
    return [{"image": str(path), **({"mask": str(masks[path.stem])} if path.stem in masks else {})}
            for path in photos if not path.stem.endswith(".mask")]  # fmt: skip


def _value(name: str, known: dict[str, Attribute], value: Any) -> Any:
    """What a request wants for a value that was typed."""
    from backend import words

    if name not in known:
        raise PopulaceError("invalid_request", f"There is no attribute {name!r} to spread.",
                            f"There are: pose, words, {', '.join(known)}.")  # fmt: skip
    if known[name].kind == "color":
        rgb = words.color(str(value).lower())
        if rgb is None:
            raise PopulaceError("invalid_request", f"{value!r} is no colour.", "Give #rrggbb or a CSS name.")
        return list(rgb)
    if known[name].kind == "number":
        try:
            return float(value)
        except ValueError:
            raise PopulaceError("invalid_request", f"{name} is a number.", f"Write {name}=LOW..HIGH.") from None
    return value
