# SPDX-License-Identifier: GPL-3.0-or-later
"""The English that `words` knows, as tables. Words are given in the singular, lower case, without hyphens."""

from __future__ import annotations

from PIL import ImageColor


def _table(text: str) -> dict[str, str]:
    """`A: b, c; D: e` -> {"b": "A", "c": "A", "e": "D"}"""
    rows = (row.partition(":") for row in text.split(";"))
    return {word.strip(): key.strip() for key, _, words in rows for word in words.split(",")}


NEUTRAL = {"age_years": 45.0, "weight": 0.5, "muscle": 0.5, "skin_tone": 0.5, "sex": 0.5}
HEIGHT_M = (1.63, 1.77)  # mean of women and of men; the neutral height lies between, by sex

# Word: what it moves, from neutral. Degrees multiply it.
MOVES: dict[str, dict[str, float]] = {
    "tall": {"height_m": 0.11}, "short": {"height_m": -0.11}, "small": {"height_m": -0.08}, "tiny": {"height_m": -0.15},
    "big": {"height_m": 0.06, "weight": 0.2}, "petite": {"height_m": -0.09, "weight": -0.15},
    "lanky": {"height_m": 0.09, "weight": -0.25}, "stocky": {"height_m": -0.05, "weight": 0.2},
    "old": {"age_years": 27}, "elderly": {"age_years": 33}, "senior": {"age_years": 25}, "aged": {"age_years": 27},
    "middle aged": {"age_years": 4}, "mature": {"age_years": 10}, "young": {"age_years": -17},
    "youthful": {"age_years": -15}, "ancient": {"age_years": 45},
    "overweight": {"weight": 0.3}, "heavy": {"weight": 0.3}, "fat": {"weight": 0.38}, "obese": {"weight": 0.48},
    "chubby": {"weight": 0.25}, "plump": {"weight": 0.25}, "corpulent": {"weight": 0.38}, "curvy": {"weight": 0.15},
    "slim": {"weight": -0.28}, "slender": {"weight": -0.28}, "thin": {"weight": -0.32}, "skinny": {"weight": -0.42},
    "lean": {"weight": -0.25}, "underweight": {"weight": -0.42}, "bony": {"weight": -0.42},
    "muscular": {"muscle": 0.35}, "athletic": {"muscle": 0.25}, "strong": {"muscle": 0.3}, "fit": {"muscle": 0.2},
    "toned": {"muscle": 0.2}, "buff": {"muscle": 0.42}, "brawny": {"muscle": 0.4, "weight": 0.1},
    "weak": {"muscle": -0.35}, "frail": {"muscle": -0.35, "weight": -0.25}, "sporty": {"muscle": 0.2},
    "bodybuilder": {"muscle": 0.5}, "athlete": {"muscle": 0.3},
    "tanned": {"skin_tone": -0.05}, "masculine": {"sex": 0.3}, "feminine": {"sex": -0.3}, "androgynous": {"sex": 0.0},
    **{word: {"sex": 0.5} for word in ("man", "men", "male", "guy", "gentleman", "he", "his", "him", "father", "boy")},
    **{word: {"sex": -0.5} for word in ("woman", "women", "female", "lady", "she", "her", "mother", "girl")},
    "grandfather": {"sex": 0.5, "age_years": 29}, "grandpa": {"sex": 0.5, "age_years": 29},
    "grandmother": {"sex": -0.5, "age_years": 29}, "granny": {"sex": -0.5, "age_years": 29},
}  # fmt: skip
SUBJECTS = {w for w, m in MOVES.items() if abs(m.get("sex", 0)) == 0.5} - {"male", "female", "his", "her", "him"}
SUBJECTS |= {"person", "human", "adult", "people", "individual", "somebody", "someone", "one"}
SKIN = {"black": 0.45, "dark": 0.35, "brown": 0.15, "olive": -0.1, "tan": -0.05, "medium": 0.0, "light": -0.35,
        "fair": -0.38, "white": -0.4, "pale": -0.43}  # of skin, and of "a black man"  # fmt: skip

DEGREES = {
    "slightly": 0.5, "bit": 0.5, "little": 0.5, "somewhat": 0.7, "moderately": 0.7, "rather": 0.9, "fairly": 0.9,
    "quite": 1.0, "very": 1.5, "really": 1.5, "much": 1.5, "highly": 1.5, "extremely": 2.0, "super": 2.0,
    "enormously": 2.0, "exceptionally": 2.0, "incredibly": 2.0,
}  # fmt: skip
NEGATIONS = {"no", "not", "without", "never", "lacking", "lacks", "minus", "doesn't", "isn't", "don't", "aren't"}
HARD = set(",;.:!?/&+()") | {"and", "but", "then", "plus"}  # end what was said of one thing
SOFT = {"with", "in", "wearing", "wears", "has", "having", "who", "dressed", "without"}  # what follows is another thing
STOP = {
    "a", "an", "the", "is", "are", "be", "am", "of", "to", "on", "at", "it", "its", "their", "they", "them", "this",
    "that", "than", "as", "also", "for", "by", "from", "some", "any", "pair", "wear", "looks", "looking", "made",
    "normal", "average", "regular", "height", "age", "weight", "build", "tone", "body", "coloured", "colored",
}  # fmt: skip
SHADES = {"light", "dark", "pale", "bright", "deep", "pastel", "vivid", "fair", "medium"}
LENGTHS = {"long", "short"}

