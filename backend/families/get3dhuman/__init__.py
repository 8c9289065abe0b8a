# SPDX-License-Identifier: GPL-3.0-or-later
"""Get3DHuman (Xiong et al. 2023): clothed standing people from two codes, one for shape and one for texture.

`networks.py` reads like the paper; `config.py` knows the space; `reading.py` makes the decoders fast for one person;
`tracer.py` looks at a field from a side; `colors.py` brings two refined views back onto it; `model.py` is the family.
"""

from __future__ import annotations

from backend.families.base import Code, FamilyInfo

INFO = FamilyInfo(
    name="get3dhuman",
    title="Get3DHuman",
    description="Clothed standing people by the authors' weights, which you fetch and import. Front and back are "
    "sharp, sides smooth; a new texture on the same shape follows its clothes only roughly.",
    inputs=("seed", "image"),
    weights="get3dhuman",
    licence="research use only, as long as the authors do not say otherwise",
    companions=("get3dhuman_refine",),
    parameters={
        "look": {"type": "string", "enum": ["blend", "published", "field"], "title": "Look",
                 "description": "blend: front and back view over the field's colours; published: every point as the "
                 "nearest one that a view saw; field: no views. Without the refine net always field"},
    },
    of_decoding=("look",),
    codes={"body/shape": Code(512, normal=True, rows=0), "body/tex": Code(512, normal=True, rows=0)},
)  # fmt: skip
