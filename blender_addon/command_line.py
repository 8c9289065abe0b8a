# SPDX-License-Identifier: GPL-3.0-or-later
"""`blender --command populace ...`: people without a window, and the generator's own commands from Blender's.

`generate` has the options of the operator `populace.generate`, whatever they are; `batch`, `plan`, `farm`, `weights`
and `doctor` are the generator's, run in its own Python; `operators` prints the reference of all operators; `bench`
measures how long Blender waits for us.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import bpy

from . import bench, preferences, process
from .messages import BackendError, Request

FORWARDED: Final = {
    "batch": "make the people of a plan, in parallel, resumable, in shards",
    "plan": "write a plan for a batch", "farm": "print the job file of a render farm",
    "weights": "list and check model weights", "doctor": "what is installed, and what will run where",
}  # fmt: skip
EPILOG: Final = """exit codes: 0 all done, 1 failed, with the reason on stderr, 2 wrong arguments; those of batch, plan,
farm, weights and doctor are the generator's, see: blender --command populace batch --help

examples:
  blender --command populace generate --seed 1 --count 3 --out people.blend
  blender --command populace generate --seed 7 --pose walking --out person.fbx
  blender --command populace batch plan.jsonl --out crowd --preset unreal --resume
  blender --command populace operators
  blender --command populace bench --people 10 --cycles 100"""
_command: Any = None


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    if argv and argv[0] in FORWARDED:
        return _forward(argv)
    parser = argparse.ArgumentParser(prog="blender --command populace", epilog=EPILOG,
                                     description="Textured, clothed, rigged people.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="make people and save them")
    generate.add_argument("--out", required=True, type=Path, help=f"file to write: {', '.join(_WRITERS)}")
    generate.add_argument("--into", type=Path, metavar="FILE", help="add them to this .blend instead of an empty scene")
    for prop in _arguments(bpy.ops.populace.generate):
        _add_option(generate, prop)
    for name, text in FORWARDED.items():
        commands.add_parser(name, help=f"{text} (the generator's command)")
    commands.add_parser("operators", help="print a reference of bpy.ops.populace, as Markdown")
    timing = commands.add_parser("bench", help="measure ticks, insertions, undo and redo; prints JSON")
    timing.add_argument("--people", type=int, default=10, help="how many to make (default: 10)")
    timing.add_argument("--cycles", type=int, default=100,
                        help="how often to insert, undo and redo one of them (default: 100)")  # fmt: skip
    for name, default in _BENCH.items():
        timing.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default,
                            help=f"of each person (default: {default})")  # fmt: skip
    args = parser.parse_args(argv)
    if args.command == "bench":
        return _bench(args)
    if args.command == "operators":
        print(reference())
        return 0
    if args.out.suffix not in _WRITERS:
        parser.error(f"--out must end in {', '.join(_WRITERS)}")
    try:
        _generate(args)
    except RuntimeError as error:  # an operator's report
        print(str(error).strip(), file=sys.stderr)
        return 1
    return 0


def _generate(args: argparse.Namespace) -> None:
    if args.into is not None:
        bpy.ops.wm.open_mainfile(filepath=str(args.into.absolute()))
    else:
        bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    chosen = {prop.identifier: getattr(args, prop.identifier) for prop in _arguments(bpy.ops.populace.generate)}
    bpy.ops.populace.generate(wait=True, **{name: value for name, value in chosen.items() if value is not None})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[args.out.suffix](str(args.out.absolute()))


_BENCH: Final = {"family": "people", "seed": 1, "faces": 30000, "grid_resolution": 256, "texture_size": 1024}


def _bench(args: argparse.Namespace) -> int:
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    try:
        request = Request(**{name: getattr(args, name) for name in _BENCH})
        print(json.dumps(bench.run(request, max(args.people, 1), max(args.cycles, 0)), indent=1))
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


_WRITERS: Final[dict[str, Callable[[str], Any]]] = {
    ".blend": lambda path: bpy.ops.wm.save_as_mainfile(filepath=path),
    ".glb": lambda path: bpy.ops.export_scene.gltf(filepath=path, use_visible=True),
    ".fbx": lambda path: bpy.ops.export_scene.fbx(filepath=path, use_visible=True, add_leaf_bones=False,
                                                  path_mode="COPY", embed_textures=True),
    ".usdc": lambda path: bpy.ops.wm.usd_export(filepath=path, export_textures_mode="NEW"),
}  # fmt: skip


def _add_option(parser: argparse.ArgumentParser, prop: Any) -> None:
    flag, text = f"--{prop.identifier.replace('_', '-')}", prop.description.replace("%", "%%") or prop.name
    if prop.type == "BOOLEAN":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif prop.type == "ENUM":
        parser.add_argument(flag, choices=[item.identifier for item in prop.enum_items], help=text)
    else:
        kind = {"INT": int, "FLOAT": float}.get(prop.type, str)
        parser.add_argument(flag, type=kind, help=f"{text} (default: {_default(prop)})")


def _forward(argv: list[str]) -> int:
    """Run a command of the generator in its own Python, from the user's folder."""
    command = process.find_command(preferences.python())
    if command is None:
        print(f"The generator was not found on this computer. {process.INSTALL_HINT}", file=sys.stderr)
        return 1
    environment, call = process.clean_environment(), list(command.argv)
    if (Path(command.cwd) / "backend").is_dir():
        environment["PYTHONPATH"] = command.cwd
    if call[1:2] == ["-m"]:
        call.insert(1, "-P")  # a folder called backend, here, is not ours
    return subprocess.run([*call, *argv], env=environment, check=False).returncode


