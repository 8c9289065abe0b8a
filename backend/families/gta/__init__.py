# SPDX-License-Identifier: GPL-3.0-or-later
"""GTA (Zhang et al. 2023): one photo -> a clothed person in the photo's pose, by three planes that learned questions
ask for. Everything is in `backend.families.sifu`, whose networks have both; this folder is GTA's entry in the registry.
"""

from __future__ import annotations

from backend.families.base import FamilyInfo
from backend.families.sifu import CODES, PARAMETERS

INFO = FamilyInfo(
    name="gta",
    title="GTA",
    description="Reconstructs the person of one photo by the authors' weights, which you fetch and import. SIFU is "
    "its successor.",
    inputs=("image",),
    weights="gta",
    licence="non-commercial research only",
    companions=("gta_normals",),
    parameters=PARAMETERS,
    of_decoding=tuple(PARAMETERS),
    codes=CODES,
)
