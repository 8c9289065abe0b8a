# SPDX-License-Identifier: GPL-3.0-or-later
"""What the add-on says in other languages. One table per locale: English as in the code, then the translation.

Sentences with a number or a name in them are translated with the braces in place, and filled in afterwards.
"""

from __future__ import annotations

from typing import Final

import bpy

from .german import GERMAN

_CONTEXTS: Final = ("*", "Operator")  # labels and properties; titles of operators

TABLES: Final = {"de_DE": GERMAN}


def told(sentence: str, **values: object) -> str:
    """A sentence in the user's language, then filled in. For what Blender does not translate by itself; give the
    result to the layout with translate=False."""
    text = bpy.app.translations.pgettext_iface(sentence)
    return text.format(**values) if values else text


def register() -> None:
    tables = {
        locale: {(context, text): said for text, said in table.items() for context in _CONTEXTS}
        for locale, table in TABLES.items()
    }
    bpy.app.translations.register(__package__, tables)


def unregister() -> None:
    bpy.app.translations.unregister(__package__)
