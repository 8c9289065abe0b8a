# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace plan`, `populace batch` and `populace farm`: their options, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend import options
from backend.batch.farm import TEMPLATES, template
from backend.protocol import PopulaceError
from backend.settings import Settings

FAILED = 3
PLAN_HELP = """a plan has one JSON object per line: the fields of a request, and id, count, formats, preset, such as
  {"seed": 1, "count": 20}
  {"id": "guard", "seed": 7, "prompt": "tall man, black trousers", "pose": "standing_1", "formats": ["fbx"]}
`populace plan` writes one; backend/batch/plan.py describes all of it."""
BATCH_HELP = f"""{PLAN_HELP}

OUT/items/ID/ holds the files of a person and done.json with their SHA-256, and appears by one rename. A run that was
stopped or killed goes on with --resume. OUT/manifest.json lists all people when the last of them is there, and is the
same whoever made which of them. OUT/logs/ has a JSON line for everything that happened.

exit codes: 0 all there, 2 the plan is wrong (nothing was made), 3 some failed (run again with --resume), 5 no GPU,
6 no weights, 7 disk full, 130 and 143 stopped by a signal"""


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = PLAN_HELP
    parser.add_argument("--count", type=options.positive, default=1, help="how many people (default: 1)")
    parser.add_argument("--spread", type=_spread, action="append", default=[], metavar="NAME=...",
                        help="an attribute, the pose or words, over the people: age_years=25..70, or "
                        "words=woman:60,man:40 in per cent")  # fmt: skip
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="a person per photo in FOLDER, or per folder of "
                        "photos in it; NAME.mask.png is the mask of NAME.jpg. The plan has whole paths")  # fmt: skip
    options.add_person(parser)
    options.add_shape(parser)
    options.add_quality(parser)
    options.add_formats(parser, "files, for lines that name none (default: glb)")


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = BATCH_HELP
    parser.add_argument("plan", type=Path, metavar="PLAN.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if needed; shards may share one")
    parser.add_argument("--shard", type=_shard, default="1/1", metavar="I/N", help="every N-th person from the "
                        "I-th on, I in 1..N (default: 1/1, all)")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep the people who are there already")
    parser.add_argument("--overwrite", action="store_true", help="make the people who are there already again")
    parser.add_argument("--verify", action="store_true", help="with --resume: read the files that are there, compare "
                        "their SHA-256, and make damaged ones again")  # fmt: skip
    parser.add_argument("--retries", type=_not_negative, default=1, help="of one that fails (default: 1)")
    options.add_formats(parser, "files, for lines that name none (default: glb)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--processes", type=options.positive, help="workers on this machine (default: as many as cores "
                       "and memory allow, one on a GPU)")  # fmt: skip
    where.add_argument("--dask", metavar="ADDRESS", help="let the workers of a Dask cluster make them: "
                       "tcp://127.0.0.1:8786 or tls://HOST:8786")  # fmt: skip
    options.add_device(parser)
    parser.add_argument("--merge", action="store_true", help="make nobody: write the manifest of what is there")
    parser.add_argument("--dry-run", action="store_true", help="make nobody: check plan and disk, say what would be")
    parser.add_argument("--json", action="store_true", help="print the log's lines on stdout")


def add_farm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("farm", choices=tuple(TEMPLATES), help="openjd: Deadline Cloud and others, a job template; "
                        "flamenco: a job type; opencue: a script that sends the job")  # fmt: skip


def run_farm(args: argparse.Namespace) -> None:
    print(template(args.farm), end="")


def run_plan(args: argparse.Namespace) -> None:
    from backend.batch import plan

    request = options.request_of(args)
    if args.photos is not None:
        if args.spread or args.count > 1 or not args.photos.is_dir():
            raise PopulaceError("invalid_request", "--photos wants a folder, and neither --count nor --spread.",
                                "Leave those out.")  # fmt: skip
        for line in plan.of_photos(request, args.photos.absolute(), args.format, args.preset):
            print(line)
        return
    for line in plan.write(request, args.count, args.spread, args.format, args.preset):
        print(line)


