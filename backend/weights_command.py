# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace weights ...`: what there is, its licence, download, import, use and removal."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend import weight_files, weights
from backend.progress import Progress
from backend.protocol import PopulaceError
from backend.settings import Settings
from backend.weights import Manifest, WeightFile

CHECKPOINTS = ("get3d", "get3dhuman", "e3dge", "sifu", "gta")


def add_commands(command: Any, parser: argparse.ArgumentParser) -> None:
    """`command(name, run, text, parent)` makes a subcommand."""
    parser.add_argument("--leash", action="store_true",
                        help="for programs: end when stdin closes, say the outcome as a JSON line")  # fmt: skip
    group = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = command("list", _told(_list), "show which weights there are, and whether they are here", group)
    listing.add_argument("--json", action="store_true", help="as JSON")
    command("verify", _verify, "check size and SHA-256 of every file that is here", group)
    describe = command("hash", _hash, "print a file's manifest entry", group)
    describe.add_argument("file", type=Path)
    licence = command("licence", _licence, "print what has to be accepted before a download", group)
    licence.add_argument("name")
    accept = command("accept", _accept, "accept the licence; recorded with its date and hash", group)
    accept.add_argument("name")
    accept.add_argument("--yes", action="store_true", help="do not ask")
    fetch = command("fetch", _told(_fetch), "download weights, go on where it stopped, check SHA-256", group)
    fetch.add_argument("name")
    fetch.add_argument("--yes", action="store_true", help="accept the licence and the download without being asked")
    bring = command("import", _told(_import), "take in a safetensors file, or a family's official checkpoint", group)
    bring.add_argument("family", nargs="?", choices=CHECKPOINTS, help="whose authors published the file")
    bring.add_argument("files", type=Path, nargs="+", metavar="FILE", help="with a family also several, one by one")
    bring.add_argument("--own", action="store_true", help="a checkpoint of your own training, of other sizes")
    bring.add_argument("--name", help="of weights that this version knows, or one of your own; for safetensors")
    bring.add_argument("--licence", default="unknown", help="SPDX id or name, for the record")
    use = command("use", _told(_use), "use weights in place of others", group)
    use.add_argument("name")
    use.add_argument("--for", dest="in_place_of", default="people", help="a family's weights (default: people)")
    remove = command("remove", _told(_remove), "delete downloaded or imported weights", group)
    remove.add_argument("name")


def _told(run: Callable[[argparse.Namespace], dict[str, Any]]) -> Callable[[argparse.Namespace], int]:
    """With --leash the result is also said as a JSON line, an error as well; other lines are for people."""

    def call(args: argparse.Namespace) -> int:
        if args.leash:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        try:
            result = run(args)
        except PopulaceError as error:
            if args.leash:
                _say("error", code=error.code, message=error.message, hint=error.hint)
            raise
        if args.leash:
            _say("done", result=result)
        return 0

    return call


def _list(args: argparse.Namespace) -> dict[str, Any]:
    data_dir = Settings.load().data_dir
    used = weights.replacements(data_dir)
    rows = []
    for manifest in weights.manifests(data_dir=data_dir):
        missing = WeightFile("", 0, "", manifest.obtain)
        for file in manifest.files or (missing,):
            path = manifest.location(file, data_dir)
            rows.append({
                "name": manifest.name, "title": manifest.title, "licence": manifest.licence,
                "licence_url": manifest.licence_url, "licence_text": weight_files.licence_text(manifest),
                "accepted": weight_files.is_accepted(manifest, data_dir), "size": file.size, "sha256": file.sha256,
                "path": str(path), "here": path.is_file(), "provenance": manifest.provenance,
                "source": "embedded" if manifest.embedded else "imported" if manifest.imported else file.repository,
                "used_for": [old for old, new in used.items() if new == manifest.name],
            })  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))
    for row in rows if not (args.json or args.leash) else ():
        state = "here" if row["here"] else "missing"
        print(f"{row['name']:<12} {row['size'] / 1e6:8.1f} MB  {state:<8} {row['licence']:<12} {row['path']}")
        used_for = f" Used for {', '.join(row['used_for'])}." if row["used_for"] else ""
        obtain = f" {row['source']}" if not row["size"] else ""
        print(f"{'':<12} {row['title']}. {row['provenance']}{used_for}{obtain}")
    return {"weights": rows}


