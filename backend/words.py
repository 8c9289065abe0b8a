# SPDX-License-Identifier: GPL-3.0-or-later
"""Plain words to attributes: "tall old woman, red shirt, no hat". No model: tables (`vocabulary`) and a few rules.

Words are read from left to right. What describes ("red", "long", "dark") waits for the thing that it describes; what
moves an attribute of the person ("tall", "very old") is noted, and resolved in the end, because what tall is depends
on the sex. Only attributes of the family count; every other word is reported as not understood.
"""

from __future__ import annotations

import colorsys
import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from backend import vocabulary as v
from backend.families.base import Attribute, AttributeValue

Color = tuple[float, float, float]

_UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SPELT = rf"(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_UNITS)}))?|{'|'.join(_TEENS + _UNITS)})"
_NUMBER = rf"(?:\d{{1,3}}(?:[.,]\d{{1,2}})?|{_SPELT})"
_TALL = r"(?:[ -]?(?:tall|high|in height)\b)?"
_AGED = re.compile(
    rf"\b(?:aged?|age of) (?P<a>{_NUMBER})\b"
    rf"|(?<![\w.,])(?P<b>{_NUMBER})[- ]?(?:(?:years?|yrs?)\b(?:[- ]olds?\b| of age\b)?|y/?o\b|old\b)"
)
_DECADE = re.compile(
    rf"\b(?:in (?:his|her|their|the) )?(?P<part>early|mid|late)?[- ]?"
    rf"(?:(?P<word>{'|'.join(ten[:-1] + 'ies' for ten in _TENS)})|(?P<number>[2-9]0)'?s)\b"
    rf"|\b(?P<some>{'|'.join(_TENS)})[- ]something\b"
)
_CENTIMETRES = re.compile(rf"(?<![\w.,])(?P<cm>\d{{2,3}}(?:[.,]\d)?) ?(?:cm|centimet(?:er|re)s?)\b{_TALL}")
_METRES = re.compile(rf"(?<![\w.,])(?P<m>\d)(?:[.,](?P<d>\d{{1,2}}))? ?m(?:et(?:er|re)s?)?(?: ?(?P<c>\d\d))?\b{_TALL}")
_FEET = re.compile(
    rf"(?<![\w.,])(?P<ft>\d|{'|'.join(_UNITS)})[ -]?(?:(?:ft|feet|foot)\b|')[ -]?"
    rf"(?:(?P<inch>\d\d?|{'|'.join(_TEENS + _UNITS)})\b(?: ?(?:inch(?:es)?\b|in\b|\"|''))?)?{_TALL}"
)
_TOKEN = re.compile(r"#[0-9a-f]{6}\b|[^\W\d_]+(?:'[^\W\d_]+)*|\d+(?:[.,]\d+)?|[^\s-]")
_PLAIN = str.maketrans("’‘′`´“”″‐‑–—", "'''''\"\"\"----")


@dataclass(frozen=True)
class Understood:
    values: dict[str, AttributeValue]
    ignored: list[str]  # words that set nothing, in the order of the text


def understand(
    text: str, attributes: Sequence[Attribute], current: Mapping[str, AttributeValue] | None = None
) -> Understood:
    """What English `text` says of a person, as values of these attributes. Never raises, whatever the text.

    `current`: the person's values so far; comparatives ("taller") start from them, and the sex says what tall is.
    """
    reader = _Reader({a.name: a for a in attributes}, current or {})
    text = reader.numbers(unicodedata.normalize("NFKC", text).lower().translate(_PLAIN))
    reader.read([(found.group(), found.start()) for found in _TOKEN.finditer(text)])
    return reader.result()


@dataclass(frozen=True)
class _Waiting:
    """A word that describes something still to come, or named just before."""

    kind: Literal["color", "shade", "length"]
    word: str
    at: int
    rgb: Color | None = None