# Part: word: choice. The empty choice is the part as such. Choices of a family are words of their own besides.
PARTS = {
    "hair": _table(": hair, haired, hairstyle, hairdo, haircut; bob: bob; ponytail: ponytail, pony tail;"
                   "braid: braid, plait, braided; afro: afro; none: bald, baldheaded"),
    "eye": _table(": eye, eyed"),
    "skin": _table(": skin, skinned, complexion"),
    "top": _table(": top; t shirt: t shirt, tshirt, tee; shirt: shirt; sweater: sweater, jumper, pullover, sweatshirt;"
                  "blouse: blouse; jacket: jacket; suit jacket: suit jacket, blazer, suit; coat: coat, overcoat;"
                  "hoodie: hoodie; cardigan: cardigan; vest: vest, waistcoat; none: topless, bare chested"),
    "bottom": _table(": bottom; trouser: trouser, pant, slack, chino; jeans: jean, denim; short: shorts;"
                     "skirt: skirt; overall: overall, dungaree; legging: legging"),
    "shoes": _table(": shoe, footwear; sneaker: sneaker, trainer; boot: boot; sandal: sandal; heel: heel;"
                    "loafer: loafer; none: barefoot, barefooted"),
    "accessory": _table(": accessory; hat: hat, headgear; cap: cap; none: bareheaded"),
}  # fmt: skip

_EXTRA = {
    "burgundy": "#6d1a36", "wine": "#6d1a36", "scarlet": "#c8102e", "cream": "#f5eed6", "mustard": "#c99a2e",
    "charcoal": "#36393d", "denim": "#3b5578", "camel": "#b58b5a", "mint": "#a6dcc0", "rose": "#d98695",
    "lilac": "#b59bcb", "peach": "#f5c0a0", "emerald": "#1f8a5b", "terracotta": "#c0603f", "off white": "#f2efe6",
    "brown": "#6b4423", "rust": "#a5502b", "sand": "#d3bf96", "mauve": "#9c7a93", "petrol": "#1f5565",
    "taupe": "#837566", "anthracite": "#33383d", "golden": "#d9a520",
    "cherry": "#a8142e", "ochre": "#c58a2c",
}  # fmt: skip
COLORS = {
    name: (rgb[0] / 255, rgb[1] / 255, rgb[2] / 255)
    for name, rgb in ((name, ImageColor.getrgb(value)) for name, value in {**ImageColor.colormap, **_EXTRA}.items())
}
HUES = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black", "grey", "gray"}
PLAIN_SHADES = {"dark": (0.13, 0.13, 0.15), "light": (0.86, 0.85, 0.82)}  # "dark trousers"

HAIR_COLORS = {
    "black": (0.05, 0.04, 0.04), "brown": (0.23, 0.14, 0.09), "blond": (0.72, 0.56, 0.34), "red": (0.48, 0.18, 0.08),
    "grey": (0.56, 0.55, 0.54), "gray": (0.56, 0.55, 0.54), "white": (0.87, 0.86, 0.84), "silver": (0.74, 0.74, 0.75),
    "golden": (0.75, 0.55, 0.25), "dark": (0.12, 0.08, 0.06), "light": (0.72, 0.56, 0.34), "fair": (0.78, 0.63, 0.42),
}  # fmt: skip
HAIR_ONLY = {  # colours that mean hair wherever they stand
    "blond": HAIR_COLORS["blond"], "blonde": HAIR_COLORS["blond"], "auburn": (0.36, 0.15, 0.09),
    "ginger": (0.62, 0.29, 0.12), "redhead": (0.55, 0.23, 0.10), "redheaded": (0.55, 0.23, 0.10),
    "brunette": HAIR_COLORS["brown"], "brunet": HAIR_COLORS["brown"], "chestnut": (0.32, 0.17, 0.10),
    "strawberry blond": (0.70, 0.44, 0.27), "strawberry blonde": (0.70, 0.44, 0.27), "platinum": (0.89, 0.84, 0.72),
    "platinum blond": (0.89, 0.84, 0.72), "platinum blonde": (0.89, 0.84, 0.72), "salt and pepper": (0.40, 0.39, 0.38),
    "sandy": (0.66, 0.52, 0.34), "raven": (0.04, 0.04, 0.05),
}  # fmt: skip
SYNONYMS = {"striped": "stripes", "stripy": "stripes", "stripe": "stripes", "checkered": "checks", "checked": "checks",
            "dotted": "dots", "plaid": "checks"}  # of choices  # fmt: skip
