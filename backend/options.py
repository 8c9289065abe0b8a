# SPDX-License-Identifier: GPL-3.0-or-later
"""Command-line options that make up a request: a file or defaults, then what was typed, edits in the order typed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from backend.interchange import FORMATS, PRESETS, Format
from backend.protocol import MAX_LODS, GenerateRequest, PopulaceError, invalid, parse_json

_FIELDS = ("family", "seed", "truncation_psi", "prompt", "pose", "separate", "grid_resolution", "faces", "lods",
           "texture_size", "unwrap", "maps", "shape_keys")  # fmt: skip


def add_quality(parser: argparse.ArgumentParser) -> None:
    """What is made of whomever: family, sizes, device."""
    parser.add_argument("--family", help="model family (default: people)")
    parser.add_argument("--texture-size", type=int, choices=(512, 1024, 2048, 4096), help="pixels (default: 1024)")
    parser.add_argument("--faces", type=positive, help="face budget of a person (default: 30000)")
    parser.add_argument("--grid-resolution", type=positive, help="cells along the height (default: 256)")
    parser.add_argument("--truncation-psi", type=float, help="0: the mean person, 1: full variety (default: 0.7)")
    parser.add_argument("--unwrap", choices=("atlas", "xatlas"), help="atlas: at once; xatlas: slow, fewer pixels lost")
    _edit(
        parser, "--set", "NAME=VALUE", _setting, "an attribute (height_m=1.8, top_color=#a03020) or a family parameter"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"),
                        help="auto: the GPU if there is one (default: auto, or what the settings say)")  # fmt: skip


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Objects, levels of detail and pose."""
    parser.add_argument(
        "--separate", action="store_true", default=None, help="clothes and hair as objects of their own"
    )
    parser.add_argument("--lods", type=int, choices=range(1, MAX_LODS + 1), help="levels of detail (default: 1)")
    parser.add_argument("--pose", metavar="NAME", help="of the skeleton (default: rest)")
    parser.add_argument("--maps", choices=("pbr", "color"), help="color: no normal and roughness maps (default: pbr)")
    parser.add_argument("--shape-keys", type=_names, metavar="NAME,NAME",
                        help="shape keys NAME_min and NAME_max of numbers such as height_m, weight")  # fmt: skip


def add_formats(parser: argparse.ArgumentParser, text: str) -> None:
    """Which files, and for which engine."""
    parser.add_argument("--format", type=_formats, default=(), metavar="F[,F]", help=f"{text}: {', '.join(FORMATS)}")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="none", help="units, axes and bone names of the "
                        "files; it chooses the format if none is given. " + ". ".join(
                            f"{name}: {preset.title}" for name, preset in PRESETS.items()))  # fmt: skip


def add_output(parser: argparse.ArgumentParser) -> None:
    """What is written, and where."""
    add_shape(parser)
    add_formats(parser, "files of each person (default: glb)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder, made if needed (default: .)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per person on stdout")


def add_person(parser: argparse.ArgumentParser, with_seed: bool = True) -> None:
    """Who is made: seed, words, edits. Edits may be repeated and are applied in the order given."""
    if with_seed:
        parser.add_argument("--seed", type=seed, help="of the first person; the others follow (default: 0)")
    parser.add_argument("--request", metavar="FILE", help="a whole request as JSON (- is stdin); options overrule it")
    parser.add_argument("--prompt", metavar="TEXT", help='such as "tall old woman, red shirt, grey hair"')
    _edit(parser, "--mix", "SEED:AMOUNT", _mix, "go AMOUNT (0..1) of the way to another person")
    _edit(parser, "--vary", "SEED:AMOUNT", _vary, "vary this person by AMOUNT (0..1), another variation per seed")
    _edit(parser, "--part", "PART=SEED", _part, "take a part (top, hair, body, ...) from another person")
    _edit(parser, "--remove", "PART", lambda text: {"op": "remove", "parts": [text]}, "take a part off")
    _edit(parser, "--retexture", "SEED", _retexture, "other looks on the same geometry")


def add_photos(parser: argparse.ArgumentParser) -> None:
    """How a person is made from photos."""
    parser.add_argument("--mask", type=Path, action="append", default=[], metavar="FILE", help="a picture per photo, "
                        "white where the person is, in the order of the photos")  # fmt: skip
    parser.add_argument("--person", type=int, default=0, metavar="I", help="which person of the photos, counted from "
                        "the left from 0 on (default: 0)")  # fmt: skip
    parser.add_argument("--steps", dest="inversion_steps", type=int, metavar="N",
                        help="of the fit; 0: what the encoder sees at first glance (default: 60)")  # fmt: skip
    parser.add_argument("--seconds", dest="inversion_seconds", type=float, metavar="S",
                        help="end the fit after S seconds; the result then depends on the machine")  # fmt: skip
    for name, text in (("texture", "do not keep what the photos show as they show it"),
                       ("delight", "leave the photos' light and shade in the colours"),
                       ("symmetric", "do not let the side that is seen tell of the hidden one")):  # fmt: skip
        parser.add_argument(f"--no-{name}", dest=f"inversion_{name}", action="store_false", default=None, help=text)
    parser.add_argument("--refine", dest="inversion_refine", choices=("none", "diffusion"),
                        help="of the hidden side (default: none)")  # fmt: skip


