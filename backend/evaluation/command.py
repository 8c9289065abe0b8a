# SPDX-License-Identifier: GPL-3.0-or-later
"""The command `populace eval`: its options, what it needs, and its report as text. Imports torch only when it runs."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backend import options
from backend.protocol import PopulaceError
from backend.settings import Settings

PEOPLE, PHOTOGRAPHED = 500, 200  # if no --count is given
KIT = "MAKEHUMAN_DATA"  # environment variable
NEED_KIT = {"renders", "shapes", "novelty", "reconstruction"}
SECTIONS = ("renders", "shapes", "novelty", "health", "height", "swap", "labels", "attributes",
            "sliders", "objects", "reconstruction")  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of `populace eval`."""
    parser.add_argument("--family", default="people", help="model family (default: people)")
    parser.add_argument("--kit", type=Path, help=f"MakeHuman data folder (default: the environment's {KIT})")
    parser.add_argument("--count", type=options.positive, help="people in each set (default: 500)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop adding people after 60%% of this time")
    parser.add_argument("--cache", type=Path, help="folder that keeps every person: a killed run goes on from there")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure (default: all)")
    parser.add_argument("--truncation-psi", type=float, default=1.0, help="1: full variety (default: 1)")
    parser.add_argument("--seed", type=options.seed, default=0, help="of the first generated person (default: 0)")
    parser.add_argument("--reconstructions", type=options.positive, default=20, help="test people (default: 20)")
    parser.add_argument("--few", type=options.positive, default=25, help="for swaps, labels, sliders (default: 25)")
    parser.add_argument("--objects", type=options.positive, default=100, help="people taken apart (default: 100)")
    parser.add_argument("--inception", type=Path, help="torchvision's inception_v3 weights as safetensors, for FID")
    parser.add_argument("--inversion", action="store_true",
                        help="photos to people instead of all the above; 200 where there is no --count")  # fmt: skip
    parser.add_argument("--surfaces", action="store_true",
                        help="with --inversion: surfaces and garments, no pictures; a third of the time")  # fmt: skip
    parser.add_argument("--workers", type=options.positive, default=1,
                        help="with --inversion: processes of one thread (default: 1, of all threads)")  # fmt: skip
    parser.add_argument("--photos", type=options.positive, default=1, help="of each person (default: 1)")
    parser.add_argument("--steps", type=int, default=60, help="of the fit, 0: the encoder alone (default: 60)")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    options.add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Raises PopulaceError with what to do when the kit or a package is missing."""
    if not args.minutes > 0 or math.isnan(args.truncation_psi) or not 0 <= args.truncation_psi <= 2:
        raise PopulaceError(
            "invalid_request", "--minutes must be positive and --truncation-psi in 0..2.", "See --help."
        )
    from backend import families

    info = families.info(args.family)
    if args.inversion:
        return _inversion(args)
    args.count = args.count or PEOPLE
    reference = _reference(args) if NEED_KIT & set(args.only) else None
    from backend.evaluation import people
    from backend.progress import Progress

    with Progress(plain=True) as progress:
        progress.show("loading the model", 0)
        settings = Settings.load(device=args.device)
        model = families.load(args.family, settings.device, settings)
        report = people.run(model, info, reference, people.Options(
            count=args.count, only=tuple(args.only), minutes=args.minutes, cache=args.cache, seed=args.seed,
            truncation_psi=args.truncation_psi, swaps=args.few, few=args.few, objects=args.objects,
            reconstructions=args.reconstructions, inception=args.inception,
        ), progress.show)  # fmt: skip
    print(json.dumps(report, indent=2, allow_nan=False) if args.json else as_text(report))


def _inversion(args: argparse.Namespace) -> None:
    """Photos of sampled people, made people again. Only for families whose people can be photographed: `people`."""
    from backend import families

    if args.family != "people" or args.steps < 0:
        raise PopulaceError("invalid_request", "--inversion measures the people family, with --steps from 0 on.",
                            "Leave --family out.")  # fmt: skip
    from backend.evaluation import inversion
    from backend.families.people.model import PeopleModel
    from backend.progress import Progress

    with Progress(plain=True) as progress:
        settings = Settings.load(device=args.device)
        model = families.load(args.family, settings.device, settings)
        assert isinstance(model, PeopleModel)
        asked = inversion.Asked(args.photos, args.steps, not args.surfaces)
        report = inversion.run(model, args.count or PHOTOGRAPHED, asked, args.workers, args.cache, progress.show)
    print(json.dumps(report, indent=2, allow_nan=False) if args.json else as_text(report))


def _reference(args: argparse.Namespace) -> Any:
    folder = args.kit or (Path(os.environ[KIT]) if os.environ.get(KIT) else None)
    if folder is None:
        raise PopulaceError(
            "invalid_request", "The evaluation compares with people of a MakeHuman data folder; none is given.",
            f"Give it with --kit or in the environment variable {KIT}, or choose with --only what needs none: "
            f"{', '.join(s for s in SECTIONS if s not in NEED_KIT)}."
        )  # fmt: skip
    if find_spec("embreex") is None:
        raise PopulaceError("invalid_request", "Sampled people need the package embreex, which is not installed.",
                            'Install it with: pip install ".[train]"')  # fmt: skip
    from backend.evaluation.reference import SampledPeople

    return SampledPeople(folder)


def as_text(report: dict[str, Any]) -> str:
    """One figure per line; single people are left to JSON."""
    return "\n".join(f"{name:<48} {value}" for name, value in _lines(report, ""))


def _lines(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "each":
                yield from _lines(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, float):
        yield name, f"{value:.4g}"
    elif isinstance(value, list) and value and isinstance(value[0], str):
        for inner in value:
            yield name, inner
    elif value != []:
        yield name, str(value)
