# SPDX-License-Identifier: GPL-3.0-or-later
"""Plain words: what is understood, what is honestly not, and that no text is too odd."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import ImageColor

from backend import vocabulary, words
from backend.families import capsule
from backend.families.base import Attribute
from backend.words import understand


def number(name: str, low: float = 0, high: float = 1) -> Attribute:
    return Attribute(name, name, "number", low, high)


def choice(name: str, *choices: str) -> Attribute:
    return Attribute(name, name, "choice", choices=choices)


PEOPLE = (
    number("sex"), number("age_years", 25, 90), number("height_m", 1.45, 2.05), number("weight"), number("muscle"),
    number("skin_tone"), *(Attribute(f"{part}_color", part, "color") for part in ("hair", "top", "bottom", "shoes",
                                                                                  "accessory")),
    choice("eye_color", "brown", "blue", "green", "grey"),
    choice("hair", "none", "short", "bob", "long", "ponytail", "braid", "afro"),
    choice("top", "none", "t-shirt", "shirt", "sweater", "blouse", "jacket", "suit jacket"),
    choice("bottom", "trousers", "jeans", "shorts", "skirt", "long skirt", "overalls"),
    choice("shoes", "none", "sneakers", "boots"), choice("accessory", "none", "hat"),
)  # fmt: skip
RED, GREY_HAIR = [1.0, 0.0, 0.0], list(vocabulary.HAIR_COLORS["grey"])


def heard(text: str, **current: Any) -> dict[str, Any]:
    said = understand(text, PEOPLE, current)
    assert said.ignored == []
    return said.values


def test_the_two_examples() -> None:
    assert heard("tall old woman, red shirt, grey hair") == {
        "sex": 0.0, "height_m": pytest.approx(1.63 + 0.11), "age_years": 72.0, "top": "shirt", "top_color": RED,
        "hair_color": GREY_HAIR,
    }  # fmt: skip
    said = understand("bald man with beard, blue jeans", PEOPLE)
    assert said.values == {"hair": "none", "sex": 1.0, "bottom": "jeans", "bottom_color": [0.0, 0.0, 1.0]}
    assert said.ignored == ["beard"]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("180 cm", "height_m", 1.8), ("1.80 m tall", "height_m", 1.8), ("1,8m", "height_m", 1.8),
        ("1m75", "height_m", 1.75), ("1.6 metres", "height_m", 1.6), ("6 ft 1", "height_m", 73 * 0.0254),
        ("6'1\"", "height_m", 73 * 0.0254), ("six foot two", "height_m", 74 * 0.0254), ("5 feet", "height_m", 1.524),
        ("5’11”", "height_m", 71 * 0.0254), ("60 years old", "age_years", 60), ("aged 33", "age_years", 33),
        ("sixty-five-year-old", "age_years", 65), ("47yo", "age_years", 47), ("in his thirties", "age_years", 35),
        ("late forties", "age_years", 48), ("in her early 50s", "age_years", 52), ("thirty-something", "age_years", 35),
    ],
)  # fmt: skip
def test_numbers(text: str, name: str, value: float) -> None:
    assert heard(text)[name] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("text", ["3 m tall", "90 cm", "12 years old", "9 feet", "75 kg", "two heads"])
def test_numbers_out_of_range_or_of_nothing_we_know_are_reported(text: str) -> None:
    said = understand(text, PEOPLE)
    assert said.values == {}
    assert said.ignored


def test_degrees_order_and_what_tall_is() -> None:
    order = ["very short", "short", "slightly short", "slightly tall", "tall", "very tall", "extremely tall"]
    heights = [heard(f"{words} man")["height_m"] for words in order]
    assert heights == sorted(heights)
    assert len(set(heights)) == len(heights)
    assert heard("tall woman")["height_m"] == pytest.approx(heard("tall man")["height_m"] - 0.14)
    assert heard("tall", sex=1.0) == {"height_m": pytest.approx(1.88)}
    assert heard("very old")["age_years"] == pytest.approx(45 + 1.5 * 27)
    assert heard("not tall man")["height_m"] == pytest.approx(1.77)
    assert heard("slightly overweight") == {"weight": pytest.approx(0.65)}
    assert heard("extremely obese")["weight"] == 1


def test_a_number_outweighs_an_adjective() -> None:
    assert heard("tall old man, 62 years old, 1.70 m") == {"sex": 1.0, "age_years": 62.0, "height_m": 1.7}


def test_comparatives_start_from_the_person() -> None:
    assert heard("taller", height_m=1.6) == {"height_m": pytest.approx(1.655)}
    assert heard("heavier and older", weight=0.2, age_years=30.0) == {"weight": 0.35, "age_years": 43.5}
    assert heard("less muscular", muscle=0.5)["muscle"] < heard("more muscular", muscle=0.5)["muscle"]
    assert heard("much fatter", weight=0.2)["weight"] > heard("slightly fatter", weight=0.2)["weight"] > 0.2


@pytest.mark.parametrize("word", ["no hat", "without a hat", "hatless", "not wearing a hat", "doesn't wear any hat"])
def test_negation(word: str) -> None:
    said = understand(f"{word}, red boots", PEOPLE)
    assert said.values == {"accessory": "none", "shoes": "boots", "shoes_color": RED}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("bald", {"hair": "none"}), ("barefoot", {"shoes": "none"}), ("topless", {"top": "none"}),
        ("no beard but a hat", {"accessory": "hat"}),
        ("long blonde hair, long skirt", {"hair": "long", "hair_color": list(vocabulary.HAIR_ONLY["blonde"]),
                                          "bottom": "long skirt"}),
        ("short-haired short man", {"hair": "short", "sex": 1.0, "height_m": pytest.approx(1.66)}),
        ("her hair is long and grey", {"sex": 0.0, "hair": "long", "hair_color": GREY_HAIR}),
        ("eyes: blue", {"eye_color": "blue"}), ("green-eyed lady", {"eye_color": "green", "sex": 0.0}),
        ("navy blue pullovers", {"top": "sweater", "top_color": [0, 0, pytest.approx(128 / 255, abs=1e-4)]}),
        ("tee", {"top": "t-shirt"}), ("T-Shirt", {"top": "t-shirt"}),
        ("a man in shorts", {"sex": 1, "bottom": "shorts"}),
        ("#ff0000 boots", {"shoes": "boots", "shoes_color": RED}), ("black woman", {"sex": 0.0, "skin_tone": 0.95}),
        ("black-haired woman", {"sex": 0.0, "hair_color": list(vocabulary.HAIR_COLORS["black"])}),
        ("dark skin", {"skin_tone": 0.85}), ("pants", {"bottom": "trousers"}),
        ("redhead", {"hair_color": [0.55, 0.23, 0.1]}),
        ("braids", {"hair": "braid"}), ("blazer", {"top": "suit jacket"}),
    ],
)  # fmt: skip
def test_things_and_what_describes_them(text: str, values: dict[str, Any]) -> None:
    assert understand(text, PEOPLE).values == values


def test_shades() -> None:
    assert heard("light blue shirt")["top_color"] == [round(c / 255, 4) for c in ImageColor.getrgb("lightblue")]
    plain, dark, pale = (heard(f"{shade} green skirt")["bottom_color"] for shade in ("", "deep", "pale"))
    assert sum(dark) < sum(plain) < sum(pale)
    assert sum(heard("dark grey shirt")["top_color"]) < sum(heard("grey shirt")["top_color"])  # unlike in CSS
    assert sum(heard("dark brown hair")["hair_color"]) < sum(heard("light brown hair")["hair_color"])


@pytest.mark.parametrize("name", sorted(ImageColor.colormap))
def test_every_css_colour(name: str) -> None:
    expected = words.color(name)
    assert heard(f"{name} hat")["accessory_color"] == pytest.approx(expected, abs=1e-4)
    if name != "brown":  # CSS's brown is a red
        assert expected == pytest.approx([c / 255 for c in ImageColor.getrgb(name)])


def test_what_is_not_available_is_reported_with_its_colour() -> None:
    said = understand("woman in a red dress with glasses and a green shirt", PEOPLE)
    assert said.ignored == ["red", "dress", "glasses"]
    assert said.values == {
        "sex": 0.0,
        "top": "shirt",
        "top_color": words.understand("green top", PEOPLE).values["top_color"],
    }
    with_dress = (*PEOPLE, choice("bottom", "skirt", "dress"))
    assert understand("red dress", with_dress).values == {"bottom": "dress", "bottom_color": RED}


def test_a_colour_needs_a_thing_to_be_on() -> None:
    """Who is told to have grey hair and has none gets hair; a bald person has no colour of it."""
    assert heard("grey hair", hair="none") == {"hair": "short", "hair_color": GREY_HAIR}
    assert heard("blonde", hair="bob") == {"hair_color": list(vocabulary.HAIR_ONLY["blonde"])}
    assert heard("grey hair, bald") == {"hair": "none"}


def test_colours_by_the_names_of_a_family() -> None:
    eyes = choice("eye_color", "bluegreen", "deepblue", "ice", "lightblue", "grey")
    for text, value in (("blue-green eyes", "bluegreen"), ("deep blue eyes", "deepblue"), ("ice eyes", "ice"),
                        ("light blue eyes", "lightblue"), ("gray-eyed", "grey")):  # fmt: skip
        assert understand(text, [eyes]).values == {"eye_color": value}
    blue = understand("deep blue shirt", (*PEOPLE, eyes)).values["top_color"]
    assert blue == [0, 0, pytest.approx(0.55)]
    assert understand("ice shirt", (*PEOPLE, eyes)).ignored == ["ice"]


def test_only_attributes_of_the_family_count() -> None:
    said = understand("tall old woman in a red shirt, plain, grey hair", capsule.INFO.attributes)
    assert said.values == {"height_m": pytest.approx(1.81), "top_color": RED, "pattern": "plain"}
    assert said.ignored == ["old", "woman", "grey", "hair"]
    assert understand("striped", capsule.INFO.attributes).values == {"pattern": "stripes"}
    assert understand("tall", ()).ignored == ["tall"]


def fits(attribute: Attribute, value: Any) -> bool:
    if attribute.kind == "number":
        return attribute.low <= value <= attribute.high
    return value in attribute.choices if attribute.kind == "choice" else all(0 <= c <= 1 for c in value)


SOME = st.sampled_from(
    [*vocabulary.MOVES, *vocabulary.COLORS, *vocabulary.DEGREES, *vocabulary.NEGATIONS, *vocabulary.HARD,
     *vocabulary.SOFT, *vocabulary.SHADES, *vocabulary.HAIR_ONLY,
     *(word for words in vocabulary.PARTS.values() for word in words), "short",
     "long", "more", "less", "6'", "1.80", "m", "cm", "99", "less", "s", "est", "er", "thinner", "ies"]
)  # fmt: skip


@given(st.lists(SOME | st.text(max_size=6), max_size=12).map(" ".join) | st.text(max_size=200))
@example("\ud800 İİ ﬃ ½ ² ٣ ٣ m 1.٣ m ٣ ft")
@example("'''\"\"\" 6'''' ,,, :: -- no not without less more more more")
def test_no_text_is_too_odd_and_all_values_fit(text: str) -> None:
    for current in ({}, {"height_m": 1.7, "sex": 0.2, "weight": 0.1}):
        said = understand(text, PEOPLE, current)
        assert understand(text, PEOPLE, current) == said
        known = {a.name: a for a in PEOPLE}
        assert all(fits(known[name], value) for name, value in said.values.items())
        assert said.ignored == understand(text, PEOPLE).ignored  # depends on the text alone
        assert understand(text, ()).values == {}


def test_long_texts_are_no_trouble() -> None:
    said = understand("extremely " * 2000 + "tall " + "less" * 5000 + " man " + "very " * 5000 + "androgynous", PEOPLE)
    assert said.values == {"height_m": 2.03, "sex": 0.5}
    assert said.ignored == ["less" * 5000]


def test_words_need_no_torch() -> None:
    code = "import sys, backend.words; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