# -------------------------------------------------------------------------------------------------------- the reference


def reference() -> str:
    """All operators that scripts are meant to call, with their arguments, as Markdown."""
    lines = ["# bpy.ops.populace", "", "In a window an operator returns at once and people arrive later, unless "
             "wait=True; with `blender -b` it returns when they stand in the scene. A failure raises RuntimeError."]
    for name in sorted(dir(bpy.ops.populace)):
        kind = getattr(bpy.types, f"POPULACE_OT_{name}", None)
        if kind is None or "INTERNAL" in getattr(kind, "bl_options", ()):
            continue
        call = getattr(bpy.ops.populace, name)
        rna = call.get_rna_type()
        lines += ["", f"## populace.{name}", "", f"{rna.name}: {rna.description}."]
        rows = [f"| {prop.identifier} | {_kind(prop)} | {_default(prop)} | {prop.description} |"
                for prop in _arguments(call, hidden=True)]  # fmt: skip
        lines += ["", "| argument | type | default | |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join(lines)


def _arguments(call: Any, hidden: bool = False) -> Iterator[Any]:
    """RNA properties of an operator; `wait` is for windows."""
    for prop in call.get_rna_type().properties:
        if prop.identifier != "rna_type" and (hidden or prop.identifier != "wait"):
            yield prop


def _kind(prop: Any) -> str:
    if prop.type == "ENUM":
        return ", ".join(item.identifier for item in prop.enum_items) or "name"
    size = f"[{prop.array_length}]" if getattr(prop, "is_array", False) else ""
    limits = f" {prop.hard_min:g}..{prop.hard_max:g}" if prop.type in ("INT", "FLOAT") and prop.hard_max < 1e9 else ""
    return prop.type.lower() + size + limits


def _default(prop: Any) -> str:
    if getattr(prop, "is_array", False):
        return str(tuple(prop.default_array))
    if prop.type == "ENUM" and not prop.enum_items:  # depends on the scene: Blender warns when it is asked
        return ""
    default = getattr(prop, "default", "")
    return f"{default:g}" if isinstance(default, float) else repr(default)


def register() -> None:
    global _command
    _command = bpy.utils.register_cli_command("populace", main)


def unregister() -> None:
    bpy.utils.unregister_cli_command(_command)
