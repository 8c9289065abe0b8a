# SPDX-License-Identifier: GPL-3.0-or-later
"""Folders of renders: what GET3D and Get3DHuman learn from. README.md in this folder documents the layout.

The reader looks at every file before training begins: a mistake found in hour three costs three hours.
"""

from __future__ import annotations

import json
import logging
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from backend.protocol import PopulaceError

log = logging.getLogger(__name__)

LAYOUT = "populace-renders-1"
INDEX = "cameras.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEPTH_UNIT = 1e-4  # of what the sampler and the Blender script write
REMEMBERED = 1 << 30  # bytes of pictures that are kept in memory
HELD_OUT = 8  # one item in so many is kept from training, to measure with

Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Lens:
    """The projection of all pictures of a folder: square, either perspective or orthographic."""

    fov_y: float | None = None  # radians; None: orthographic
    half_height: float = 0.0  # units above and below the axis, of orthographic ones

    def as_json(self) -> dict[str, float]:
        return {"half_height": self.half_height} if self.fov_y is None else {"fov_y_rad": self.fov_y}


@dataclass(frozen=True)
class Item:
    """One object or person."""

    name: str
    cameras: Mapping[str, Float[Pixels, "4 4"]]  # c2w by view
    unit_m: float = 1.0  # metres in a unit of the cameras
    code: tuple[float, ...] = ()  # numbers that describe it, each about standard normal over the folder

    @property
    def held_out(self) -> bool:
        """Whether training does not see it; its name alone says so."""
        return zlib.crc32(self.name.encode()) % HELD_OUT == 0


@dataclass(frozen=True)
class View:
    """One picture."""

    item: Item
    name: str

    @property
    def c2w(self) -> Float[Pixels, "4 4"]:
        return self.item.cameras[self.name]

    def file(self, kind: str = "") -> str:
        """Path in the folder; `kind` is "", "depth" or "normal"."""
        return f"{self.item.name}/{self.name}{'_' + kind if kind else ''}.png"


@dataclass(frozen=True)
class Renders:
    """A folder whose files have all been read once."""

    folder: Path
    size: int  # pixels along a side
    lens: Lens
    depth_unit: float  # of a depth picture's numbers; 0 without such pictures
    items: tuple[Item, ...]
    shrunk: int = 1  # pictures come so many times smaller than their files; depth and normals do not
    _kept: dict[str, Pixels] = field(default_factory=dict, repr=False)

    @cached_property
    def views(self) -> tuple[View, ...]:
        return tuple(View(item, name) for item in self.items for name in sorted(item.cameras))

    def part(self, held_out: bool) -> Renders:
        """The items kept from training, or all others."""
        return replace(self, items=tuple(i for i in self.items if i.held_out == held_out))

    def smaller(self, size: int) -> Renders:
        """The pictures at `size` pixels, means of whole blocks. Raises PopulaceError("invalid_request")."""
        if size < 16 or self.size % size:
            raise _wrong(f"Pictures of {self.size} pixels do not shrink to {size}",
                         f"Choose {self.size} divided by 2, 4, 8, ...; 16 at least.")  # fmt: skip
        return replace(self, size=size, shrunk=self.size // size, _kept={})

    def rgba(self, view: View) -> UInt8[Pixels, "S S 4"]:
        """Straight sRGB and coverage."""
        return self._read(view, "", _rgba)

    def depth(self, view: View) -> Float[Pixels, "S S"]:
        """Units along the camera's axis, 0 where nothing is seen."""
        return self._read(view, "depth", _depth) * np.float32(self.depth_unit)

    def normal(self, view: View) -> Float[Pixels, "S S 3"]:
        """Camera space: x right, y up, z to the viewer. About unit where something is seen."""
        return self._read(view, "normal", _normal).astype(np.float32) / 127.5 - 1

    def _read(self, view: View, kind: str, check: Any) -> Pixels:
        name = view.file(kind)
        if name in self._kept:
            return self._kept[name]
        pixels = check(self.folder / name, name, self.size * self.shrunk)
        if self.shrunk > 1:
            pixels = _block_means(pixels, self.shrunk)
        if len(self._kept) < REMEMBERED // (4 * self.size**2):
            self._kept[name] = pixels
        return pixels


# --- reading ----------------------------------------------------------------------------------------------------------


def read(folder: Path, maps: bool = False) -> Renders:
    """The folder, every picture looked at; with `maps` there have to be depth and normals.

    Raises PopulaceError("not_found") where there is no such folder, and ("invalid_request") with the file's name for
    everything else that is not as documented.
    """
    if not folder.is_dir():
        raise PopulaceError("not_found", f"There is no folder {folder}.",
                            "Make one with: populace renders --kit FOLDER --out FOLDER.")  # fmt: skip
    raw = _index(folder)
    size, unit = _number(raw, "resolution"), _number(raw, "depth_unit", 0.0)
    if size != int(size) or not 16 <= size <= 4096:
        raise _wrong(f"{INDEX} says a resolution of {size:g}", "Pictures are squares of 16 to 4096 pixels.")
    items = raw.get("items")
    if not isinstance(items, dict) or not items:
        raise _wrong(f"{INDEX} names no items", "It needs a camera for every picture.")
    renders = Renders(folder, int(size), _lens(raw), unit, tuple(_item(k, v) for k, v in sorted(items.items())))
    if len({len(item.code) for item in renders.items}) > 1:
        raise _wrong(f"{INDEX}: items have codes of different length", "Give all items as many numbers, or none.")
    if maps and not unit:
        raise _wrong(f"{INDEX} has no depth_unit, so {folder.name} has no depth and normals",
                     "Get3DHuman needs both: populace renders --for get3dhuman.")  # fmt: skip
    _compare_names(renders)
    with ThreadPoolExecutor() as pool:  # PIL unpacks without the interpreter's lock
        for work in (renders.rgba, *([renders.depth, renders.normal] if maps else [])):
            for _ in pool.map(work, renders.views):
                pass
    return renders


def _index(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / INDEX).read_text("utf-8"))
    except FileNotFoundError:
        raise _wrong(
            f"{folder} has pictures without cameras: there is no {INDEX}",
            "backend/training/README.md says what it holds; populace renders writes one.",
        ) from None
    except (OSError, ValueError) as error:
        raise _wrong(f"{folder / INDEX} cannot be read: {error}", "Write the folder again.") from None
    if not isinstance(raw, dict) or raw.get("layout") != LAYOUT:
        found = raw.get("layout") if isinstance(raw, dict) else None
        raise _wrong(f"{INDEX} is of layout {found!r} and not {LAYOUT!r}", "Write the folder again.")
    return raw


