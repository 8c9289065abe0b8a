# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace renders`: sampled people, or meshes of one's own, as a folder that GET3D or Get3DHuman learns from."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from backend.options import positive, seed
from backend.protocol import PopulaceError

PURPOSES = ("get3d", "get3dhuman")


def add_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--kit", type=Path, help="people sampled from this MakeHuman or MPFB data folder")
    source.add_argument("--meshes", type=Path, metavar="DIR",
                        help="meshes of your own (GLB, glTF, OBJ, FBX, PLY, STL), rendered by Blender")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--for", dest="purpose", choices=PURPOSES, default="get3d", help="default: get3d")
    parser.add_argument("--count", type=positive, default=500, help="sampled people (default: 500)")
    parser.add_argument("--views", type=positive, default=24, help="pictures of each, for get3d (default: 24)")
    parser.add_argument("--size", type=positive, default=512, help="pixels along a side (default: 512)")
    parser.add_argument("--seed", type=seed, default=0, help="of the cameras, and which people (default: 0)")
    parser.add_argument("--height", type=float, metavar="M", help="make every mesh so high, for get3dhuman")
    parser.add_argument("--lit", action="store_true", help="shaded by a studio's light instead of flat colours")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")


def run(args: argparse.Namespace) -> None:
    """Raises PopulaceError."""
    if not 16 <= args.size <= 4096 or args.size & (args.size - 1):
        raise PopulaceError("invalid_request", f"--size {args.size}: pictures have 16, 32, 64, ... 4096 pixels.", "")
    from backend.progress import Progress

    with Progress() as progress:
        progress.show("starting", 0)
        if args.meshes is not None:
            from backend.training import renders_meshes

            renders_meshes.run(args.meshes, args.out, args.purpose, args.views, args.size, args.seed, args.lit,
                               args.height, progress)  # fmt: skip
        else:
            from backend.training.renders_kit import Framing, sampled

            framing = Framing(args.purpose, args.size, args.views)
            sampled(args.kit, args.out, framing, args.count, args.seed, args.lit, args.workers, progress)
