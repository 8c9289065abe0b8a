# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever the add-on says, it says in every language of its tables; and the tables say nothing that nobody says."""

from __future__ import annotations

import string
from types import SimpleNamespace
from typing import Any

import pytest

from blender_addon.german import GERMAN
from tests.blender_addon import said

TABLES = {"de_DE": GERMAN}


def fields(text: str) -> list[str]:
    """The names in braces; JSON examples have braces of their own."""
    try:
        return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name and name.isidentifier())
    except ValueError:
        return []


@pytest.mark.parametrize("locale", TABLES)
def test_every_label_tooltip_and_sentence_is_translated(locale: str) -> None:
    missing = {text: where for text, where in said.sentences().items()
               if text not in TABLES[locale] and text not in said.SILENT}  # fmt: skip
    assert not missing, "put them into the table, or into SILENT with a reason"
    assert len(said.sentences()) > 300, "the reader of the source has gone blind"


def test_nothing_shown_is_put_together_from_english_words() -> None:
    """Such sentences are translated with their braces and then filled in."""
    assert said.filled_in() == []


@pytest.mark.parametrize("locale", TABLES)
def test_the_tables_hold_nothing_else(addon: SimpleNamespace, locale: str) -> None:
    """A sentence that was changed in the code and not in the tables would stay English without a word."""
    from backend import families

    sources = "".join(path.read_text("utf-8") for path in said.ADDON.rglob("*.py") if path.name != "german.py")
    titles = {addon.attributes.title(a) for info in families.infos() for a in info.attributes}
    parts = {part.capitalize() for info in families.infos() for part in info.parts}
    known = {*said.sentences(), *titles, *parts}
    lost = [text for text in TABLES[locale] if text not in known and f'"{text}"' not in sources
            and f"'{text}'" not in sources]  # fmt: skip
    assert not lost
    assert not [text for text, other in TABLES[locale].items() if fields(text) != fields(other) or not other.strip()]
    silent = [text for text in said.SILENT if text not in said.sentences()]
    assert not silent


def test_blender_speaks_german(addon: SimpleNamespace) -> None:
    """Labels, tooltips and filled-in sentences through Blender's own translation."""
    bpy: Any = addon.bpy
    view = bpy.context.preferences.view
    before = view.language
    if "de_DE" not in {item.identifier for item in view.bl_rna.properties["language"].enum_items_static_ui}:
        pytest.skip("this Blender has no languages")
    try:
        view.language = "de_DE"
        view.use_translate_interface = view.use_translate_tooltips = True
        translate = bpy.app.translations
        assert translate.pgettext_iface("Make Crowd", "Operator") == "Menge erzeugen"
        assert translate.pgettext_tip("Which way people look") == "Wohin die Personen sehen"
        assert addon.translations.told("Make Crowd of {n}", n=20) == "Menge aus 20 erzeugen"
    finally:
        view.language = before
    assert addon.translations.told("Make Crowd of {n}", n=20) == "Make Crowd of 20"
