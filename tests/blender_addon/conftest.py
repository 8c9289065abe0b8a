# SPDX-License-Identifier: GPL-3.0-or-later
"""A headless Blender with the add-on enabled from its source folder, and packets to feed it.

Everything that needs Blender asks for the fixture `bpy` (or `addon`) and is skipped where there is none.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

HAS_BPY = importlib.util.find_spec("bpy") is not None
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "bl_ext.dev.populace"

if HAS_BPY:
    # Must be set before anybody imports bpy: else it reads and writes the user's own Blender settings.
    os.environ.setdefault("BLENDER_USER_RESOURCES", tempfile.mkdtemp(prefix="populace-test-blender-"))


@pytest.fixture(scope="session")
def enabled() -> Any:
    """bpy with the add-on enabled as an extension, as users have it."""
    if not HAS_BPY:
        pytest.skip("needs the bpy module")
    import bpy

    addon_utils = importlib.import_module("addon_utils")  # on the path only once bpy is there
    parent = Path(tempfile.mkdtemp(prefix="populace-test-repo-"))
    (parent / "populace").symlink_to(REPOSITORY / "blender_addon", target_is_directory=True)
    bpy.context.preferences.extensions.repos.new(name="Dev", module="dev", custom_directory=str(parent))
    assert addon_utils.enable(PACKAGE, default_set=True)
    return bpy


@pytest.fixture
def bpy(enabled: Any) -> Iterator[Any]:
    """An empty scene with undo switched on; afterwards no connection of the add-on is left."""
    enabled.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    enabled.ops.ed.undo_push(message="start")
    yield enabled
    tasks = importlib.import_module(f"{PACKAGE}.tasks")
    tasks.unregister()
    tasks.register()


@pytest.fixture
def addon(bpy: Any) -> SimpleNamespace:
    """The add-on's modules as Blender loaded them: `addon.scene`, `addon.tasks`, ..."""
    names = ("api", "attributes", "client", "compat", "edit_operators", "editing", "history", "human_panel",
             "messages", "operators",
             "packet", "panel", "posing", "preferences", "process", "properties", "recipes", "replacing", "scene",
             "session", "snippets", "tasks", "thumbnails", "translations")  # fmt: skip
    modules: dict[str, ModuleType] = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in names}
    return SimpleNamespace(bpy=bpy, **modules)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private home for the backend: its runtime file, data and logs."""
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path))
    return tmp_path
