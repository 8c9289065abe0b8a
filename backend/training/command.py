# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace train`: fit, then adversarial, then super-resolution; every stage goes from weights to weights.

That is the people family; GET3D and Get3DHuman learn from folders of renders, see `from_renders`. The run folder holds
one weights file per finished stage (`fit.safetensors`, ...) and one folder per adversarial stage with its checkpoint,
log and sample sheets. A stage starts from the last finished one before it, or from the weights that ship with this
version. With torchrun, every process takes its share of the batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from backend.options import add_device, positive
from backend.protocol import PopulaceError
from backend.settings import Settings

if TYPE_CHECKING:
    import torch

    from backend.families.people.model import PeopleModel
    from backend.training.loop import World

FAMILIES = ("people", "get3d", "get3dhuman", "sifu", "gta")
STAGES = ("fit", "adversarial", "superres")
ENCODER = "encoder"  # of photos; a stage of its own: what codes mean stays as it is
HUMAN_STAGES = ("teacher", "shape", "texture", "refine")
SHARES = {"adversarial": 2 / 3, "superres": 1 / 3}  # of the minutes, when both are asked for

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=FAMILIES, default="people", help="default: people")
    parser.add_argument("--kit", type=Path, help="a MakeHuman or MPFB data folder, for people")
    parser.add_argument("--renders", type=Path, metavar="DIR", help="a folder that populace renders wrote, for others")
    parser.add_argument("--people", type=positive, default=300,
                        help="so many sampled people, for sifu, gta and the encoder (default: 300)")  # fmt: skip
    parser.add_argument("--resume", "--out", type=Path, required=True, metavar="DIR",
                        help="run folder, made or continued")  # fmt: skip
    parser.add_argument("--resolution", type=positive, help="shrink the renders to so many pixels (default: as are)")
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="small",
                        help="tiny: for tests; small: two CPU cores; base: a GPU (default: small)")  # fmt: skip
    parser.add_argument("--surface", choices=("dmtet", "flexicubes"), default="dmtet", help="of get3d (default: dmtet)")
    parser.add_argument("--materials", action="store_true",
                        help="get3d learns base colour, roughness, metallic and normals, for renders made with --lit")
    parser.add_argument("--stage", choices=(*STAGES, ENCODER, *HUMAN_STAGES, "all"),
                        help="of people (default: fit; encoder: of photos, without a kit), or of get3dhuman: teacher, "
                        "shape, texture, refine "
                        "(default: all)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60,
                        help="for all stages but fit together, of this session (default: 60)")  # fmt: skip
    parser.add_argument("--max-steps", type=positive, help="of each adversarial stage, over all sessions")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--export", type=Path, metavar="FILE", help="copy the weights of the last stage here")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 130 when interrupted; raises PopulaceError."""
    if not args.minutes > 0:
        raise PopulaceError("invalid_request", f"--minutes {args.minutes:g}: there must be some.", "See --help.")
    if args.family == "people" and args.stage != ENCODER and (args.kit is None or not args.kit.is_dir()):
        what = "People are trained on a kit." if args.kit is None else f"There is no folder {args.kit}."
        raise PopulaceError("invalid_request", what, "--kit wants a MakeHuman data folder.")
    if args.family in ("sifu", "gta"):
        return _photographed(args)
    if args.family != "people" and args.renders is None:
        raise PopulaceError("invalid_request", f"{args.family} is trained on renders.",
                            "Make some with populace renders and name the folder: --renders FOLDER.")  # fmt: skip
    known = {"people": (*STAGES, ENCODER), "get3d": (), "get3dhuman": HUMAN_STAGES}[args.family]
    if args.stage not in (None, "all", *known):
        raise PopulaceError("invalid_request", f"{args.family} has no stage {args.stage!r}.",
                            f"It has: {', '.join(known) or 'one, without a name'}.")  # fmt: skip
    logging.getLogger("backend.training").setLevel(logging.INFO)
    import torch

    from backend.training.loop import World

    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    world = World.join(device)
    if args.family != "people":
        from backend.training import from_renders

        train = from_renders.get3d if args.family == "get3d" else from_renders.get3dhuman
        return train(args, device, world)
    if args.stage == ENCODER:
        return _encoder(args, device, world)
    stages = STAGES if args.stage == "all" else (args.stage or "fit",)
    asked = sum(SHARES.get(s, 0) for s in stages)
    for stage in stages:
        done = args.resume / f"{stage}.safetensors"
        if stage == "fit":
            if world.rank == 0:
                _fit(args.kit, args.resume, args.size, args.seed)
            world.total([0], device)  # the others wait here
        elif not _adversarial(stage, args, device, world, args.minutes * SHARES[stage] / asked):
            return 130
    if args.export and world.rank == 0:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(done, args.export)
    return 0


