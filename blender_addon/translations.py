# SPDX-License-Identifier: GPL-3.0-or-later
"""What the add-on says in other languages. One table per locale: English as in the code, then the translation.

Sentences with a number or a name in them are translated with the braces in place, and filled in afterwards.
"""

from __future__ import annotations

from typing import Final

import bpy

_CONTEXTS: Final = ("*", "Operator")  # labels and properties; titles of operators

GERMAN: Final = {
    "Generator is off": "Generator ist aus",
    "Generator stopped": "Generator hat angehalten",
    "Generator not available": "Generator nicht verfügbar",
    "Generator not installed": "Generator nicht installiert",
    "Generator keeps failing": "Generator versagt immer wieder",
    "Loading the model": "Lädt das Modell",
    "Making 1 person": "Macht 1 Person",
    "Making {n} people": "Macht {n} Personen",
    "Ready": "Bereit",
    "Starting": "Startet",
    "Stopping": "Hält an",
    "Start": "Starten",
    "Set Up": "Einrichten",
    "Restart Generator": "Generator neu starten",
    "Start Generator": "Generator starten",
    "Stop Generator": "Generator anhalten",
    "Generate": "Erzeugen",
    "Generate {n} People": "{n} Personen erzeugen",
    "New Human": "Neue Person",
    "Seed": "Startwert",
    "New Seed": "Neuer Startwert",
    "New Seed Each Time": "Jedes Mal ein neuer Startwert",
    "Count": "Anzahl",
    "Variation": "Vielfalt",
    "Words": "Worte",
    "Family": "Familie",
    "Mark as Asset": "Als Asset markieren",
    "Attributes": "Eigenschaften",
    "Start the generator to see them": "Generator starten, um sie zu sehen",
    "Start the generator to edit": "Zum Bearbeiten den Generator starten",
    "Output": "Ausgabe",
    "Pose": "Haltung",
    "Rig": "Skelett",
    "Faces": "Flächen",
    "Levels of Detail": "Detailstufen",
    "Detail": "Feinheit",
    "Textures": "Texturen",
    "Maps": "Karten",
    "Colour Only": "Nur Farbe",
    "Separate Garments": "Kleidung getrennt",
    "Shape Keys": "Formschlüssel",
    "Apply to Active Human": "Auf aktive Person anwenden",
    "Active Human": "Aktive Person",
    "Parts": "Teile",
    "Re-roll": "Neu würfeln",
    "Re-roll All": "Alles neu würfeln",
    "New Looks": "Neues Aussehen",
    "Lock": "Sperren",
    "Take Off": "Ausziehen",
    "Take from the Other": "Von der anderen nehmen",
    "Variants": "Varianten",
    "Strength": "Stärke",
    "Show Variants": "Varianten zeigen",
    "Choose": "Wählen",
    "Waiting": "Wartet",
    "Keep This One": "Diese behalten",
    "Vary": "Abwandeln",
    "Mix": "Mischen",
    "Share": "Anteil",
    "Select another human as well": "Noch eine Person auswählen",
    "The other one is of another family": "Die andere gehört zu einer anderen Familie",
    "Details": "Einzelheiten",
    "Height": "Größe",
    "Weights": "Gewichte",
    "Generator": "Generator",
    "None": "Keine",
    "History": "Verlauf",
    "Restore Version": "Fassung wiederherstellen",
    "Favourites": "Favoriten",
    "Add to Favourites": "Zu den Favoriten",
    "Use Favourite": "Favorit verwenden",
    "Remove Favourite": "Favorit entfernen",
    "Jobs": "Aufträge",
    "waiting": "wartet",
    "cancelling": "wird abgebrochen",
    "{time} left": "noch {time}",
    "and {n} more": "und {n} weitere",
    "Cancel": "Abbrechen",
    "Cancel All": "Alle abbrechen",
    "Clear Finished": "Fertige entfernen",
    "Make Again": "Noch einmal erzeugen",
    "Use Settings": "Einstellungen übernehmen",
    "Copy Recipe": "Rezept kopieren",
    "Copy as Python": "Als Python kopieren",
    "Last Action": "Letzte Handlung",
    "All Actions": "Alle Handlungen",
    "This Human": "Diese Person",
    "This Human by Client": "Diese Person über den Client",
    "Change by Words": "Mit Worten ändern",
    "Set Attributes": "Eigenschaften setzen",
    "Select a generated human": "Eine erzeugte Person auswählen",
    "Switch to Object Mode first": "Zuerst in den Objektmodus wechseln",
    "Hair": "Haar",
    "Top": "Oberteil",
    "Bottom": "Unterteil",
    "Shoes": "Schuhe",
    "Accessory": "Zubehör",
    "Body": "Körper",
    "Age (years)": "Alter (Jahre)",
    "Height (m)": "Größe (m)",
    "Female to male": "Weiblich bis männlich",
    "Weight": "Gewicht",
    "Muscle": "Muskeln",
    "Skin tone": "Hautton",
    "Hair colour": "Haarfarbe",
    "Eye colour": "Augenfarbe",
}

TABLES: Final = {"de_DE": GERMAN}


def register() -> None:
    tables = {
        locale: {(context, text): said for text, said in table.items() for context in _CONTEXTS}
        for locale, table in TABLES.items()
    }
    bpy.app.translations.register(__package__, tables)


def unregister() -> None:
    bpy.app.translations.unregister(__package__)
