# SPDX-License-Identifier: GPL-3.0-or-later
"""What an asset library is told about people: catalogues, tags, a sentence. No bpy.

A catalogue file is Blender's: lines of `uuid:path:simple name` below `VERSION 1`. Whatever else is in it stays.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

CATALOG_FILE: Final = "blender_assets.cats.txt"
HEADER: Final = (
    "# This is an Asset Catalog Definition file for Blender.\n#\n"
    "# Empty lines and lines starting with `#` will be ignored.\n"
    "# The first non-ignored line should be the version indicator.\n"
    '# Other lines are of the format "UUID:catalog/path/for/assets:simple catalog name"\n\nVERSION 1\n\n'
)
OURS: Final = uuid.UUID("6f2d4f0e-2b5c-4c0a-9d0e-9b8f3f1d7a11")  # the same path gets the same id on every computer
AGES: Final = ((35, "young"), (60, "middle-aged"), (999, "old"))
COLORS: Final = {
    "black": (0.04, 0.04, 0.04), "grey": (0.5, 0.5, 0.5), "white": (0.95, 0.95, 0.95), "red": (0.7, 0.1, 0.1),
    "orange": (0.9, 0.5, 0.1), "yellow": (0.9, 0.85, 0.2), "green": (0.15, 0.5, 0.2), "teal": (0.1, 0.5, 0.5),
    "blue": (0.15, 0.25, 0.65), "purple": (0.45, 0.2, 0.55), "pink": (0.9, 0.6, 0.7), "brown": (0.38, 0.24, 0.14),
    "beige": (0.8, 0.72, 0.58),
}  # fmt: skip


def clean_path(text: str) -> str:
    """A catalogue's path as Blender keeps it: no colons, no empty steps."""
    return "/".join(filter(None, (step.strip() for step in text.replace(":", "-").replace("\\", "/").split("/"))))


def catalog_id(path: str) -> str:
    return str(uuid.uuid5(OURS, path))


def merge_catalog(folder: Path, path: str) -> str:
    """See to it that the folder's catalogue file has this path. Returns its id, which may have been there before.
    Written in one step, only if something changes. Raises OSError or UnicodeDecodeError."""
    file = folder / CATALOG_FILE
    text = file.read_text(encoding="utf-8") if file.exists() else HEADER
    lines = [line.strip() for line in text.splitlines()]
    for line in lines:
        identity, _, rest = line.partition(":")
        if not line.startswith("#") and rest.partition(":")[0] == path:
            with contextlib.suppress(ValueError):
                return str(uuid.UUID(identity))
    if not any(line.startswith("VERSION") for line in lines):
        text = HEADER + text
    text += "" if text.endswith("\n") else "\n"
    text += f"{catalog_id(path)}:{path}:{path.replace('/', '-')}\n"
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return catalog_id(path)


def tags(attributes: Mapping[str, Any], extra: str = "") -> list[str]:
    """Sex, age group, build, garments and colours, then the user's own, separated by commas. None twice."""
    found = [word for word in (_sex(attributes), _age(attributes), *_build(attributes)) if word]
    for name, value in attributes.items():
        if isinstance(value, str) and value not in ("", "none") and not name.endswith("_color"):
            found.append(value if name != "hair" else f"{value} hair" if "hair" not in value else value)
    for name, value in attributes.items():
        thing = name.removesuffix("_color")
        worn = attributes.get(thing, "")
        if thing != name and worn != "none" and (color := color_name(value)):
            found.append(f"{color} {'hair' if thing == 'hair' else worn or thing}")
    found += [word.strip() for word in extra.split(",") if word.strip()]
    return list(dict.fromkeys(word[:63] for word in found))


def sentence(attributes: Mapping[str, Any]) -> str:
    """Such as: Middle-aged woman, 1.68 m, 47 years, in white shirt and blue jeans."""
    who = {"female": "woman", "male": "man"}.get(_sex(attributes), "person")
    facts = [" ".join(filter(None, (_age(attributes), who)))]
    if _is_number(attributes.get("height_m")):
        facts.append(f"{attributes['height_m']:.2f} m")
    if _is_number(attributes.get("age_years")):
        facts.append(f"{attributes['age_years']:.0f} years")
    things = {part: attributes.get(part) for part in ("top", "bottom")}
    worn = [" ".join(filter(None, (color_name(attributes.get(f"{part}_color")), thing)))
            for part, thing in things.items() if isinstance(thing, str) and thing != "none"]  # fmt: skip
    text = ", ".join(facts) + (f", in {' and '.join(worn)}" if worn else "")
    return text[0].upper() + text[1:]


def color_name(rgb: Any) -> str:
    """The nearest plain colour, "" if this is no colour. Hue counts more than light."""
    if not isinstance(rgb, Sequence) or isinstance(rgb, str) or len(rgb) != 3 or not all(map(_is_number, rgb)):
        return ""

    def away(other: Sequence[float]) -> float:
        mean = sum(rgb) / 3 - sum(other) / 3
        hue = sum(((a - sum(rgb) / 3) - (b - sum(other) / 3)) ** 2 for a, b in zip(rgb, other))
        return hue * 4 + mean**2

    return min(COLORS, key=lambda name: away(COLORS[name]))


def _sex(attributes: Mapping[str, Any]) -> str:
    sex = attributes.get("sex")
    return "" if not _is_number(sex) or 0.4 < sex < 0.6 else "male" if sex > 0.5 else "female"


def _age(attributes: Mapping[str, Any]) -> str:
    years = attributes.get("age_years")
    return next(word for limit, word in AGES if years < limit) if _is_number(years) and years < 999 else ""


def _build(attributes: Mapping[str, Any]) -> list[str]:
    weight, muscle = attributes.get("weight"), attributes.get("muscle")
    return ["slim" if _is_number(weight) and weight < 0.35 else "heavy" if _is_number(weight) and weight > 0.65 else "",
            "muscular" if _is_number(muscle) and muscle > 0.7 else ""]  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