def _lens(raw: Mapping[str, Any]) -> Lens:
    if ("fov_y_rad" in raw) == ("half_height" in raw):
        raise _wrong(f"{INDEX} must say either fov_y_rad or half_height",
                     "The first is of perspective pictures, the other of orthographic ones.")  # fmt: skip
    if "fov_y_rad" in raw:
        angle = _number(raw, "fov_y_rad")
        if not 0.01 < angle < 3:
            raise _wrong(f"{INDEX}: a field of view of {angle:g} radians is none", "49 degrees are 0.857.")
        return Lens(fov_y=angle)
    half = _number(raw, "half_height")
    if half <= 0:
        raise _wrong(f"{INDEX}: half_height is {half:g}", "It must be positive.")
    return Lens(half_height=half)


def _item(name: str, raw: Any) -> Item:
    if not NAME.fullmatch(name):
        raise _wrong(f"{INDEX}: {name!r} is no item's name", "Names have letters, digits, dot, dash and underscore.")
    cameras = raw.get("views") if isinstance(raw, dict) else None
    if not isinstance(cameras, dict) or not cameras:
        raise _wrong(f"{INDEX}: {name} has no views", "Every item needs at least one picture with its camera.")
    code = raw.get("code", [])
    if not isinstance(code, list) or not all(_is_number(c) for c in code):
        raise _wrong(f"{INDEX}: the code of {name} is no list of numbers", "Leave it out, or write it again.")
    return Item(name, {view: _camera(f"{name}/{view}", c2w) for view, c2w in cameras.items()},
                _number(raw, "unit_m", 1.0), tuple(map(float, code)))  # fmt: skip