@dataclass
class _Reader:
    known: Mapping[str, Attribute]
    current: Mapping[str, AttributeValue]
    values: dict[str, AttributeValue] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)  # attributes given as numbers: no adjective changes them
    moves: list[tuple[str, float, bool]] = field(default_factory=list)  # attribute, by how much, from the current one?
    missed: list[tuple[int, str]] = field(default_factory=list)
    waiting: list[_Waiting] = field(default_factory=list)
    thing: tuple[str, str] | None = None  # part and choice that were named last, until the next break
    degree: float = 1.0
    relative: bool = False
    negated: bool = False

    def numbers(self, text: str) -> str:
        """Take ages and heights out of the text; blanks hold their places, so that positions keep their meaning."""
        rules: list[tuple[re.Pattern[str], str, Callable[[re.Match[str]], float]]] = [
            (_AGED, "age_years", lambda m: _number(m["a"] or m["b"])),
            (_DECADE, "age_years", _decade),
            (_CENTIMETRES, "height_m", lambda m: _number(m["cm"]) / 100),
            (_METRES, "height_m", lambda m: float(f"{int(m['m'])}.{m['d'] or m['c'] or 0}")),
            (_FEET, "height_m", lambda m: 0.3048 * _number(m["ft"]) + 0.0254 * _number(m["inch"] or "0")),
        ]
        for pattern, name, value in rules:
            for found in pattern.finditer(text):
                number, attribute = value(found), self.known.get(name)
                if attribute is not None and attribute.low <= number <= attribute.high:
                    self.values[name] = round(number, 4)
                    self.counted.add(name)
                else:
                    self.missed.append((found.start(), found.group().strip()))
                text = text[: found.start()] + " " * len(found.group()) + text[found.end() :]
        return text

    def read(self, tokens: Sequence[tuple[str, int]]) -> None:
        """All words; of phrases the longest that means something."""
        at = 0
        while at < len(tokens):
            place = tokens[at][1]
            for length in range(min(3, len(tokens) - at), 0, -1):
                if self.word(" ".join(word for word, _ in tokens[at : at + length]), place):
                    break
            else:
                length = 1
                self.missed.append((place, tokens[at][0]))
            at += length
        self.flush()

    def word(self, word: str, at: int) -> bool:
        """Deal with one word or phrase; False if it means nothing."""
        if word in v.NEGATIONS:
            if word in v.SOFT:
                self.flush()
            self.negated = True
        elif word in v.HARD:
            thing = self.thing if word in ("and", ":") else None
            self.flush()
            self.thing, self.negated = thing, False
        elif word in v.SOFT:
            self.flush()
            self.negated = self.negated and word not in ("with", "has", "having")
        elif word in ("more", "less"):
            self.degree, self.relative = self.degree if word == "more" else -self.degree, True
        elif word in v.DEGREES:
            self.degree = min(max(self.degree * v.DEGREES[word], -3.0), 3.0)
        elif (rgb := color(word)) is not None:
            if not (word in v.HUES and self.waiting and self.waiting[-1].kind == "color"
                    and self.waiting[-1].word not in v.HUES):  # "navy blue" is navy  # fmt: skip
                self.waiting.append(_Waiting("color", word, at, rgb))
        elif self.named_color(word):
            *shades, last = word.split()
            rgb = color(last)
            shaded = None if rgb is None else _rgb(_shaded(rgb, shades, False))
            self.waiting.append(_Waiting("color", word, at, shaded))
        elif word in v.HAIR_ONLY:
            self.waiting.append(_Waiting("color", word, at, v.HAIR_ONLY[word]))
            self.paint("hair")
        elif word in v.LENGTHS or _positive(word, v.SHADES):
            self.waiting.append(
                _Waiting("length" if word in v.LENGTHS else "shade", _positive(word, v.SHADES) or word, at)
            )
        elif (thing := self.noun(word)) is not None:
            self.describe(thing, word, at)
        elif word in v.MOVES or word in v.SUBJECTS:
            if word in v.SUBJECTS:
                self.flush(person=True)
            self.move(v.MOVES.get(word, {}), word, at)
        elif positive := _positive(word, v.MOVES):
            self.degree *= 2 if word.endswith("est") else 1
            self.relative = self.relative or word.endswith("er")
            self.move(v.MOVES[positive], word, at)
        elif (choice := self.choice(word)) is not None:
            self.values[choice[0]] = choice[1]
        else:
            return word in v.STOP
        return True

    def named_color(self, word: str) -> bool:
        """A colour that is a choice, such as the eyes' "deep blue"."""
        return any(_compact(word) == _compact(choice) for name in self.known if name.endswith("_color")
                   for choice in self.options(name))  # fmt: skip

    def noun(self, word: str) -> tuple[str, str] | None:
        """The part and the choice that a word names; "none" for "hatless"."""
        stem = word.removesuffix("less")
        for part, words in v.PARTS.items():
            choices = {_norm(c): c for c in self.options(part)}
            for form in (word, _singular(word)):
                if form in words:
                    return part, words[form]
                if _norm(form) in choices and _norm(form) not in v.LENGTHS:
                    return part, choices[_norm(form)]
            if stem != word and (stem in words or _norm(stem) in choices):
                return part, "none"
        return None

    def options(self, name: str) -> tuple[str, ...]:
        return self.known[name].choices if name in self.known else ()

    def describe(self, thing: tuple[str, str], word: str, at: int) -> None:
        """A thing is named: it is worn as it is described, or not at all."""
        part, choice = thing
        options = {_norm(c): c for c in self.options(part)}
        lengths = [w for w in self.waiting if w.kind == "length"]
        self.waiting = [w for w in self.waiting if w.kind != "length"]
        if self.negated:
            choice, self.negated = "none", False
        if lengths and _norm(f"{lengths[-1].word} {choice}") in options:
            choice = f"{lengths.pop().word} {choice}"
        self.missed += [(w.at, w.word) for w in lengths]
        if _norm(choice) in options:
            self.values[part] = options[_norm(choice)]
        elif (choice and (options or choice == "none")) or not (
            {part, f"{part}_color", f"{part}_tone"} & {*self.known}
        ):
            self.missed += [(at, word)] + [(w.at, w.word) for w in self.waiting]
            self.waiting = []
        self.thing, self.degree, self.relative = (part, choice), 1.0, False
        if self.waiting:
            self.paint(part)

    def paint(self, part: str) -> None:
        """Colours and shades that wait go to this part: the last colour counts."""
        waiting = [w for w in self.waiting if w.kind != "length"]
        self.waiting = [w for w in self.waiting if w.kind == "length"]
        attribute = self.known.get(f"{part}_color")
        if part == "skin":
            for w in waiting:
                self.move({"skin_tone": v.SKIN[w.word]} if w.word in v.SKIN else {"": 0}, w.word, w.at)
            return
        colors = [w for w in waiting if w.kind == "color"]
        shades = [w for w in waiting if w.kind == "shade"]
        value: AttributeValue | None = None
        if attribute is None:
            pass
        elif attribute.kind == "choice":
            names = {_compact(c): c for c in attribute.choices}
            value = next((names[_compact(w.word)] for w in reversed(waiting) if _compact(w.word) in names), None)
        elif colors:
            rgb = (v.HAIR_COLORS.get(colors[-1].word) if part == "hair" else None) or colors[-1].rgb
            value = None if rgb is None else _shaded(rgb, [w.word for w in shades], part == "hair")
        elif shades:
            rgb = (v.HAIR_COLORS if part == "hair" else v.PLAIN_SHADES).get(shades[-1].word)
            value = None if rgb is None else list(rgb)
        if value is None:
            self.missed += [(w.at, w.word) for w in waiting]
        else:
            self.values[f"{part}_color"] = value
            self.missed += [(w.at, w.word) for w in colors[:-1]]

    def flush(self, person: bool = False) -> None:
        """A break, or (with `person`) a word such as "woman": what still waits belongs to the thing named before it,
        else to the person."""
        waiting = self.waiting
        if waiting and self.thing is not None and not person:
            self.describe(self.thing, waiting[0].word, waiting[0].at)
            waiting = []
        self.waiting = []
        for w in waiting:
            if w.word == "short":
                self.move(v.MOVES["short"], w.word, w.at, keep=True)
            elif w.word in v.SKIN and (person or w.kind == "shade"):
                self.move({"skin_tone": v.SKIN[w.word]}, w.word, w.at, keep=True)
            else:
                self.missed.append((w.at, w.word))
        self.thing, self.degree, self.relative = None, 1.0, False

    def move(self, moves: Mapping[str, float], word: str, at: int, keep: bool = False) -> None:
        """Note what an adjective does; the person has no such attribute: it is not understood. `keep` the degree."""
        found = {name: by for name, by in moves.items() if name in self.known}
        if moves and not found:
            self.missed.append((at, word))
        self.moves += [(name, 0.0 if self.negated else by * self.degree, self.relative) for name, by in found.items()]
        self.negated = self.negated and not moves
        if not keep:
            self.degree, self.relative = 1.0, False

    def choice(self, word: str) -> tuple[str, str] | None:
        """A choice of an attribute that is no part of the person, by its name."""
        names = {_norm(w) for w in (word, v.SYNONYMS.get(word, word))}
        for name, attribute in self.known.items():
            if name not in v.PARTS and not name.endswith("_color"):
                for choice in attribute.choices:
                    if _norm(choice) in names:
                        return name, choice
        return None

    def result(self) -> Understood:
        for name, by, relative in sorted(self.moves, key=lambda move: move[0] != "sex"):
            attribute = self.known[name]
            if name in self.counted or attribute.kind != "number":
                continue
            before = self.values.get(name, self.current.get(name))
            from_now = relative and isinstance(before, (int, float))
            start = float(before) if from_now else self.neutral(attribute)  # type: ignore[arg-type]
            value = start + (0.5 * by if from_now else by)
            self.values[name] = round(min(max(value, attribute.low), attribute.high), 4)
        self.dress()
        return Understood(self.values, list(dict.fromkeys(word for _, word in sorted(self.missed))))

    def dress(self) -> None:
        """A colour needs a thing to be on: who has grey hair has hair; who is bald has no colour of it."""
        for part in v.PARTS:
            if f"{part}_color" in self.values and self.options(part):
                if self.values.get(part) == "none":
                    del self.values[f"{part}_color"]
                elif part not in self.values and self.current.get(part) == "none":
                    self.values[part] = next((c for c in self.options(part) if c != "none"), "none")

    def neutral(self, attribute: Attribute) -> float:
        if attribute.name == "height_m":
            sex = self.values.get("sex", self.current.get("sex", 0.5))
            part = min(max(sex, 0.0), 1.0) if isinstance(sex, (int, float)) else 0.5
            return v.HEIGHT_M[0] + part * (v.HEIGHT_M[1] - v.HEIGHT_M[0])
        return v.NEUTRAL.get(attribute.name, (attribute.low + attribute.high) / 2)