def _encoder(args: argparse.Namespace, device: torch.device, world: World) -> int:
    """The photo encoder of the weights in use; writes `encoder.safetensors` in the run folder."""
    from backend.training import loop
    from backend.training.encoder import EncoderStage, make_figures
    from backend.training.encoder import Settings as Plan

    model = _load(None, device)
    if world.rank == 0:
        make_figures(model, args.resume / "figures", args.people)
    world.total([0], device)
    plan = Plan(batch=8 if args.size == "tiny" else 32, steps=args.max_steps or Plan.steps)
    stage = EncoderStage(model, make_figures(model, args.resume / "figures", args.people), plan, args.seed)
    facts = {"stage": ENCODER, "size": args.size, "seed": args.seed, "start": model.weights_sha256}
    box = loop.Box(minutes=args.minutes, max_steps=args.max_steps or plan.steps)
    outcome = loop.run(stage, args.resume / ENCODER, box, world, facts)
    log.info("encoder: %d steps, ended by %s, %s", outcome.steps, outcome.stopped, json.dumps(outcome.figures))
    if world.rank == 0:
        stage.export(args.resume / f"{ENCODER}.safetensors")
        if args.export:
            args.export.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.resume / f"{ENCODER}.safetensors", args.export)
    return 130 if outcome.stopped == "interrupted" else 0


def _photographed(args: argparse.Namespace) -> int:
    """Reconstruction from photos, trained on the default model's own people: neither kit nor renders are needed."""
    logging.getLogger("backend.training").setLevel(logging.INFO)
    import torch

    from backend.families.sifu.training import train
    from backend.training.loop import World

    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    path, outcome = train(
        args.family, args.resume, args.size, args.people, args.minutes, args.max_steps or float("inf"), args.seed,
        device, World.join(device),
    )  # fmt: skip
    log.info("%s: %d steps, ended by %s, %s", args.family, outcome.steps, outcome.stopped, json.dumps(outcome.figures))
    if path is not None and args.export:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, args.export)
    return 130 if outcome.stopped == "interrupted" else 0


def _fit(kit: Path, folder: Path, size: str, seed: int) -> None:
    """The parts from the kit, the mappings from sampled people; writes `fit.safetensors` in the run folder."""
    from backend.training import people

    people.fit(kit, folder, size, seed).replace(folder / "fit.safetensors")


def _adversarial(stage: str, args: argparse.Namespace, device: torch.device, world: World, minutes: float) -> bool:
    """Train one adversarial stage; False if it was interrupted. Writes `<stage>.safetensors` in the run folder."""
    from backend.training import adversarial, loop, views

    settings = adversarial.SIZES[args.size]
    if stage == "superres":
        settings = adversarial.superres(settings)
    start = _start(args.resume, stage)
    model = _load(start, device)
    folder = args.resume / stage
    size = (settings.height, round(settings.height * views.ASPECT))
    pool, workers = folder / "reals.safetensors", max(1, (os.cpu_count() or 1) // world.size)
    if world.rank == 0:
        views.make_reals(views.kit_shot(args.kit), settings.pool, size, args.seed, workers, pool)
    world.total([0], device)
    reals = views.make_reals(views.kit_shot(args.kit), settings.pool, size, args.seed, workers, pool)
    trained = adversarial.AdversarialStage(model, reals, settings, args.seed, stage)
    facts = {"stage": stage, "size": args.size, "seed": args.seed, "start": model.weights_sha256}
    box = loop.Box(minutes=minutes, max_steps=args.max_steps or float("inf"))
    outcome = loop.run(trained, folder, box, world, facts)
    log.info("%s: %d steps, ended by %s, %s", stage, outcome.steps, outcome.stopped, json.dumps(outcome.figures))
    if world.rank == 0:
        trained.finish()
        write_weights(model, args.resume / f"{stage}.safetensors")
    return outcome.stopped != "interrupted"


def write_weights(model: PeopleModel, path: Path) -> None:
    """The weights file of a model, replaced as a whole."""
    from backend.training.people import save

    save(model.networks, model.facts, path)


def _start(folder: Path, stage: str) -> Path | None:
    """Weights of the last finished stage before `stage`; None for those that ship."""
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        path = folder / f"{earlier}.safetensors"
        if path.exists():
            return path
    return None


def _load(path: Path | None, device: torch.device) -> PeopleModel:
    from backend import weights
    from backend.families.people import model

    if path is None:
        return model.load(device, weights.locate("people", Settings.load().data_dir))
    return model.load(device, weights.Weights("people", weights.sha256_of(path), (path,)))


def _device(name: str | None) -> torch.device:
    """The asked-for device; with torchrun each process has its own GPU. Raises PopulaceError("no_gpu")."""
    import torch

    from backend.families import resolve_device

    if resolve_device(name or Settings.load().device) == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