def _verify(args: argparse.Namespace) -> None:
    data_dir = Settings.load().data_dir
    for manifest in weights.manifests(data_dir=data_dir):
        for file in manifest.files:
            if manifest.embedded or manifest.location(file, data_dir).is_file():
                path = weights.verify(manifest, file, data_dir, fresh=True)
                print(f"{manifest.name}: {path} is what the manifest says")


def _hash(args: argparse.Namespace) -> None:
    print(weights.describe(args.file), end="")


def _licence(args: argparse.Namespace) -> None:
    print(weight_files.licence_text(weights.find(args.name, Settings.load().data_dir)))


def _accept(args: argparse.Namespace) -> None:
    data_dir = Settings.load().data_dir
    manifest = weights.find(args.name, data_dir)
    _ask_licence(manifest, args.yes)
    weight_files.accept(manifest, data_dir)
    print(f"Accepted: {manifest.licence} for {manifest.name}")


def _fetch(args: argparse.Namespace) -> dict[str, Any]:
    loaded = _fetch_now(args)
    print(f"{args.name}: {loaded / 1e6:.1f} MB loaded, all files are here and verified")
    return {"name": args.name, "bytes": loaded}


def _fetch_now(args: argparse.Namespace) -> int:
    data_dir = Settings.load().data_dir
    manifest = weights.find(args.name, data_dir)
    if not weight_files.is_accepted(manifest, data_dir):
        _ask_licence(manifest, args.yes)
        weight_files.accept(manifest, data_dir)
    elif not (args.yes or manifest.is_here(data_dir)):
        _ask(f"Download {manifest.size / 1e6:.0f} MB from {manifest.files[0].repository}?")
    with Progress(plain=not args.leash) as progress:

        def step(name: str, fraction: float) -> None:
            progress.show(f"fetching {name}", fraction)
            if args.leash:
                text = f"{fraction * manifest.size / 1e6:.0f} of {manifest.size / 1e6:.0f} MB"
                _say("progress", stage=f"Downloading {name}", fraction=round(fraction, 4), text=text)

        return weight_files.fetch(manifest, data_dir, step)


def _ask_licence(manifest: Manifest, agreed: bool) -> None:
    if agreed:
        return
    print(weight_files.licence_text(manifest), file=sys.stderr)
    size = "" if manifest.imported else f" and download {manifest.size / 1e6:.0f} MB if asked to"
    _ask(f"Accept the licence of {manifest.name} ({manifest.licence}){size}?")


def _ask(question: str) -> None:
    """Raise `invalid_request` unless a person says yes."""
    if not sys.stdin.isatty():
        raise PopulaceError("invalid_request", "Nobody is there to agree.", "Give --yes to agree without being asked.")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise PopulaceError("cancelled", "Not agreed: nothing was downloaded.")


def _end_with_stdin() -> None:
    """Whoever started us has gone, or wants us to stop: what is loaded so far is kept for the next time."""
    os.read(sys.stdin.fileno(), 1)
    _say("cancelled")
    os._exit(3)


def _say(event: str, **what: Any) -> None:
    print(json.dumps({"event": event, **what}), flush=True)


def _import(args: argparse.Namespace) -> dict[str, Any]:
    data_dir = Settings.load().data_dir
    if args.family:
        made = [weight_files.import_checkpoint(args.family, file, data_dir, args.own) for file in args.files]
        for manifest in made:
            print(f"{manifest.name}: {manifest.size / 1e6:.1f} MB imported ({manifest.licence}). {manifest.provenance}")
        return {"name": made[-1].name, "bytes": sum(manifest.size for manifest in made)}
    if not args.name:
        raise PopulaceError("invalid_request", "--name is missing.",
                            f"Give a name, or the family of an official file: {', '.join(CHECKPOINTS)}.")  # fmt: skip
    manifest = weight_files.import_file(args.files[0], args.name, args.licence, data_dir)
    print(f"{manifest.name}: {manifest.size / 1e6:.1f} MB imported; to use it: populace weights use {manifest.name}")
    return {"name": manifest.name, "bytes": manifest.size}


def _use(args: argparse.Namespace) -> dict[str, Any]:
    weight_files.use(args.name, args.in_place_of, Settings.load().data_dir)
    print(f"{args.in_place_of} uses {args.name}; it takes effect when the generator starts the next time")
    return {"name": args.name}


def _remove(args: argparse.Namespace) -> dict[str, Any]:
    freed = weight_files.remove(args.name, Settings.load().data_dir)
    print(f"{args.name}: {freed / 1e6:.1f} MB freed")
    return {"name": args.name, "freed_bytes": freed}