def inversion_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was typed of it."""
    named = {name.removeprefix("inversion_"): value for name, value in vars(args).items()
             if name.startswith("inversion_")}  # fmt: skip
    return {name: value for name, value in named.items() if value is not None}


def request_of(args: argparse.Namespace, **changes: Any) -> GenerateRequest:
    """The request that the options ask for. Raises `invalid_request`, naming the option."""
    from backend import families

    typed = {name: getattr(args, name) for name in _FIELDS if getattr(args, name, None) is not None}
    raw = {**_read(getattr(args, "request", None)), **typed, **changes}
    edits, parameters = [], {}
    known = {a.name: a for a in families.info(str(raw.get("family", "people"))).attributes}
    for edit in args.edits:
        if edit["op"] == "set":
            ((name, value),) = edit["values"].items()
            if name not in known:
                parameters[name] = value
                continue
            edit = {"op": "set", "values": {name: _color(name, value) if known[name].kind == "color" else value}}
        elif "other" in edit and "truncation_psi" in raw:
            edit = edit | {"other": edit["other"] | {"truncation_psi": raw["truncation_psi"]}}
        edits.append(edit)
    try:
        first = GenerateRequest.model_validate(raw)
        return GenerateRequest.model_validate(
            {**raw, "edits": [*raw.get("edits", ()), *edits], "parameters": first.parameters | parameters}
        )
    except ValidationError as error:
        found = error.errors()[0]
        if found["loc"] and found["loc"][0] in typed:
            option = "--" + str(found["loc"][0]).replace("_", "-")
            raise PopulaceError("invalid_request", f"{option}: {found['msg']}.", "See --help.") from None
        raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None


def _read(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise PopulaceError("invalid_request", f"--request {name}: {error.strerror}.", "Name a JSON file.") from None
    raw = parse_json(data)
    if not isinstance(raw, dict):
        raise PopulaceError("invalid_request", "The request is not a JSON object.", 'Write one such as {"seed": 7}.')
    return raw


def _edit(parser: argparse.ArgumentParser, flag: str, metavar: str, make: Callable[[str], Any], text: str) -> None:
    """All edits go to one list, so that their order is the one typed."""
    parser.add_argument(flag, dest="edits", action="append", default=[], type=make, metavar=metavar, help=text)


def _mix(text: str) -> dict[str, Any]:
    other, amount = _pair(text, ":", "SEED:AMOUNT")
    return {"op": "mix", "other": {"seed": seed(other)}, "amount": float(amount)}


def _vary(text: str) -> dict[str, Any]:
    other, amount = _pair(text, ":", "SEED:AMOUNT")
    return {"op": "vary", "seed": seed(other), "amount": float(amount)}


def _part(text: str) -> dict[str, Any]:
    part, other = _pair(text, "=", "PART=SEED")
    return {"op": "part", "parts": [part], "other": {"seed": seed(other)}}


def _retexture(text: str) -> dict[str, Any]:
    return {"op": "reroll", "seed": seed(text), "kinds": ["tex"]}


def _setting(text: str) -> dict[str, Any]:
    name, value = _pair(text, "=", "NAME=VALUE")
    try:
        return {"op": "set", "values": {name: json.loads(value)}}
    except json.JSONDecodeError:
        return {"op": "set", "values": {name: value}}


def _color(name: str, value: Any) -> Any:
    """#rrggbb, a colour's name, or three numbers."""
    if not isinstance(value, str):
        return value
    from backend import words

    rgb = words.color(value.lower())
    if rgb is None:
        raise PopulaceError("invalid_request", f"--set {name}: that is no colour.",
                            "Give #rrggbb, a CSS name such as teal, or [r,g,b] in 0..1.")  # fmt: skip
    return list(rgb)


def _pair(text: str, separator: str, form: str) -> tuple[str, str]:
    first, found, second = text.partition(separator)
    if not (first and found and second):
        raise argparse.ArgumentTypeError(f"must look like {form}")
    return first, second


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**53:
        raise argparse.ArgumentTypeError("must be in 0..2^53-1")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def kinds(text: str) -> list[str]:
    found = text.split(",")
    if not found or not set(found) <= {"shape", "tex"} or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError("must be shape, tex or shape,tex")
    return found


def _formats(text: str) -> tuple[Format, ...]:
    found = tuple(form for form in FORMATS if form in text.split(","))
    if len(found) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(FORMATS)}, each once")
    return found