def run_batch(args: argparse.Namespace) -> int:
    from backend import interchange
    from backend.batch import plan, results

    items = plan.read(args.plan, args.format, args.preset)
    mine = args.shard.of(items)
    if args.merge:
        return _told(results.write_manifest(args.out, items, even_if_incomplete=True), args)
    interchange.check({form for item in mine for form in item.formats})
    there = {item.id for item in mine if results.done(args.out, item, thorough=args.verify)}
    if there and not (args.resume or args.overwrite):
        raise PopulaceError("invalid_request", f"{len(there)} of these {len(mine)} people are in {args.out} already.",
                            "Add --resume to keep them, or --overwrite to make them again.")  # fmt: skip
    left = [item for item in mine if args.overwrite or item.id not in there]
    need = results.check_space(args.out, left)
    if args.dry_run:
        print(f"{len(items)} people in the plan, {len(mine)} in this shard, {len(left)} to be made, about "
              f"{need / 1e6:.0f} MB.")  # fmt: skip
        return 0
    results.sweep(args.out)
    return _make(args, items, left, len(mine) - len(left))


def _make(args: argparse.Namespace, items: list[Any], left: list[Any], kept: int) -> int:
    """Run the shard, merge, tell. Returns the exit code."""
    from backend.batch import results, runner
    from backend.progress import Progress

    settings, begin = Settings.load(device=args.device), time.monotonic()
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress())
        ended = 0

        def hear(line: dict[str, Any]) -> None:
            nonlocal ended
            ended += line["event"] in ("done", "failed")
            progress.show(f"{ended} of {len(left)} people", ended / max(len(left), 1))
            if args.json:
                print(json.dumps(line), flush=True)
            elif line["event"] == "failed":
                print(f"populace: {line['id']}: {line['error']['message']}", file=sys.stderr)

        log = runner.Log(args.out, args.shard, hear)
        if args.dask:
            start, width = stack.enter_context(runner.dask(args.dask))
        else:
            width = min(args.processes or runner.local_width(settings.device), max(len(left), 1))
            start = runner.local(width)
        log.write("start", people=len(left), kept=kept, workers=width, plan=str(args.plan))
        stop = stack.enter_context(runner.Stop().listening())
        out = args.out.absolute()
        outcome = runner.Outcome()
        if left:
            outcome = runner.run(left, out, settings.device, start, width, args.retries, log, stop)
        seconds = round(time.monotonic() - begin, 2)
        log.write("interrupted" if outcome.interrupted else "end", made=outcome.made, kept=kept,
                  failed=len(outcome.failed), seconds=seconds)  # fmt: skip
    found = results.write_manifest(args.out, items)
    if outcome.fatal is not None:
        raise outcome.fatal
    if not args.json:
        print(f"{outcome.made} people made, {kept} kept, {len(outcome.failed)} failed in {seconds:.0f} s.")
    if outcome.interrupted:
        print("populace: stopped; go on with --resume.", file=sys.stderr)
        return 128 + outcome.interrupted
    _told(found, args)
    return FAILED if outcome.failed else 0


def _told(found: dict[str, Any], args: argparse.Namespace) -> int:
    """Say where the manifest is, or that it waits for others."""
    from backend.batch import results

    total, missing = len(found["items"]) + len(found["missing"]), len(found["missing"])
    if not args.json:
        if missing and not args.merge:
            print(f"{total - missing} of the plan's {total} people are there; the manifest comes with the last.")
        else:
            print(f"{args.out / results.MANIFEST}: {total - missing} of {total} people.")
    return FAILED if missing else 0


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` with its ValueError as argparse wants it."""

    def converted(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


@_argument
def _shard(text: str) -> Any:
    from backend.batch.runner import Shard

    return Shard.parse(text)


@_argument
def _spread(text: str) -> Any:
    from backend.batch.plan import Spread

    return Spread.parse(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a number, not negative")
    return int(text)
