# SPDX-License-Identifier: GPL-3.0-or-later
"""What the platform and this project ask of an add-on and what its source or Blender's registry can prove; the list of
all points, with the tests of the others, is tests/README.md."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.said import ADDON

FOREIGN = {"bpy", "bpy_extras", "numpy", "mathutils"}  # all that is not the standard library's
SMALL = {"a", "and", "as", "at", "by", "for", "from", "in", "of", "on", "the", "to", "with"}  # in titles
INSTALLER = ("setup/__main__.py", "setup/installer")  # a program of its own, with no Blender in it
IN_BLENDER = sorted(path for path in ADDON.rglob("*.py")
                    if not path.relative_to(ADDON).as_posix().startswith(INSTALLER))  # fmt: skip


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Level and module of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", IN_BLENDER, ids=lambda path: path.relative_to(ADDON).as_posix())
def test_a_module_keeps_to_the_platforms_rules(path: Any) -> None:
    """No package but numpy, relative imports, no threads, no code from text, no hands on Blender's modules."""
    text = path.read_text("utf-8")
    assert text.startswith("# SPDX-License-Identifier: GPL-3.0-or-later\n")
    assert len(text.splitlines()) <= 450 or path.name == "german.py", "one subject a module"
    tree = ast.parse(text)
    for level, name in imports(tree):
        root = name.partition(".")[0]
        assert level or root in FOREIGN or root in sys.stdlib_module_names, name
        assert level or root not in ("threading", "concurrent", "multiprocessing", "_thread"), name
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec", "compile", "__import__"), node.lineno
            assert node.id != "print" or path.name == "command_line.py", "log, do not print"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            said = f"{node.value.id}.{node.attr}"
            assert said not in ("sys.path", "sys.modules", "os.system", "os.environ_b"), node.lineno
        if isinstance(node, ast.ExceptHandler):
            swallows = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert node.type is not None, "a bare except"
            assert not swallows or getattr(node.type, "id", "") != "Exception", node.lineno


def classes() -> list[type]:
    import bpy

    names = [name for name in dir(bpy.types) if name.startswith("POPULACE_")]
    return [getattr(bpy.types, name) for name in names]


def test_classes_have_the_names_of_what_they_are(addon: SimpleNamespace) -> None:
    import bpy

    kinds = {bpy.types.Operator: "OT", bpy.types.Panel: "PT", bpy.types.FileHandler: "FH", bpy.types.Menu: "MT",
             bpy.types.UIList: "UL"}  # fmt: skip
    assert len(classes()) > 60
    for cls in classes():
        kind = next(kinds[base] for base in kinds if issubclass(cls, base))
        expected = f"POPULACE_{kind}_{cls.bl_idname.partition('.')[2]}" if kind == "OT" else cls.bl_idname
        assert cls.__name__ == expected
        assert cls.__name__.startswith(f"POPULACE_{kind}_")


def test_operators_explain_themselves_and_refuse_with_a_reason(addon: SimpleNamespace) -> None:
    """Titles in title case, tooltips without a full stop; who refuses says why."""
    import bpy

    refused = 0
    for cls in classes():
        if not issubclass(cls, bpy.types.Operator):
            continue
        rna = getattr(bpy.ops.populace, cls.bl_idname.partition(".")[2]).get_rna_type()
        assert rna.description, cls
        assert not rna.description.endswith("."), cls
        assert all(word[0].isupper() or word in SMALL for word in cls.bl_label.split()), cls
        assert getattr(cls, "bl_options", set()) <= {"REGISTER", "UNDO", "UNDO_GROUPED", "INTERNAL", "PRESET"}
        for prop in rna.properties:
            if prop.identifier != "rna_type":
                assert not prop.description.endswith("."), (cls, prop.identifier)
        call = getattr(bpy.ops.populace, cls.bl_idname.partition(".")[2])
        if not call.poll():  # in an empty scene most of them
            refused += 1
            with pytest.raises(RuntimeError) as caught:
                call()
            assert "context is incorrect" not in str(caught.value), f"{cls} is grey without a word"
    assert refused > 20


def test_every_handler_survives_loading_a_file(addon: SimpleNamespace) -> None:
    import bpy

    found = []
    for name in dir(bpy.app.handlers):
        for handler in getattr(bpy.app.handlers, name) if isinstance(getattr(bpy.app.handlers, name), list) else ():
            if handler.__module__.startswith(PACKAGE):
                found.append(name)
                assert hasattr(handler, "_bpy_persistent"), handler
    assert {"load_post", "save_pre", "undo_pre", "redo_pre"} <= set(found)


def test_no_shortcut_is_taken(addon: SimpleNamespace) -> None:
    import bpy

    manager = bpy.context.window_manager
    for config in (manager.keyconfigs.addon, manager.keyconfigs.default):
        for keymap in config.keymaps if config is not None else ():
            assert not [item.idname for item in keymap.keymap_items if item.idname.startswith("populace.")]


def test_the_manifest_asks_for_no_more_than_it_says() -> None:
    manifest = tomllib.loads((ADDON / "blender_manifest.toml").read_text("utf-8"))
    assert manifest["permissions"].keys() == {"network", "files"}
    assert all(len(reason) <= 64 and reason[-1] not in ".!" for reason in manifest["permissions"].values())
    assert manifest["license"] == ["SPDX:GPL-3.0-or-later"]
    assert "wheels" not in manifest


def test_preferences_and_folders_go_by_the_package(addon: SimpleNamespace) -> None:
    """Inside an extension the package is bl_ext.REPOSITORY.populace."""
    assert addon.preferences.PopulacePreferences.bl_idname == PACKAGE
    history = importlib.import_module(f"{PACKAGE}.history")
    folder = history._folder()
    assert folder.is_dir()
    assert not {ADDON, ADDON.resolve()} & {*folder.parents, *folder.resolve().parents}, "replaced on every update"


def test_the_list_of_conventions_names_tests_that_there_are() -> None:
    """tests/README.md says for every point which test keeps it: by a piece of its name."""
    folder = ADDON.parent / "tests"
    names = [node.name for path in folder.rglob("test_*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))
             if isinstance(node, ast.FunctionDef)]  # fmt: skip
    page = (folder / "README.md").read_text("utf-8").partition("# Conventions")[2]
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|") and line.count("|") == 4]
    said = [name.removesuffix("_...") for row in rows for name in re.findall(r"`([a-z_0-9.]+)`", row[-1])]
    assert len(said) > 50
    assert not [name for name in said if not any(name in known for known in names)]
    files = [f"{name}.py" for row in rows for name in re.findall(r"\b((?:backend/)?test_\w+)", row[-1])]
    assert not [file for file in files if not ((folder / file).exists() or (folder / "blender_addon" / file).exists())]
    modules = [name for row in rows for name in re.findall(r"\b[\w/]+\.py\b", row[1])]
    assert not [name for name in modules if not ((ADDON / name).exists() or (ADDON.parent / name).exists())]
