# SPDX-License-Identifier: GPL-3.0-or-later
"""Populace: people from a seed, standing in the scene.

The add-on talks to the generator, a program of its own with its own Python, over loopback. Modules that do not touch
bpy (`messages`, `packet`, `api`, `process`, `session`, `client`) can be used without Blender; those that do are only
imported when Blender calls `register`.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType


def _modules() -> tuple[ModuleType, ...]:
    """In the order of registration; each has a register() and an unregister()."""
    from . import (
        assets,
        attributes,
        chores,
        command_line,
        edit_operators,
        editing,
        history,
        human_panel,
        operators,
        panel,
        placing,
        preferences,
        properties,
        replacing,
        tasks,
        thumbnails,
        translations,
        weights,
    )
    from .crowd import form as crowd_form
    from .crowd import operators as crowd_operators
    from .crowd import panel as crowd_panel
    from .crowd import places as crowd_places
    from .photo import operators as photo_operators

    setup = [importlib.import_module(f".setup.{name}", __package__) for name in ("operators", "panel")
             if find_spec(".setup", __package__)]  # not in the slim zip # fmt: skip
    artist = replacing, thumbnails, editing, attributes, history, edit_operators, placing, photo_operators
    crowds = crowd_form, crowd_operators, crowd_places
    return (preferences, properties, operators, *artist, *crowds, assets, chores, *setup, weights, panel, human_panel,
            crowd_panel, tasks, command_line, translations)  # fmt: skip


def register() -> None:
    for module in _modules():
        module.register()


def unregister() -> None:
    for module in reversed(_modules()):
        module.unregister()
