# SPDX-License-Identifier: GPL-3.0-or-later
"""Model families: one folder each. `base.py` is the contract; this registry lists the folders and loads a model.

A family's `__init__.py` imports no torch and holds `INFO: FamilyInfo`; its `model.py` holds
`load(device: torch.device, weights: backend.weights.Weights | None) -> FamilyModel`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

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


def load(name: str, device: str, settings: Settings) -> FamilyModel:
    """The family's model on `device`, its weights verified first. Raises `unknown_family` and `weights_*`."""
    family = info(name)
    import torch

    from backend import weights

    checked = weights.locate(family.weights, settings.data_dir) if family.weights else None
    return importlib.import_module(f"{__name__}.{name}.model").load(torch.device(device), checked)
