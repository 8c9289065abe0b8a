# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights in the preferences, through the real command line: list, import, use, remove; licence and online access."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backend.tensors import dump_tensors
from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.recorder import Layout

pytestmark = pytest.mark.skipif(os.name == "nt", reason="started as on POSIX")


@pytest.fixture
def weights(addon: SimpleNamespace, home: Path) -> Iterator[Any]:
    addon.weights, addon.chores = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("weights", "chores"))
    addon.bpy.context.preferences.addons[PACKAGE].preferences.python = sys.executable
    yield addon
    addon.bpy.context.preferences.addons[PACKAGE].preferences.python = ""
    addon.weights._rows.clear()
    addon.weights._remark = ""
    addon.chores.unregister()
    addon.chores.register()


def draw(addon: Any) -> Layout:
    layout = Layout(addon.bpy)
    addon.weights.draw_weights(layout, addon.bpy.context)
    return layout


def test_import_use_and_remove(weights: Any, tmp_path: Path) -> None:
    ops = weights.bpy.ops.populace
    source = tmp_path / "My Own-2.safetensors"
    source.write_bytes(b"".join(dump_tensors({"a": np.zeros(3, np.float32)}, {"title": "Ours"})))
    assert ops.import_weights(filepath=str(source)) == {"FINISHED"}
    weights.chores.wait()  # the list that follows
    assert weights.weights.row("my_own_2")["title"] == "Ours"
    assert weights.weights.row("people")["source"] == "embedded"
    shown = draw(weights)
    assert "my_own_2 is here" in shown.texts
    assert any(text.startswith("Ours (") for text in shown.texts)
    assert shown.buttons.count("populace.remove_weights") == 1  # embedded ones stay
    ops.use_weights(name="my_own_2")
    weights.chores.wait()
    assert weights.weights.row("my_own_2")["used_for"] == ["people"]
    ops.remove_weights(name="my_own_2")
    weights.chores.wait()
    assert weights.weights.row("my_own_2") == {}
    with pytest.raises(RuntimeError, match="ships no weights called 'my_own_2'"):
        ops.remove_weights(name="my_own_2")
    assert "populace.dismiss_chore" in draw(weights).buttons


def test_downloads_want_online_access_and_consent(weights: Any) -> None:
    system, fetch = weights.bpy.context.preferences.system, weights.bpy.ops.populace.fetch_weights
    assert not fetch.poll()
    with pytest.raises(RuntimeError, match="Online access is off"):
        fetch(name="x", agree=True)
    system.use_online_access = True
    try:
        with pytest.raises(RuntimeError, match="agree=True"):
            fetch(name="x")
    finally:
        system.use_online_access = False
    assert weights.chores.current() is None


def test_the_dialog_shows_the_licence(weights: Any) -> None:
    about = {"name": "tiny", "title": "Tiny", "size": 5_000_000, "source": "someone/model", "licence_url": "",
             "licence_text": "Do no harm.\n" * 3}  # fmt: skip
    weights.weights._rows[:] = [about]
    layout = Layout(weights.bpy)
    operator = SimpleNamespace(layout=layout, name="tiny")
    weights.weights.POPULACE_OT_fetch_weights.draw(operator, weights.bpy.context)
    assert layout.texts[0] == "Tiny, 5 MB from someone/model"
    assert layout.texts.count("Do no harm.") == 3
    assert "populace.fetch_weights" in draw(weights).buttons
