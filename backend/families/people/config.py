# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes of the `people` family. Lengths are metres in canonical space (see `canonical` in the training package)."""

from __future__ import annotations

from dataclasses import dataclass

from backend.networks.volumes import Side, Volume, six_sides

CODE_DIM = 32  # numbers of the codes of parts
BODY_DIM = 64  # w_shape of the body
SKIN_DIM = 74  # w_tex of the body
Z_DIM = 8  # z per part and kind; the body's shape has BODY_DIM

PARTS = ("shoes", "bottom", "top", "hair", "accessory")  # inner to outer: a part hides those before it
ORDER = ("hair", "top", "bottom", "shoes", "accessory")  # in which they are chosen: later ones go with the top's colour
CLOTH = ("top", "bottom")  # parts that may be cut from the body's own surface

# --- what the numbers of a code mean ----------------------------------------------------------------------------------
# body/tex:   palette (skin, brows), then shares of the kit's skins, brows and irises
SKIN = slice(6, 38)
BROW = slice(38, 58)
IRIS = slice(58, 74)
# part/shape: weights of the items from 0 on ("cut" last), trims, thickness, looseness, worn
TRIM = slice(24, 28)
THICK, LOOSE, WORN = 28, 29, 31  # in centimetres, in 5 cm per metre of height, > 0
# part/tex:   palette (primary, secondary), then one of: the item's own colours, a pattern, plain; pattern scale
OWN, PLAIN = 6, 12
PATTERN = slice(7, 12)
SCALE = 13

# roughness where nothing else is known
ROUGHNESS = {"body": 0.5, "shoes": 0.4, "bottom": 0.85, "top": 0.85, "hair": 0.45, "accessory": 0.75}
WET = 0.08  # of eyeballs
LASHES = (0.05, 0.035, 0.03)  # sRGB

MAX_ITEMS = TRIM.start


@dataclass(frozen=True)
class Grids:
    """Where a part's distances live, and how fine."""

    volume: Volume
    step: float  # of the surface
    edge_step: float  # of the distance to the borders, which is smoother


@dataclass(frozen=True)
class Colors:
    """Where a part's colours live, and how fine."""

    volume: Volume
    tone: tuple[Side, ...]  # light and dark
    hue: tuple[Side, ...]  # what tone times palette leaves of the kit's own colours


@dataclass(frozen=True)
class Size:
    """One size of the family; volumes coarse to fine."""

    body: tuple[tuple[Volume, float], ...]  # coarse to fine
    guide: tuple[tuple[Volume, float], ...]
    shape: dict[str, tuple[Grids, ...]]
    tex: dict[str, tuple[Colors, ...]]
    face: tuple[Side, ...]
    front: float
    gloss: float  # texels of the face's roughness
    skin: float  # texels of the rest of the body
    arm: float
    eye: float
    brow: float
    width: int  # of the mapping networks


_ARM_AXES = ((0.543, -0.682, 0.487), (0.782, 0.623, 0.0), (-0.303, 0.381, 0.872))
# boxes of mirrored volumes reach a little over the middle, where their weight must not fall
HEAD = Volume("head", (0.0, 1.335, 0.02), (0.18, 0.41, 0.20))  # long hair hangs below the chest
HAT = Volume("hat", (0.0, 1.64, 0.05), (0.19, 0.14, 0.23))
SCALP = Volume("scalp", (0.0, 1.565, 0.02), (0.13, 0.165, 0.165))
FACE = Volume("face", (0.045, 1.545, 0.04), (0.075, 0.165, 0.16), mirror=True)
FRONT = Volume("front", (0.0, 1.545, 0.09), (0.082, 0.125, 0.085))  # what is seen of a face from before it
EYES = Volume("eyes", (0.034, 1.563, 0.118), (0.036, 0.03, 0.035), mirror=True)
BROWS = Volume("brows", (0.035, 1.58, 0.11), (0.05, 0.03, 0.06), mirror=True)
TORSO = Volume("torso", (0.0, 1.13, 0.05), (0.33, 0.42, 0.24))
TORSO_HALF = Volume("torso", (0.145, 1.13, 0.05), (0.185, 0.42, 0.24), mirror=True)
ARM = Volume("arm", (0.335, 1.135, 0.13), (0.42, 0.15, 0.18), _ARM_AXES, mirror=True)
LEGS = Volume("legs", (0.145, 0.52, 0.03), (0.195, 0.56, 0.21), mirror=True)
FOOT = Volume("foot", (0.145, 0.11, 0.08), (0.135, 0.16, 0.18), mirror=True)
# of the naked body's distance and of the direction that it faces
BODY = Volume("body", (0.27, 0.844, 0.128), (0.32, 0.894, 0.275), mirror=True)
SKULL = Volume("skull", (0.04, 1.5505, 0.03), (0.09, 0.1665, 0.17), mirror=True)
HAND = Volume("hand", (0.4587, 1.0408, 0.195), (0.0905, 0.14, 0.169), mirror=True)
WHOLE = Volume("whole", (0.28, 0.85, 0.12), (0.33, 0.92, 0.28), mirror=True)


def _size(scale: float, width: int) -> Size:
    """All lengths times `scale`."""

    def grids(volume: Volume, step: float) -> Grids:
        return Grids(volume, step * scale, 2.2 * step * scale)

    def colors(volume: Volume, texel: float) -> Colors:
        return Colors(volume, six_sides(texel * scale), six_sides(2.5 * texel * scale))

    side = 0.002 * scale
    return Size(
        body=((BODY, 0.008), (SKULL, 0.0028), (HAND, 0.0026)),  # not scaled: a tiny hand is no hand
        guide=((BODY, 0.016), (SKULL, 0.007)),
        shape={
            "hair": (grids(HEAD, 0.0065), grids(SCALP, 0.0033)),
            "top": (grids(TORSO_HALF, 0.0055), grids(ARM, 0.006)),
            "bottom": (grids(TORSO_HALF, 0.009), grids(LEGS, 0.006)),
            "shoes": (grids(FOOT, 0.004),),
            "accessory": (grids(HAT, 0.004),),
        },
        tex={
            "hair": (Colors(HEAD, six_sides(0.0018 * scale), six_sides(0.02 * scale)),),  # recoloured always
            "top": (colors(TORSO, 0.0032), colors(ARM, 0.004)),
            "bottom": (colors(TORSO, 0.006), colors(LEGS, 0.0035)),
            "shoes": (colors(FOOT, 0.002),),
            "accessory": (colors(HAT, 0.003),),
        },
        face=(Side(2, 1, side), Side(0, 1, side), Side(2, -1, 3 * side), Side(1, 1, 2 * side), Side(1, -1, 2 * side)),
        front=0.0008 * scale, gloss=0.002 * scale,
        skin=0.008 * scale, arm=0.005 * scale, eye=0.00035 * scale, brow=0.0006 * scale, width=width,
    )  # fmt: skip


SIZES = {"tiny": _size(5.0, 16), "small": _size(1.0, 128), "base": _size(0.8, 256)}
