# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace train --family get3d|get3dhuman --renders FOLDER`: what the command does for them.

A run folder holds one folder per stage with its checkpoint, log and sheets, and the weights to import.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.protocol import PopulaceError
from backend.training import checkpoint, loop, renders

log = logging.getLogger(__name__)


def get3d(args: argparse.Namespace, device: torch.device, world: loop.World) -> int:
    """Train GET3D; writes `get3d.safetensors`. Returns 0, or 130 when interrupted; raises PopulaceError."""
    from backend.families.get3d.model import metadata_of
    from backend.families.get3d.training import SIZES, Get3dStage

    pictures = _read(args)
    settings = SIZES[args.size]
    if args.surface == "flexicubes":
        config = dataclasses.replace(settings.config, surface="flexicubes", deformation_multiplier=2.0)
        settings = dataclasses.replace(settings, config=config)
    settings = dataclasses.replace(settings, config=dataclasses.replace(settings.config, material=args.materials))
    stage = Get3dStage(pictures, settings, args.seed, device, world.rank)
    facts = {"stage": "get3d", "size": args.size, "seed": args.seed, "resolution": pictures.size,
             "items": len(pictures.items), "surface": args.surface, "materials": args.materials}  # fmt: skip
    box = loop.Box(minutes=args.minutes, max_steps=args.max_steps or float("inf"))
    outcome = loop.run(stage, args.resume / "get3d", box, world, facts)
    log.info("get3d: %d steps, ended by %s, %s", outcome.steps, outcome.stopped, json.dumps(outcome.figures))
    if world.rank == 0:
        made = stage.averaged()
        notes = {"title": f"GET3D of {pictures.folder.name}", "steps": str(outcome.steps)}
        _keep(args, "get3d", made.state_dict(), metadata_of(made.config) | notes)
    return 130 if outcome.stopped == "interrupted" else 0


HUMAN_SHARES = {"teacher": 0.35, "shape": 0.28, "texture": 0.28, "refine": 0.09}  # of the minutes


def get3dhuman(args: argparse.Namespace, device: torch.device, world: loop.World) -> int:
    """Train Get3DHuman's stages; each begins with what the one before it left in the run folder. Writes
    `teacher.safetensors` and, from the first distilled branch on, `get3dhuman.safetensors`. Returns 0, or 130 when
    interrupted; raises PopulaceError."""
    from backend.families.get3dhuman import stages
    from backend.families.get3dhuman.config import to_metadata
    from backend.families.get3dhuman.networks import Get3DHuman
    from backend.families.get3dhuman.people import People
    from backend.families.get3dhuman.teacher import Teacher

    if args.resolution:
        raise PopulaceError("invalid_request", "Get3DHuman's renders are taken as they are: depth does not shrink.",
                            "Render them at that size: populace renders --for get3dhuman --size N.")  # fmt: skip
    people, settings = People(_read(args, maps=True)), stages.SIZES[args.size]
    config = dataclasses.replace(settings.config, resolution=people.size)
    asked = list(HUMAN_SHARES) if args.stage in (None, "all") else [args.stage]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        student, teacher = Get3DHuman(config, discriminators=True), Teacher(config, settings.residues)
    for name in asked:
        _take_up(args.resume, name, student, teacher)
        rest = (args.seed, device, world.rank)
        if name == "teacher":
            stage: Any = stages.TeacherStage(people, settings, *rest)
        elif name == "refine":
            stage = stages.RefineStage(people, settings, teacher, *rest)
        else:
            stage = stages.DistillStage(people, settings, student, teacher, name, *rest)  # type: ignore[arg-type]
        minutes = args.minutes * HUMAN_SHARES[name] / sum(HUMAN_SHARES[n] for n in asked)
        box = loop.Box(minutes=minutes, max_steps=args.max_steps or float("inf"))
        facts = stages.facts_of(settings, args.size, args.seed, people, name)
        outcome = loop.run(stage, args.resume / name, box, world, facts)
        log.info("%s: %d steps, ended by %s, %s", name, outcome.steps, outcome.stopped, json.dumps(outcome.figures))
        if world.rank == 0 and name == "teacher":
            _keep(args, "teacher", stage.teacher.state_dict(), {})
        elif world.rank == 0:
            if name != "refine":
                student.load_state_dict(stages.finished(stage.state()))
            stages.settle(student)
            state = {k: v for k, v in student.state_dict().items() if not k.startswith("Dis_")}
            if name == "refine":
                state |= {k: v for k, v in stage.refine.state_dict().items() if v.is_floating_point()}
            notes = {"title": f"Get3DHuman of {people.renders.folder.name}"}
            _keep(args, "get3dhuman", state, to_metadata(config) | notes)
        world.total([0], device)  # the others wait for the files
        if outcome.stopped == "interrupted":
            return 130
    return 0


def _take_up(folder: Path, name: str, student: Any, teacher: Any) -> None:
    """What the stages before `name` left. Raises PopulaceError("not_found") if one has not run."""
    from backend.families.get3dhuman.stages import finished

    needed = {"shape": ("teacher",), "texture": ("teacher", "shape"), "refine": ("teacher", "texture")}.get(name, ())
    for earlier in needed:
        path = folder / earlier / loop.CHECKPOINT
        if not path.exists():
            raise PopulaceError("not_found", f"The stage {name} begins where {earlier} ends, which has not run in "
                                f"{folder}.", f"Run it first: --stage {earlier}.")  # fmt: skip
        state = checkpoint.load(path)[0]
        if earlier == "teacher":
            teacher.load_state_dict(checkpoint.under_prefix("teacher", state))
        else:
            student.load_state_dict(finished(state))


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