def _number(text: str) -> float:
    if text[0].isdigit():
        return float(text.replace(",", "."))
    words = re.split("[- ]", text)
    small = {word: i for i, word in enumerate(_UNITS + _TEENS, 1)} | {ten: 20 + 10 * i for i, ten in enumerate(_TENS)}
    return float(sum(small[word] for word in words))


def _decade(found: re.Match[str]) -> float:
    """ "late forties": 48"""
    word = found["word"] and found["word"][:-3] + "y"
    start = float(found["number"]) if found["number"] else _number(word or found["some"])
    return start + {"early": 2, "mid": 5, "late": 8}.get(found["part"] or "mid", 5)


def _singular(word: str) -> str:
    for end, instead in (("'s", ""), ("ies", "y"), ("ss", "ss"), ("shes", "sh"), ("s", "")):
        if word.endswith(end) and len(word) > len(end) + 1:
            return word.removesuffix(end) + instead
    return word


@functools.lru_cache(4096)
def _norm(choice: str) -> str:
    """Names are compared without plural, hyphens and underscores."""
    return " ".join(_singular(word) for word in re.split(r"[\s_-]+", choice.lower().strip()))


def _compact(choice: str) -> str:
    """Names of colours are compared without blanks, too: light blue, lightblue."""
    return _norm(choice).replace(" ", "").replace("gray", "grey")


