# SPDX-License-Identifier: GPL-3.0-or-later
"""E3DGE (Lan et al. 2023): a photo of a face becomes codes of StyleSDF's frozen generator, and detail beyond them.

`generator.py` and `camera.py` are StyleSDF; `encoder.py` sees codes and pose in a photo; `local.py` adds what the codes
miss; `inversion.py` puts them together as the paper does; `looks.py` brings pictures back onto the surface, `face.py`
frames a face in a photo; `checkpoint.py` takes the authors' files in; `training.py` has the steps of their three
stages; `model.py` is the family.
"""

from __future__ import annotations

from backend.families.base import Attribute, Code, FamilyInfo

DIRECTIONS = {"smiling": "Smiling", "bangs": "Bangs", "no_beard": "No beard", "young": "Young",
              "eyeglasses": "Eyeglasses"}  # fmt: skip

INFO = FamilyInfo(
    name="e3dge",
    title="E3DGE",
    description="Heads from photos of faces by the authors' weights, which you fetch and import: face and hair as a "
    "camera in front sees them, no back of the head, no rig.",
    inputs=("seed", "image"),
    weights="e3dge",
    licence="weights for non-commercial use only (S-Lab 1.0, CC BY-NC-SA 4.0)",
    companions=("e3dge_pose", "e3dge_encoder", "e3dge_directions"),
    attributes=tuple(Attribute(name, title, "number", -3.0, 3.0) for name, title in DIRECTIONS.items()),
    codes={"body/shape": Code(0, rows=0), "body/tex": Code(0, rows=0), "body/edits": Code(len(DIRECTIONS)),
           "body/pose": Code(2)},
)  # fmt: skip