def _camera(where: str, raw: Any) -> Float[Pixels, "4 4"]:
    if not NAME.fullmatch(where.partition("/")[2]):
        raise _wrong(f"{INDEX}: {where!r} is no view's name", "Names have letters, digits, dot, dash and underscore.")
    try:
        matrix = np.array(raw, np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    turn = matrix[:3, :3] if matrix.shape == (4, 4) else np.zeros((3, 3))
    rigid = np.isfinite(matrix).all() and np.abs(turn @ turn.T - np.eye(3)).max() < 1e-3 and np.linalg.det(turn) > 0
    if not rigid or np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise _wrong(f"{INDEX}: the camera of {where} is no rigid motion of 4 rows of 4 numbers",
                     "It is camera space to world space, the camera looking along its own -Z.")  # fmt: skip
    return matrix.astype(np.float32)


def _compare_names(renders: Renders) -> None:
    """Every picture has a camera, every camera a picture."""
    known = {view.file(kind) for view in renders.views for kind in ("", "depth", "normal")}
    found = {p.relative_to(renders.folder).as_posix() for p in renders.folder.rglob("*.png")}
    if strays := sorted(found - known):
        raise _wrong(f"{strays[0]} has no camera in {INDEX}" + _more(strays), "Add its camera, or take it away.")
    if missing := sorted({view.file() for view in renders.views} - found):
        raise _wrong(f"{INDEX} has a camera for {missing[0]}, but there is no such file" + _more(missing),
                     "Render it, or take the camera away.")  # fmt: skip


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _opened(path: Path, name: str, size: int, modes: Sequence[str], what: str) -> Pixels:
    try:
        with Image.open(path) as image:
            if image.mode not in modes:
                raise _wrong(f"{name} is of mode {image.mode}, and not {what}", "Render it again.")
            if image.size != (size, size):
                raise _wrong(f"{name} has {image.width} x {image.height} pixels, but {INDEX} says {size} x {size}",
                             "All pictures of a folder have one size.")  # fmt: skip
            return np.array(image)
    except FileNotFoundError:
        raise _wrong(f"{name} is missing", "Render it again.") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's ways to say that a file is broken
        raise _wrong(f"{name} cannot be read as a picture: {error}", "The file is broken; render it again.") from None


def _rgba(path: Path, name: str, size: int) -> Pixels:
    pixels = _opened(path, name, size, ("RGBA",), "RGBA: it has no mask")
    low, high = int(pixels[..., 3].min()), int(pixels[..., 3].max())
    if low == 255:
        raise _wrong(f"{name} is opaque everywhere: it has no mask", "Render it with a transparent background.")
    if high == 0:
        raise _wrong(f"{name} is empty: nothing in it is opaque", "Its camera looks past the object.")
    return pixels


def _block_means(rgba: Pixels, side: int) -> Pixels:
    """Coverage is the mean, colour the mean of what is covered."""
    blocks = rgba.reshape(rgba.shape[0] // side, side, -1, side, 4).astype(np.float32)
    alpha = blocks[..., 3:].mean((1, 3))
    color = (blocks[..., :3] * blocks[..., 3:]).mean((1, 3)) / np.maximum(alpha, 1e-3)
    return np.rint(np.concatenate([color, alpha], 2)).clip(0, 255).astype(np.uint8)


def _depth(path: Path, name: str, size: int) -> Pixels:
    return _opened(path, name, size, ("I;16", "I"), "a grey picture of 16 bits").astype(np.uint16)


def _normal(path: Path, name: str, size: int) -> Pixels:
    return _opened(path, name, size, ("RGB",), "RGB")


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if not _is_number(value):
        raise _wrong(f"{INDEX}: {key} is {value!r} and not a number", "backend/training/README.md has an example.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(message: str, hint: str) -> PopulaceError:
    return PopulaceError("invalid_request", f"{message}.", hint)


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a folder. The index comes last, so a folder with one is whole."""

    def __init__(self, folder: Path, size: int, lens: Lens, maps: bool) -> None:
        """Raises PopulaceError("invalid_request") if the folder has something in it."""
        if folder.exists() and any(folder.iterdir()):
            raise _wrong(f"{folder} is not empty", "Renders go to a folder of their own.")
        self.folder, self.size, self.lens, self.maps = folder, size, lens, maps
        self.items: dict[str, Any] = {}

    def picture(
        self, item: str, view: str, rgba: UInt8[Pixels, "S S 4"], depth: Float[Pixels, "S S"] | None = None,
        normal: Float[Pixels, "S S 3"] | None = None,
    ) -> None:  # fmt: skip
        """As `Renders` gives them back."""
        folder = self.folder / item
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgba).save(folder / f"{view}.png")
        if depth is not None:
            Image.fromarray(np.rint(depth / DEPTH_UNIT).clip(0, 65535).astype(np.uint16)).save(
                folder / f"{view}_depth.png"
            )
        if normal is not None:
            Image.fromarray(np.rint((normal + 1) * 127.5).clip(0, 255).astype(np.uint8)).save(
                folder / f"{view}_normal.png"
            )

    def item(self, item: Item) -> None:
        entry: dict[str, Any] = {"views": {name: np.round(c2w.astype(float), 7).tolist()
                                           for name, c2w in item.cameras.items()}}  # fmt: skip
        if item.unit_m != 1:
            entry["unit_m"] = item.unit_m
        if item.code:
            entry["code"] = [round(c, 4) for c in item.code]
        self.items[item.name] = entry

    def close(self) -> None:
        index = {"layout": LAYOUT, "resolution": self.size, **self.lens.as_json(), "items": self.items}
        if self.maps:
            index["depth_unit"] = DEPTH_UNIT
        temporary = self.folder / f"{INDEX}.tmp"
        temporary.write_text(json.dumps(index), "utf-8")
        temporary.replace(self.folder / INDEX)