def _rgb(values: Sequence[float]) -> Color:
    return values[0], values[1], values[2]


def _positive(word: str, known: Mapping[str, object] | set[str]) -> str:
    """The plain form among `known` of an adjective: "heavier", "thinnest", "paler"; empty if there is none."""
    forms = [word]
    if (stem := re.sub("(er|est)$", "", word)) != word and stem:
        forms += [stem, stem + "e", stem[:-1] + "y" if stem.endswith("i") else "", stem[:-1]]
    return next((form for form in forms if form in known), "")


def color(word: str) -> Color | None:
    """sRGB in 0..1 of #rrggbb or a colour's name, None if it is neither."""
    if re.fullmatch("#[0-9a-f]{6}", word):
        return _rgb([int(word[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    if word.endswith((" grey", " gray")):  # CSS's dark grey is lighter than its grey
        return None
    return v.COLORS.get(word) or v.COLORS.get(word.replace(" ", ""))


def _shaded(rgb: Color, shades: Sequence[str], hair: bool) -> list[float]:
    """Lighter is a tint; of hair it is the same hue with more light."""
    for shade in shades:
        if shade in ("dark", "deep"):
            rgb = _rgb([0.55 * c for c in rgb])
        elif shade in ("bright", "vivid"):
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
            rgb = colorsys.hsv_to_rgb(hue, min(1.0, 1.25 * saturation), max(value, 0.9))
        elif shade in ("light", "fair", "pale", "pastel"):
            white = 0.4 if shade in ("light", "fair") else 0.6
            rgb = _rgb([min(1.0, 1.6 * c) if hair else c + white * (1 - c) for c in rgb])
    return [round(c, 4) for c in rgb]
