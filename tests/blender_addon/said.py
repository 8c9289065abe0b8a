# SPDX-License-Identifier: GPL-3.0-or-later
"""What the add-on says to people, read out of its source: labels, tooltips, buttons, reasons, reports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ADDON = Path(__file__).resolve().parents[2] / "blender_addon"
SHOWN = ("text", "title", "confirm_text", "message", "placeholder", "heading", "bl_label")
SPEAKING = ("iface", "told", "needs", "poll_message_set", "report")  # functions whose plain arguments are shown
SILENT = {  # not translated, and why
    **dict.fromkeys(("Populace", "PyTorch", "NVIDIA GPU", "macOS", "PyPI", "download.pytorch.org"), "a name"),
    **dict.fromkeys(("older, red shirt, no hat", "old woman, red shirt", "weight, muscle"),
                    "an example of what the generator understands, which is English"),
}  # fmt: skip
_STORING = ("PopulaceHuman", "PopulaceVersion", "PopulaceMap")  # stored on people, seen by scripts and in no panel

_NO_SPEECH = ("translations.py", "german.py", "command_line.py", "bench.py")  # the tables; what speaks to terminals


def sources() -> Iterator[tuple[str, ast.Module]]:
    """The add-on's modules that run in Blender and speak to people; the command line's are for terminals."""
    for path in sorted(ADDON.rglob("*.py")):
        name = path.relative_to(ADDON).as_posix()
        if "installer/" not in name and path.name not in (
            "translations.py",
            "german.py",
            "command_line.py",
            "bench.py",
        ):
            yield name, ast.parse(path.read_text("utf-8"))


def sentences() -> dict[str, str]:
    """Every plain sentence that is shown -> where."""
    found: dict[str, str] = {}
    for name, tree in sources():
        for text in _in(tree):
            if any(letter.isalpha() for letter in text):
                found.setdefault(text, name)
    return found


def filled_in() -> list[str]:
    """f-strings in what is shown that have words of their own: these stay English in every language."""
    found = []
    for name, tree in sources():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            for keyword in call.keywords:
                if keyword.arg not in SHOWN:
                    continue
                formats = [node.format_spec for node in ast.walk(keyword.value) if isinstance(node, ast.FormattedValue)]
                for part in (node for node in ast.walk(keyword.value) if isinstance(node, ast.JoinedStr)):
                    if any(part is spec for spec in formats):
                        continue
                    words = [str(v.value) for v in part.values if isinstance(v, ast.Constant)]
                    if any(len(word.strip(" (),.%")) > 1 and any(c.isalpha() for c in word) for word in words):
                        found.append(f"{name}:{part.lineno} {ast.unparse(part)}")
    return found


def _in(tree: ast.Module) -> Iterator[str]:
    for top in tree.body:
        if isinstance(top, ast.ClassDef) and top.name in _STORING:
            continue
        for node in ast.walk(top):
            if isinstance(node, ast.ClassDef) and node.name.startswith(("POPULACE_", "_Arrival")):
                yield from _of_class(node)
            elif isinstance(node, ast.Call):
                yield from _of_call(node)


def _of_class(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") in ("bl_label", "bl_description"):
            yield from _plain(line.value)
    if "_PT_" not in node.name and (said := ast.get_docstring(node)):
        yield said


def _of_call(node: ast.Call) -> Iterator[str]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    for keyword in node.keywords:
        if keyword.arg in SHOWN or (keyword.arg in ("name", "description") and name.endswith("Property")):
            yield from _plain(keyword.value)
        if keyword.arg == "items" and isinstance(keyword.value, ast.List):
            for item in keyword.value.elts:
                for part in item.elts[1:3] if isinstance(item, ast.Tuple) else ():
                    yield from _plain(part)
    if name in SPEAKING:
        for argument in node.args:
            yield from _plain(argument)


def _plain(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _plain(node.body)
        yield from _plain(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _plain(value)
