# SPDX-License-Identifier: GPL-3.0-or-later
"""`blender --command populace --seed 1 --count 3 --out people.blend`: people without a window."""

from __future__ import annotations

import argparse
from typing import Any

import bpy

_command: Any = None


def main(argv: list[str]) -> int:
    """Exit code 0: all made and saved, 1: the reason is on stderr, 2: wrong arguments."""
    parser = argparse.ArgumentParser(prog="blender --command populace", description="Make people and save them.")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first person (default 1)")
    parser.add_argument("--count", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--family", default="people", help="generator family (default people)")
    parser.add_argument("--texture-size", type=int, default=1024, choices=(512, 1024, 2048, 4096))
    parser.add_argument("--faces", type=int, default=30000, help="triangles per person (default 30000)")
    parser.add_argument("--out", required=True, help="the .blend file to write")
    args = parser.parse_args(argv)
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    try:
        bpy.ops.populace.generate(seed=args.seed, count=args.count, family=args.family, faces=args.faces,
                                  texture_size=str(args.texture_size), wait=True)  # fmt: skip
        bpy.ops.wm.save_as_mainfile(filepath=args.out)
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")
    return 0


def register() -> None:
    global _command
    _command = bpy.utils.register_cli_command("populace", main)


def unregister() -> None:
    bpy.utils.unregister_cli_command(_command)
