# SPDX-License-Identifier: GPL-3.0-or-later
"""Python to paste: the line that does again what a button did. Pure Python: no bpy.

`last` keeps the newest lines, so that also what a slider did can be copied.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from .messages import Request

KEPT: Final = 20
last: deque[str] = deque(maxlen=KEPT)
"""Newest last."""


def call(idname: str, arguments: Mapping[str, Any]) -> str:
    """Such as `bpy.ops.populace.mix(amount=0.5, wait=True)`. Runs in the text editor and in `blender -b`.

    `idname` may also be what Blender makes of it in registered classes: POPULACE_OT_mix."""
    idname = idname.replace("_OT_", ".").lower()
    inside = ", ".join(f"{name}={_literal(value)}" for name, value in {**arguments, "wait": True}.items())
    return f"bpy.ops.{idname}({inside})"


def note(idname: str, arguments: Mapping[str, Any]) -> None:
    """Something was done; the same twice in a row is kept once."""
    line = call(idname, arguments)
    if not last or last[-1] != line:
        last.append(line)


def script(*lines: str) -> str:
    return "\n".join(("import bpy", "", *lines, ""))


def person(request: Request, with_rig: bool) -> str:
    """The very person, by the operator that makes people."""
    asked = {"family": request.family, "seed": request.seed, "latents": json.dumps(request.latents),
             "pose": request.pose, "faces": request.faces, "lods": request.lods, "maps": request.maps,
             "texture_size": str(request.texture_size), "separate": request.separate, "with_rig": with_rig,
             "grid_resolution": request.grid_resolution, "shape_keys": ", ".join(request.shape_keys)}  # fmt: skip
    for name in ("latent_maps", "joint_rotations"):
        if told := getattr(request, name):
            asked[name] = json.dumps(told)
    return call("populace.generate", asked)


def client_script(request: Request, package: str) -> str:
    """The person by the client, for scripts that want arrays and no object."""
    changed = {name: value for name, value in request.to_json().items() if value != Request().to_json()[name]}
    inside = ", ".join(f"{name}={_literal(value)}" for name, value in changed.items())
    return f"from {package}.client import Client\n\nhuman = Client().generate({inside})\n"


def _literal(value: Any) -> str:
    if isinstance(value, float):
        return repr(round(value, 6))
    return repr(value)


def values(attributes: Mapping[str, Any]) -> str:
    """Attributes as the operators take them: JSON in one string, numbers short."""
    return json.dumps({name: _short(value) for name, value in attributes.items()}, sort_keys=True)


def _short(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_short(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value
