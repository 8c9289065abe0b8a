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

from pydantic import ValidationError

from backend import __version__
from backend.protocol import GenerateRequest, PopulaceError
from backend.settings import Settings

if TYPE_CHECKING:
    from backend.packet import HumanAsset

EXIT_CODES = {
    "invalid_request": 2, "unknown_family": 2, "no_gpu": 5, "out_of_gpu_memory": 5, "weights_missing": 6,
    "weights_corrupt": 6, "out_of_disk": 7,
}  # fmt: skip

EPILOG = """exit codes:
  0  all done
  1  it failed; one sentence on stderr says why
  2  the command line is wrong (also: unknown family or parameter)
  5  no usable GPU (or too little memory on it)
  6  weights are missing or damaged
  7  the disk is full
  130  interrupted

examples:
  populace demo                                    three people, a render and a .blend in populace-demo/
  populace generate --seed 7 --count 5 --out crowd  five GLB files
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
    demo.add_argument("--seed", type=_seed, default=1, help="of the first person; the others follow (default: 1)")
    demo.add_argument("--family", default="people", help="model family (default: people)")

    generate = command("generate", _generate, "make people from seeds and write them as files")
    generate.add_argument("--seed", type=_seed, default=0, help="of the first person; the others follow (default: 0)")
    generate.add_argument("--count", type=_positive, default=1, help="how many people (default: 1)")
    generate.add_argument("--out", type=Path, default=Path("."), help="folder, made if needed (default: .)")
    generate.add_argument("--format", choices=("glb", "obj", "blend"), default="glb", help="default: glb")
    generate.add_argument("--json", action="store_true", help="print one JSON line per person on stdout")
    _request_options(generate)

    serve = command("serve", _serve, "run the backend for Blender and scripts on 127.0.0.1")
    serve.add_argument("--stay", action="store_true", default=None, help="go on when the last client has left")
    serve.add_argument("--json", action="store_true", help="print one JSON line when ready: port, pid, runtime_file")
    serve.add_argument("--port", type=_port, help="default: one chosen by the system")
    serve.add_argument("--data-dir", type=Path, help="for jobs, results, logs and weights")
    _device_option(serve)

    doctor = command("doctor", _doctor, "show what is installed, and what will run where")
    doctor.add_argument("--json", action="store_true", help="as JSON")

    addon = command("addon", None, "the Blender add-on").add_subparsers(dest="action", required=True, metavar="ACTION")
    build = command("build", _addon_build, "make the zip that Blender installs", addon)
    build.add_argument("--out", type=Path, default=Path("dist"), help="folder (default: dist)")

    weights = command("weights", None, "model weights").add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = command("list", _weights_list, "show what the manifest names and whether it is here", weights)
    listing.add_argument("--json", action="store_true", help="as JSON")
    command("verify", _weights_verify, "check size and SHA-256 of every file that is here", weights)
    describe = command("hash", _weights_hash, "print a file's manifest entry", weights)
    describe.add_argument("file", type=Path)

    bench = command("bench", _bench, "measure seconds and peak memory per stage, growth with the grid, and ratios")
    bench.add_argument("--json", action="store_true", help="as JSON on stdout")
    bench.add_argument("--repeat", type=_positive, default=5, help="runs per figure, the median counts (default: 5)")
    bench.add_argument("--quick", action="store_true", help="only the stages of one person, without growth and ratios")
    _request_options(bench)
    return parser


def _request_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", default="people", help="model family (default: people)")
    parser.add_argument("--texture-size", type=int, choices=(512, 1024, 2048, 4096), default=1024, help="pixels")
    parser.add_argument("--faces", type=_positive, default=30000, help="face budget of a person (default: 30000)")
    parser.add_argument("--grid-resolution", type=_positive, default=256, help="cells along the height (default: 256)")
    parser.add_argument("--truncation-psi", type=float, default=0.7, help="0: the mean person, 1: full variety")
    parser.add_argument("--unwrap", choices=("atlas", "xatlas"), default="atlas",
                        help="atlas: at once; xatlas: slow, fewer pixels lost")  # fmt: skip
    parser.add_argument("--set", dest="parameters", type=_parameter, action="append", default=[], metavar="NAME=VALUE",
                        help="a family parameter; may be repeated")  # fmt: skip
    _device_option(parser)


def _device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"),
                        help="auto: the GPU if there is one (default: auto, or what the settings say)")  # fmt: skip


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**53:
        raise argparse.ArgumentTypeError("must be in 0..2^53-1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError("must be in 0..65535")
    return value


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("must look like NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _request(args: argparse.Namespace, seed: int) -> GenerateRequest:
    try:
        return GenerateRequest(
            family=args.family, seed=seed, truncation_psi=args.truncation_psi, parameters=dict(args.parameters),
            grid_resolution=args.grid_resolution, faces=args.faces, texture_size=args.texture_size, unwrap=args.unwrap,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise PopulaceError("invalid_request", f"{option}: {first['msg']}.", "See --help.") from None


def _demo(args: argparse.Namespace) -> None:
    from backend import demo

    demo.run(args.out, args.seed, args.family)


def _generate(args: argparse.Namespace) -> None:
    """In this process, without a server."""
    requests = [_request(args, args.seed + i) for i in range(args.count)]
    from backend import families, packet, pipeline
    from backend.progress import Progress

    families.info(args.family)
    args.out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        progress.show("loading the model", 0)
        settings = Settings.load(device=args.device)
        model = families.load(args.family, settings.device, settings)
        for i, request in enumerate(requests):
            who = f"person {i + 1} of {len(requests)}" if len(requests) > 1 else "person"
            asset, stats = pipeline.generate(
                request, model, lambda stage, f, i=i, who=who: progress.show(f"{who}: {stage}", (i + f) / len(requests))
            )
            path = _write(asset, args.out, f"person_{request.seed:06d}", args.format)
            if args.json:
                digest = hashlib.sha256(packet.dumps(asset)).hexdigest()
                line = {"seed": request.seed, "path": str(path), "packet_sha256": digest,
                        "parts": asset.meta["parts"], **asset.meta["attributes"], "stats": stats}  # fmt: skip
                print(json.dumps(line), flush=True)


def _write(asset: HumanAsset, out: Path, name: str, form: str) -> Path:
    from backend import packet

    if form == "obj":
        return packet.to_obj(asset, out / name)
    path = out / f"{name}.{form}"
    if form == "glb":
        packet.write_file(path, packet.to_glb(asset))
    else:
        from backend import studio

        studio.save_person(asset, path)
    return path


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

    path = addon.build(args.out)
    checked = addon.validate(path)
    print(path)
    print("Blender's validator finds no fault." if checked else "Not validated: no bpy module here.", file=sys.stderr)


def _weights_list(args: argparse.Namespace) -> None:
    from backend import weights

    data_dir = Settings.load().data_dir
    rows = []
    for manifest in weights.manifests():
        for file in manifest.files:
            path = manifest.location(file, data_dir)
            rows.append({"name": manifest.name, "title": manifest.title, "licence": manifest.licence,
                         "size": file.size, "sha256": file.sha256, "path": str(path), "here": path.is_file(),
                         "provenance": manifest.provenance})  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = "here" if row["here"] else "missing"
        print(f"{row['name']:<12} {row['size'] / 1e6:8.1f} MB  {state:<8} {row['licence']:<12} {row['path']}")
        print(f"{'':<12} {row['title']}. {row['provenance']}")


def _weights_verify(args: argparse.Namespace) -> None:
    from backend import weights

    data_dir = Settings.load().data_dir
    for manifest in weights.manifests():
        for file in manifest.files:
            path = weights.verify(manifest, file, data_dir, fresh=True)
            print(f"{manifest.name}: {path} is what the manifest says")


def _weights_hash(args: argparse.Namespace) -> None:
    from backend import weights

    print(weights.describe(args.file), end="")


def _bench(args: argparse.Namespace) -> None:
    request = _request(args, 0)
    from backend import bench

    report = bench.run(request, Settings.load(device=args.device), args.repeat, args.quick)
    print(json.dumps(report, indent=2) if args.json else bench.as_text(report))


if __name__ == "__main__":
    sys.exit(main())
