# SPDX-License-Identifier: GPL-3.0-or-later
"""What users call garments, hair styles and eyes: words to items with trims, and back. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PATTERNS = ("wide stripes", "narrow stripes", "vertical stripes", "checks", "block")

TRIMS = {"top": ("sleeve", "hem", "neck", "tilt"), "bottom": ("hem", "waist")}
"""Border parameters per part; numbers of about -1..1, see `cut.borders`."""

OPEN = {"top": (2.0, -4.0, -3.0, 0.0), "bottom": (-3.0, 1.0)}
"""Trims that cut nothing away."""

CUT, SKIRT = "cut", "skirt"  # items that are no files: cut from the body's surface, or from the kit's skirt helper


@dataclass(frozen=True)
class Style:
    """One way to make what a word says."""

    item: str
    trims: tuple[float, ...] = ()  # empty: as the item is


STYLES: dict[str, dict[str, tuple[Style, ...]]] = {
    "hair": {
        "short": (Style("short01"), Style("short04"), Style("short03")), "bob": (Style("bob01"),),
        "long": (Style("long01"),), "ponytail": (Style("ponytail01"),), "braid": (Style("braid01"),),
        "afro": (Style("afro01"),),
    },
    "top": {
        "t-shirt": (
            Style("male_casualsuit04/top"), Style(CUT, (-0.5, -0.6, 0.2, -0.5)), Style("female_casualsuit01/top"),
            Style("female_casualsuit02/top"), Style("male_casualsuit06/top"), Style("male_worksuit01/top"),
        ),
        "tank top": (Style(CUT, (-0.95, -0.6, 0.6, 0.2)),),
        "sweater": (Style("male_casualsuit02/top"), Style(CUT, (0.9, -0.6, 0.1, -0.5))),
        "shirt": (Style("male_casualsuit01/top"),),
        "blouse": (Style("female_elegantsuit01/top"),),
        "jacket": (Style("male_casualsuit05/outer"),),
        "suit jacket": (Style("male_elegantsuit01/top"),),
    },
    "bottom": {
        "trousers": (Style("male_elegantsuit01/bottom"), Style(CUT, (-0.95, -0.9))),
        "shorts": (Style(CUT, (0.45, -0.9)), Style("female_casualsuit02/bottom")),
        "skirt": (Style(SKIRT, (0.4, -0.9)), Style("female_elegantsuit01/bottom")),
        "long skirt": (Style(SKIRT, (-0.5, -0.9)),),
        "jeans": tuple(Style(f"{name}/bottom") for name in ("male_casualsuit02", "female_casualsuit01",
                       "male_casualsuit01", "male_casualsuit04", "male_casualsuit05", "male_casualsuit06")),
        "overalls": (Style("male_worksuit01/onepiece"),),
    },
    "shoes": {
        "leather shoes": (Style("shoes01/shoes"), Style("shoes03/shoes"), Style("shoes04/shoes")),
        "sneakers": (Style("shoes02/shoes"), Style("shoes05/shoes")),
    },
    "accessory": {"hat": (Style("fedora/hat"), Style("fedora_cocked/hat"))},
}  # fmt: skip
"""Words, and the items that make them, best first."""

CHOICES = {part: ("none", *words) for part, words in STYLES.items()}


EYES = {"blue": "blue", "bluegreen": "blue-green", "brown": "brown", "brownlight": "light brown",
        "deepblue": "deep blue", "green": "green", "grey": "grey", "ice": "ice", "lightblue": "light blue"}  # fmt: skip
"""Irises of the kit, and their colours' names."""


def styles(part: str, word: str) -> tuple[Style, ...]:
    """Ways to make `word`, best first; a word that is none is taken for an item's own name."""
    return STYLES[part].get(word) or (Style(word),)


def word_of(part: str, item: str, trims: Sequence[float] = ()) -> str:
    """What to call an item with these trims; an item that no word knows goes by its own name."""
    if item == SKIRT:
        return "skirt" if trims[0] > -0.1 else "long skirt"
    if item == CUT and part == "top":
        return "tank top" if trims[0] < -0.85 else "t-shirt" if trims[0] < 0.5 else "sweater"
    if item == CUT:
        return "shorts" if trims[0] > -0.1 else "trousers"
    word = next((w for w, ways in STYLES[part].items() if any(way.item == item for way in ways)), item)
    if trims and trims[0] > -0.1 and word in ("trousers", "jeans"):
        return "shorts"
    return "t-shirt" if word == "sweater" and trims and trims[0] < 0.5 else word
