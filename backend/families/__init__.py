# SPDX-License-Identifier: GPL-3.0-or-later
"""Model families: one folder each. `base.py` is the contract; this registry lists the folders and loads a model.

A family's `__init__.py` imports no torch and holds `INFO: FamilyInfo`; its `model.py` holds
`load(device: torch.device, weights: backend.weights.Weights | None) -> FamilyModel`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from backend.protocol import PopulaceError

if TYPE_CHECKING:
    from backend.families.base import FamilyInfo, FamilyModel
    from backend.settings import Settings


@cache
def infos() -> tuple[FamilyInfo, ...]:
    """Every family that ships, the default first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    found = [importlib.import_module(f"{__name__}.{name}").INFO for name in names]
    return tuple(sorted(found, key=lambda info: info.name != "people"))


def info(name: str) -> FamilyInfo:
    """Raises `unknown_family` with the names that exist."""
    for found in infos():
        if found.name == name:
            return found
    raise PopulaceError(
        "unknown_family", f"There is no model family {name!r}.", f"Choose one of: {', '.join(i.name for i in infos())}."
    )


def check_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    """Raise `invalid_request` unless every parameter is one of the family's and fits its JSON schema.

    Of JSON schema the families use `type` (number, integer, string, boolean), `minimum`, `maximum` and `enum`.
    """
    schemas = info(name).parameters
    types = {"number": (int, float), "integer": (int,), "string": (str,), "boolean": (bool,)}
    for key, value in parameters.items():
        if key not in schemas:
            known = ", ".join(sorted(schemas)) or "none"
            raise PopulaceError(
                "invalid_request", f"The family {name!r} has no parameter {key!r}.", f"It has: {known}."
            )  # fmt: skip
        schema = schemas[key]
        allowed = types.get(schema.get("type", ""), (object,))
        fits = isinstance(value, allowed) and (isinstance(value, bool) == (allowed == (bool,)) or allowed == (object,))
        if fits and "enum" in schema:
            fits = value in schema["enum"]
        if fits and isinstance(value, (int, float)):
            fits = schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
        if not fits:
            limits = {k: v for k, v in schema.items() if k in ("type", "minimum", "maximum", "enum")}
            raise PopulaceError("invalid_request", f"Parameter {key!r} is out of its range.", f"It must fit {limits}.")


def of_decoding(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters of a request that the family's `decode` takes."""
    return {key: parameters[key] for key in info(name).of_decoding if key in parameters}


def resolve_device(device: str) -> str:
    """"auto" becomes "cuda" where there is one, else "cpu". Raises `no_gpu` when "cuda" is asked for in vain."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PopulaceError("no_gpu", "PyTorch finds no CUDA device on this machine.", "Use --device cpu.")
    return device


def load(name: str, device: str, settings: Settings) -> FamilyModel:
    """The family's model on `device`, weights verified first. Raises `unknown_family`, `no_gpu`, `weights_*`."""
    family = info(name)
    import torch

    from backend import weights

    device = resolve_device(device)
    checked = weights.locate(family.weights, settings.data_dir) if family.weights else None
    chosen = weights.replacements(settings.data_dir)
    for more in (*family.companions, *family.readers):
        used = weights.find(chosen.get(more, more), settings.data_dir)
        if checked is not None and used.is_here(settings.data_dir):
            checked = checked.with_more(weights.locate(more, settings.data_dir), more in family.companions)
    return importlib.import_module(f"{__name__}.{name}.model").load(torch.device(device), checked)
