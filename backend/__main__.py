# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line `populace` (also `python -m backend`). Every command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import __version__, options
from backend.protocol import GenerateRequest, Mix, Person, PopulaceError
from backend.settings import Settings

if TYPE_CHECKING:
    from backend.photo.album import Album

EXIT_CODES = {
    "invalid_request": 2, "unknown_family": 2, "image_unreadable": 4, "image_missing": 4, "too_large": 4,
    "no_person_found": 4, "mask_needed": 4, "no_gpu": 5, "out_of_gpu_memory": 5, "weights_missing": 6,
    "weights_corrupt": 6, "out_of_disk": 7,
}  # fmt: skip

EPILOG = """exit codes:
  0  all done
  1  it failed; one sentence on stderr says why
  2  the command line is wrong (also: unknown family or parameter, bad plan)
  3  some people of a batch failed, or are missing in a merge
  4  a photo cannot be read, or nobody is found in it
  5  no usable GPU (or too little memory on it)
  6  weights are missing or damaged
  7  the disk is full
  130  interrupted (143: ended by the system)

examples:
  populace demo                                    three people, a render and a .blend in populace-demo/
  populace generate --seed 7 --count 5 --out crowd  five GLB files
  populace generate --seed 7 --prompt "tall old woman, red shirt" --pose walking --lods 3
  populace generate --seed 7 --part top=12 --set height_m=1.8 --retexture 3
  populace interpolate --from 7 --to 8 --steps 9    nine people, from one to the other
  populace generate --seed 7 --preset unreal        an FBX for Unreal; also unity, godot, --format usd
  populace invert photo.jpg --out people            the person of a photo; several photos show one person, or --each
  populace plan --count 200 > plan.jsonl            a plan, one request per line; then
  populace batch plan.jsonl --out crowd --resume    all of them, as often as it takes; --shard 2/8 for a part
  populace doctor                                  what is installed and what will run where
  populace serve --stay --json                     a backend for scripts; prints where its token is

folders: everything is kept in the user's data folder; POPULACE_HOME=DIR moves all of it. --verbose shows tracebacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(argv)
    level = logging.DEBUG if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.verbose:
            logging.getLogger(__name__).exception("%s failed", args.command)
        problem = _as_problem(error)
        print(f"populace: {problem.message}", file=sys.stderr)
        if problem.hint:
            print(f"  {problem.hint}", file=sys.stderr)
        return EXIT_CODES.get(problem.code, 1)


def _as_problem(error: Exception) -> PopulaceError:
    if isinstance(error, PopulaceError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PopulaceError("out_of_disk", f"The disk is full ({error.filename or 'while writing'}).", "Free space.")
    if isinstance(error, OSError) and error.filename:
        return PopulaceError("internal_error", f"{error.filename}: {error.strerror}.", "Choose another folder.")
    if isinstance(error, MemoryError):
        return PopulaceError("out_of_memory", "There is not enough memory.", "Try a smaller grid or texture.")
    return PopulaceError("internal_error", f"{type(error).__name__}: {error}", "Run it again with --verbose.")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="populace", description="Textured, clothed, rigged 3D humans for Blender.", epilog=EPILOG,
        formatter_class=formatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"populace {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log more and show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, parent: Any = commands) -> argparse.ArgumentParser:
        made = parent.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=run)
        return made

    demo = command("demo", _demo, "make three people through the real backend and put them into a Blender scene")
    demo.add_argument("--out", type=Path, default=Path("populace-demo"), help="folder (default: populace-demo)")
    demo.add_argument("--seed", type=options.seed, default=1, help="of the first of the three (default: 1)")
    demo.add_argument("--family", default="people", help="model family (default: people)")

    generate = command("generate", _generate, "make people from seeds, words and edits, and write them as files")
    generate.add_argument("--count", type=options.positive, default=1, help="how many people (default: 1)")
    options.add_person(generate)
    options.add_output(generate)
    options.add_quality(generate)

    invert = command("invert", _invert, "make the people of photos, and write them as files")
    invert.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="PNG, JPEG or WebP; all of one person")
    invert.add_argument("--each", action="store_true", help="every photo shows a person of its own")
    options.add_photos(invert)
    options.add_person(invert, with_seed=False)
    options.add_output(invert)
    options.add_quality(invert)

    between = command("interpolate", _interpolate, "write the people on the way from one seed to another")
    between.add_argument("--from", dest="seed", type=options.seed, required=True, help="seed of the first person")
    between.add_argument("--to", type=options.seed, required=True, help="seed of the last person")
    between.add_argument("--steps", type=options.positive, default=5, help="people, both ends included (default: 5)")
    between.add_argument("--kinds", type=options.kinds, default=["shape", "tex"], help="default: shape,tex")
    options.add_output(between)
    options.add_quality(between)

    from backend.batch import command as batch

    batch.add_plan(command("plan", batch.run_plan, "write a plan for a batch: one request per line, on stdout"))
    batch.add_batch(command("batch", batch.run_batch, "make the people of a plan, in parallel, resumable, in shards"))

    batch.add_farm(command("farm", batch.run_farm, "print the job file of a render farm that runs a batch in shards"))

    serve = command("serve", _serve, "run the backend for Blender and scripts on 127.0.0.1")
    serve.add_argument("--stay", action="store_true", default=None, help="go on when the last client has left")
    serve.add_argument("--json", action="store_true", help="print one JSON line when ready: port, pid, runtime_file")
    serve.add_argument("--port", type=_port, help="default: one chosen by the system")
    serve.add_argument("--data-dir", type=Path, help="for jobs, results, logs and weights")
    options.add_device(serve)

    doctor = command("doctor", _doctor, "show what is installed, and what will run where")
    doctor.add_argument("--json", action="store_true", help="as JSON")

    addon = command("addon", None, "the Blender add-on").add_subparsers(dest="action", required=True, metavar="ACTION")
    build = command("build", _addon_build, "make the zip that Blender installs", addon)
    build.add_argument("--out", type=Path, default=Path("dist"), help="folder (default: dist)")
    kind = build.add_mutually_exclusive_group()
    kind.add_argument("--slim", action="store_true", help="the add-on alone (default)")
    kind.add_argument("--full", action="store_true", help="with the generator and what sets it up; from a checkout")
    index = command("index", _addon_index, "write index.json, the repository listing for a folder of zips", addon)
    index.add_argument("folder", type=Path, help="serve it as it is; slim and full need folders of their own")
    index.add_argument("--html", action="store_true", help="also index.html, with links to drag into Blender")

    from backend import weights_command

    weights_command.add_commands(command, command("weights", None, "model weights"))

    bench = command("bench", _bench, "measure seconds and peak memory per stage, growth with the grid, and ratios")
    bench.add_argument("--json", action="store_true", help="as JSON on stdout")
    bench.add_argument("--repeat", type=options.positive, default=5, help="runs, the median counts (default: 5)")
    bench.add_argument("--quick", action="store_true", help="only the stages of one person, without growth and ratios")
    options.add_quality(bench)

    from backend.evaluation import command as evaluation

    evaluate = command("eval", evaluation.run, "compare a family's people with sampled people that training never saw")
    evaluation.add_options(evaluate)

    from backend.training import command as training

    train = command("train", training.run, "train a family: people on a MakeHuman data folder, others on renders")
    training.add_options(train)

    from backend.training import renders_command

    pictures = command("renders", renders_command.run, "render people or meshes into a folder for train --renders")
    renders_command.add_options(pictures)

    from backend.training import adapt_command

    adapted = command("adapt", adapt_command.run, "lead a family's weights from one text to another, by CLIP")
    adapt_command.add_options(adapted)
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError("must be in 0..65535")
    return value


def _demo(args: argparse.Namespace) -> None:
    from backend import demo

    demo.run(args.out, args.seed, args.family)


def _generate(args: argparse.Namespace) -> None:
    first = options.request_of(args)
    requests = [first.model_copy(update={"seed": first.seed + i}) for i in range(args.count)]
    _make({f"person_{request.seed:06d}": request for request in requests}, args)


def _invert(args: argparse.Namespace) -> None:
    from backend.photo.album import Album

    if args.mask and len(args.mask) != len(args.photos):
        raise PopulaceError("invalid_request", f"There are photos: {len(args.photos)}, masks: {len(args.mask)}.",
                            "Give --mask once for every photo, in their order, or not at all.")  # fmt: skip
    album, photos = Album(), []
    for i, path in enumerate(args.photos):
        mask = album.add(args.mask[i]) if args.mask else None
        photos.append({"image": album.add(path), "mask": mask, "person": args.person})
    groups = [(path, [photo]) for path, photo in zip(args.photos, photos)] if args.each else [(args.photos[0], photos)]
    requests: dict[str, GenerateRequest] = {}
    for path, shown in groups:
        name = base = "".join(c if c.isalnum() or c in "-_" else "_" for c in path.stem)[:60] or "person"
        for number in range(2, len(groups) + 1):
            if name.casefold() not in map(str.casefold, requests):
                break
            name = f"{base}_{number}"
        requests[name] = options.request_of(args, photos=shown, inversion=options.inversion_of(args))
    _make(requests, args, album)


def _interpolate(args: argparse.Namespace) -> None:
    first = options.request_of(args)
    other, requests = Person(seed=args.to, truncation_psi=first.truncation_psi), {}
    for i in range(args.steps):
        mix = Mix(op="mix", other=other, amount=i / max(args.steps - 1, 1), kinds=args.kinds)
        name = f"person_{args.seed:06d}_to_{args.to:06d}_{i:02d}"
        requests[name] = first.model_copy(update={"edits": [mix, *first.edits]})
    _make(requests, args)


def _make(requests: dict[str, GenerateRequest], args: argparse.Namespace, images: Album | None = None) -> None:
    """In this process, without a server; the requests are of one family."""
    from backend import checks, families, interchange, packet, pipeline
    from backend.progress import Progress

    for request in requests.values():
        checks.check(request)
    formats = args.format or interchange.default_formats(args.preset)
    interchange.check(formats)
    args.out.mkdir(parents=True, exist_ok=True)
    ignored: list[str] = []
    with Progress() as progress:
        progress.show("loading the model", 0)
        settings = Settings.load(device=args.device)
        model = families.load(next(iter(requests.values())).family, settings.device, settings)
        for i, (name, request) in enumerate(requests.items()):
            who = f"person {i + 1} of {len(requests)}" if len(requests) > 1 else "person"

            def step(stage: str, fraction: float, i: int = i, who: str = who) -> None:
                progress.show(f"{who}: {stage}", (i + fraction) / len(requests))

            asset, stats = pipeline.generate(request, model, step, images)
            paths = [path for form in formats for path in interchange.write(asset, args.out, name, form, args.preset)]
            ignored = asset.meta.get("words_ignored", [])
            if args.json:
                line = {"seed": request.seed, "path": str(paths[0]), "paths": [str(path) for path in paths],
                        "packet_sha256": hashlib.sha256(packet.dumps(asset)).hexdigest(),
                        "parts": asset.meta["parts"], "height_m": asset.meta["attributes"]["height_m"],
                        "attributes": asset.meta["attributes"], "words_ignored": ignored, "stats": stats,
                        **({"photo": asset.meta["photo"]} if "photo" in asset.meta else {})}  # fmt: skip
                print(json.dumps(line), flush=True)
            for note in asset.meta.get("photo", {}).get("notes", ()):
                print(f"populace: {name}: {note}.", file=sys.stderr)
    if ignored:
        print(f"populace: not understood: {', '.join(ignored)}", file=sys.stderr)


def _serve(args: argparse.Namespace) -> int:
    from backend import server

    return server.serve(
        Settings.load(data_dir=args.data_dir, port=args.port, device=args.device, stay=args.stay), json_line=args.json
    )


def _doctor(args: argparse.Namespace) -> int:
    from backend import doctor

    report = doctor.examine(Settings.load())
    print(json.dumps(report, indent=2) if args.json else doctor.as_text(report))
    return 0 if report["ok"] else 1


def _addon_build(args: argparse.Namespace) -> None:
    from backend import addon

    path = addon.build(args.out, args.full)
    checked = addon.validate(path)
    print(path)
    print("Blender's validator finds no fault." if checked else "Not validated: no bpy module here.", file=sys.stderr)


def _addon_index(args: argparse.Namespace) -> None:
    from backend import addon

    print(addon.write_index(args.folder, args.html))


def _bench(args: argparse.Namespace) -> None:
    request = options.request_of(args)
    from backend import bench

    report = bench.run(request, Settings.load(device=args.device), args.repeat, args.quick)
    print(json.dumps(report, indent=2) if args.json else bench.as_text(report))


if __name__ == "__main__":
    sys.exit(main())
