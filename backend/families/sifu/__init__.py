# SPDX-License-Identifier: GPL-3.0-or-later
"""SIFU (Zhang et al. 2024): one photo -> a clothed person in the photo's pose. GTA, its elder sibling, is `gta`.

`transformer.py` and `networks.py` read like the papers; `prior.py` is the body that the networks are told of,
`views.py` its pictures, `query.py` what is read of a point; `surface.py` asks from coarse to fine; `pose.py` and
`fit.py` find the body in a photo and bend the surface; `stages.py` holds one network at a time; `person.py` is the
field, `model.py` the family; `training.py` makes weights.
"""

from __future__ import annotations

from backend.families.base import Code, FamilyInfo

CODES = {"body/shape": Code(0), "body/tex": Code(3)}
PARAMETERS = {
    "surface": {"type": "string", "enum": ["full", "official"], "title": "Surface",
                "description": "full: the finest lattice is asked; official: it is interpolated, as published"},
    "legacy_visibility": {"type": "boolean", "title": "Visibility as released",
                          "description": "of faces that overlap the farthest counts as seen, as in the released demo"},
    "legacy_side_normals": {"type": "boolean", "title": "Side normals as released",
                            "description": "colours of the body's sides as the released demo feeds them"},
}  # fmt: skip

INFO = FamilyInfo(
    name="sifu",
    title="SIFU",
    description="Reconstructs the person of one photo, clothes as they fall. What the photo shows is sharp, what it "
    "hides is guessed.",
    inputs=("image",),
    weights="sifu",
    licence="that of the weights: see populace weights list",
    companions=("sifu_normals",),
    parameters=PARAMETERS,
    of_decoding=tuple(PARAMETERS),
    codes=CODES,
)
