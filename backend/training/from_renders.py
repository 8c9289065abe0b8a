# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace train --family get3d|get3dhuman --renders FOLDER`: what the command does for them.

A run folder holds one folder per stage with its checkpoint, log and sheets, and the weights to import.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.training import loop, renders

log = logging.getLogger(__name__)


def get3d(args: argparse.Namespace, device: torch.device, world: loop.World) -> int:
    """Train GET3D; writes `get3d.safetensors`. Returns 0, or 130 when interrupted; raises PopulaceError."""
    from backend.families.get3d.model import metadata_of
    from backend.families.get3d.training import SIZES, Get3dStage

    pictures = _read(args)
    settings = SIZES[args.size]
    stage = Get3dStage(pictures, settings, args.seed, device, world.rank)
    facts = {"stage": "get3d", "size": args.size, "seed": args.seed, "resolution": pictures.size,
             "items": len(pictures.items)}  # fmt: skip
    box = loop.Box(minutes=args.minutes, max_steps=args.max_steps or float("inf"))
    outcome = loop.run(stage, args.resume / "get3d", box, world, facts)
    log.info("get3d: %d steps, ended by %s, %s", outcome.steps, outcome.stopped, json.dumps(outcome.figures))
    if world.rank == 0:
        made = stage.averaged()
        notes = {"title": f"GET3D of {pictures.folder.name}", "steps": str(outcome.steps)}
        _keep(args, "get3d", made.state_dict(), metadata_of(made.config) | notes)
    return 130 if outcome.stopped == "interrupted" else 0


def _read(args: argparse.Namespace, maps: bool = False) -> renders.Renders:
    found = renders.read(args.renders, maps)
    return found.smaller(args.resolution) if args.resolution else found


def _keep(args: argparse.Namespace, name: str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """The weights file of a finished session, replaced as a whole."""
    path = args.resume / f"{name}.safetensors"
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary, metadata=dict(metadata))
    temporary.replace(path)
    if args.export:
        Path(args.export).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, args.export)
