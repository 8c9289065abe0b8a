# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D (Gao et al. 2022): textured meshes of any topology from two codes, one for shape and one for texture.

`networks.py` reads like the paper; `fields.py` reads planes and volumes at points, `volume.py` is the separate
generator's geometry, `dmtet.py` makes meshes as in training, `discriminator.py` holds the critics, `checkpoint.py`
takes official files in, and `model.py` is the family on the main road.
"""

from __future__ import annotations

from backend.families.base import Attribute, Code, FamilyInfo

_ROW = {"type": "integer", "minimum": 0, "maximum": 64}

INFO = FamilyInfo(
    name="get3d",
    title="GET3D",
    description="Textured objects of one kind (cars, chairs, motorbikes, tables) by the authors' weights, which you "
    "fetch and import. Another texture code leaves the shape alone; another shape code also changes colours a little.",
    inputs=("seed", "image"),
    weights="get3d",
    readers=("clip",),
    licence="weights CC-BY-NC-SA-4.0: not for commercial use",
    parameters={
        "style_seed": {"type": "integer", "minimum": 0, "maximum": 2**53 - 1, "title": "Style seed",
                       "description": "Whose style is mixed in, from the rows on that follow"},
        "style_shape_row": {**_ROW, "title": "Shape row",
                            "description": "First row of the shape code that is the other's: early rows are coarse"},
        "style_tex_row": {**_ROW, "title": "Texture row",
                          "description": "First row of the texture code that is the other's"},
        "surface": {"type": "string", "enum": ["dmtet", "flexicubes"], "title": "Surface",
                    "description": "How fields become triangles; else as in the weights' training"},
    },
    of_decoding=("surface",),
    attributes=(Attribute("height_m", "Height", "number", 0.05, 10.0, "m"),),
    codes={"body/shape": Code(0, rows=0), "body/tex": Code(0, rows=0), "body/size": Code(1)},
)  # fmt: skip
