# SPDX-License-Identifier: GPL-3.0-or-later
"""Arithmetic on people: exact ends, equal steps, parts that only one of two people wears, spread that is kept."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend import families, latents, weights
from backend.edits import choose_latents
from backend.families import capsule
from backend.families.base import Latents
from backend.families.capsule.model import load
from backend.protocol import GenerateRequest, PopulaceError, parse_request

WORN = ("top", "hair", "accessory")
MODEL = load(torch.device("cpu"))


def person(seed: int, *worn: str) -> Latents:
    """Codes of whole numbers, which float32 blends without rounding at dyadic amounts."""
    rng = np.random.default_rng(seed)
    names = [f"{part}/{kind}" for part in ("body", *worn) for kind in ("shape", "tex")]
    return Latents("x", {n: torch.from_numpy(rng.integers(-999, 999, (1, 4)).astype(np.float32)) for n in names})


def equal(a: Latents, b: Latents) -> bool:
    return a.codes.keys() == b.codes.keys() and all(torch.equal(c, b.codes[n]) for n, c in a.codes.items())


people = st.builds(person, st.integers(0, 99), st.sampled_from(WORN)) | st.builds(
    lambda seed, worn: person(seed, *sorted(worn)), st.integers(0, 99), st.sets(st.sampled_from(WORN))
)
kinds = st.sampled_from([("shape",), ("tex",), ("shape", "tex")])


@given(people, people)
def test_the_ends_of_a_mix_are_the_two_people(a: Latents, b: Latents) -> None:
    assert equal(latents.mix(a, b, 0.0), a)
    assert equal(latents.mix(a, b, 1.0), b)
    assert equal(latents.vary(a, b, 0.0), a)
    assert equal(latents.vary(a, b, 1.0, mean=person(100).codes), b)
    assert equal(latents.reroll(a, b), b)


def test_ends_are_exact_for_any_float() -> None:
    a, b = MODEL.sample(1, 1.0, {}), MODEL.sample(2, 1.0, {})
    assert equal(latents.mix(a, b, 0.0), a)
    assert equal(latents.mix(a, b, 1.0), b)


@given(people, people, kinds)
def test_equal_steps_change_every_code_equally_but_at_the_switch(a: Latents, b: Latents, kinds: Any) -> None:
    way = [latents.mix(a, b, i / 8, kinds) for i in range(9)]
    for before, after in itertools.pairwise(way):
        for name in before.codes.keys() & after.codes.keys() & a.codes.keys() & b.codes.keys():
            step = (b.codes[name] - a.codes[name]) / 8 if name.partition("/")[2] in kinds else torch.zeros(1, 4)
            assert torch.equal(after.codes[name] - before.codes[name], step)
    changes = [x.codes.keys() != y.codes.keys() for x, y in itertools.pairwise(way)]
    assert changes == [i == 3 and "shape" in kinds and a.codes.keys() != b.codes.keys() for i in range(8)]


@given(people, people, st.floats(0, 1), kinds)
def test_what_only_one_wears_is_the_first_ones_until_a_half(a: Latents, b: Latents, amount: float, kinds: Any) -> None:
    mixed = latents.mix(a, b, amount, kinds)
    side = b if amount >= 0.5 and "shape" in kinds else a
    assert set(latents.parts_of(mixed)) == set(latents.parts_of(side))
    for name in a.codes.keys() ^ b.codes.keys():
        assert (name in mixed.codes) == (name in side.codes)
        assert name not in mixed.codes or torch.equal(mixed.codes[name], side.codes[name])


@given(people, people, st.sets(st.sampled_from(("body", *WORN)), min_size=1), kinds)
def test_locked_parts_and_other_kinds_stay(a: Latents, b: Latents, lock: set[str], kinds: Any) -> None:
    rolled = latents.reroll(a, b, lock, kinds)
    varied = latents.vary(a, b, 0.75, [p for p in ("body", *WORN) if p not in lock], kinds)
    for name in a.codes.keys() | b.codes.keys():
        part, _, kind = name.partition("/")
        for result in (rolled, varied):
            if part in lock or (kind not in kinds and name in a.codes and name in b.codes):
                assert (name in result.codes) == (name in a.codes)
                assert name not in a.codes or torch.equal(result.codes[name], a.codes[name])


def test_variation_turns_normal_codes_and_goes_straight_with_the_others() -> None:
    """With perpendicular codes of equal length about the mean, equal steps are equal chords of a circle."""
    mean = torch.tensor([[10.0, 20.0]])
    a = Latents("x", {"body/shape": mean + torch.tensor([[3.0, 0.0]]), "body/tex": torch.tensor([[0.0, 1.0]])})
    b = Latents("x", {"body/shape": mean + torch.tensor([[0.0, 3.0]]), "body/tex": torch.tensor([[1.0, 0.0]])})
    way = [latents.vary(a, b, i / 6, mean={"body/shape": mean}).codes for i in range(7)]
    for i, codes in enumerate(way):
        angle = math.radians(15 * i)
        expected = mean + 3 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(codes["body/shape"], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(codes["body/tex"], torch.tensor([[i / 6, 1 - i / 6]]), atol=1e-6, rtol=0)
    chords = [float((y["body/shape"] - x["body/shape"]).norm()) for x, y in itertools.pairwise(way)]
    assert chords == pytest.approx([6 * math.sin(math.radians(7.5))] * 6, abs=1e-5)


def test_variation_keeps_the_spread_of_the_prior_where_a_mix_shrinks_it() -> None:
    mean = MODEL.sample(0, 0.0, {}).codes
    pairs = [(MODEL.sample(2 * i, 1.0, {}), MODEL.sample(2 * i + 1, 1.0, {})) for i in range(400)]
    for amount in (0.25, 0.5):
        turned = torch.cat([latents.vary(a, b, amount, mean=mean).codes["body/tex"] for a, b in pairs])
        straight = torch.cat([latents.mix(a, b, amount).codes["body/tex"] for a, b in pairs])
        assert float(turned.std()) == pytest.approx(1, abs=0.02)
        assert float(straight.std()) == pytest.approx(math.hypot(amount, 1 - amount), abs=0.02)


def test_parts_are_taken_swapped_and_taken_off() -> None:
    a, b = person(1, "top", "accessory"), person(2, "top", "hair")
    taken = latents.take_parts(a, b, ["top", "hair", "accessory"])
    assert equal(taken, Latents("x", {**b.codes, "body/shape": a.codes["body/shape"], "body/tex": a.codes["body/tex"]}))
    looks = latents.take_parts(a, b, ["top"], ["tex"])
    assert torch.equal(looks.codes["top/tex"], b.codes["top/tex"])
    assert torch.equal(looks.codes["top/shape"], a.codes["top/shape"])
    assert latents.parts_of(latents.take_parts(a, b, ["hair"], ["shape"])) == ("body", "top", "accessory", "hair")
    assert latents.parts_of(latents.remove(a, ["top", "hair"])) == ("body", "accessory")


def test_what_cannot_be_taken_is_said() -> None:
    a, b = person(1, "top"), person(2, "hair")
    for parts, kinds, says in ((["top"], ["tex"], "The other person wears no top"),
                               (["hair"], ["tex"], "This person wears no hair")):  # fmt: skip
        with pytest.raises(PopulaceError, match=says) as caught:
            latents.take_parts(a, b, parts, kinds)
        assert caught.value.code == "invalid_request"
        assert "shape" in caught.value.hint
    with pytest.raises(PopulaceError, match="cannot be taken off") as caught:
        latents.remove(a, ["body"])
    assert "top" in caught.value.hint
    with pytest.raises(PopulaceError, match="no part 'body'"):
        latents.take_parts(a, Latents("x", {"single/shape": torch.zeros(1, 2)}), ["body"])


@given(st.integers(0, 2**53 - 1), st.floats(0, 1.5))
@settings(max_examples=30)
def test_codes_survive_json_exactly(seed: int, psi: float) -> None:
    before = MODEL.sample(seed, psi, {})
    rows = json.loads(json.dumps(latents.to_rows(before)))
    assert equal(latents.from_rows("capsule", rows), before)
    assert equal(choose_latents(GenerateRequest(family="capsule", seed=1, latents=rows), MODEL), before)


# ------------------------------------------------------------------------------------------------ requests, in order


def chosen(**request: Any) -> Latents:
    return choose_latents(parse_request({"family": "capsule", **request}), MODEL)


def test_edits_are_applied_in_order_after_the_prompt() -> None:
    wide = {"op": "set", "values": {"weight": 1.0}}
    stranger = {"op": "mix", "other": {"seed": 8}, "amount": 1.0}
    assert equal(chosen(seed=3, edits=[wide, stranger]), MODEL.sample(8, 0.7, {}))
    assert MODEL.describe(chosen(seed=3, edits=[stranger, wide]))["weight"] == pytest.approx(1, abs=1e-5)
    said = MODEL.describe(chosen(seed=3, prompt="1.8 m, thin, teal bottom", edits=[wide]))
    assert said["height_m"] == pytest.approx(1.8, abs=1e-5)
    assert said["weight"] == pytest.approx(1, abs=1e-5)
    assert said["bottom_color"] == pytest.approx([0, 128 / 255, 128 / 255], abs=1e-3)


def test_every_edit_does_what_its_function_does() -> None:
    a, b = MODEL.sample(3, 0.7, {}), MODEL.sample(8, 0.7, {})
    mean = MODEL.sample(8, 0.0, {}).codes
    rows, height = latents.to_rows(b), MODEL.describe(a)["height_m"]
    for edit, expected in (
        ({"op": "mix", "other": {"latents": rows}, "amount": 0.25}, latents.mix(a, b, 0.25)),
        ({"op": "mix", "other": {"seed": 8, "truncation_psi": 0.0}, "amount": 1.0}, Latents("capsule", mean)),
        ({"op": "vary", "seed": 8, "amount": 0.3}, latents.vary(a, b, 0.3, mean=mean)),
        ({"op": "part", "parts": ["body"], "other": {"seed": 8}, "kinds": ["tex"]}, latents.reroll(a, b, (), ["tex"])),
        ({"op": "reroll", "seed": 8, "lock": ["body"]}, a),
        ({"op": "reroll", "seed": 8}, b),
        ({"op": "set", "values": {"weight": 0.5}}, MODEL.edit(a, {"weight": 0.5})),
        ({"op": "words", "text": "taller"}, MODEL.edit(a, {"height_m": round(height + 0.055, 4)})),
        ({"op": "words", "text": "gibberish"}, a),
    ):  # fmt: skip
        assert equal(chosen(seed=3, edits=[edit]), expected), edit


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        ({"edits": [{"op": "remove", "parts": ["nose"]}]}, "invalid_request", "no part 'nose'.*body"),
        ({"edits": [{"op": "reroll", "seed": 1, "lock": ["nose"]}]}, "invalid_request", "no part 'nose'"),
        ({"edits": [{"op": "vary", "seed": 1, "amount": 1, "parts": ["nose"]}]}, "invalid_request", "no part 'nose'"),
        ({"edits": [{"op": "remove", "parts": ["body"]}]}, "invalid_request", "cannot be taken off"),
        ({"edits": [{"op": "set", "values": {"nose": 1}}]}, "invalid_request", "no attribute 'nose'.*height_m"),
        ({"edits": [{"op": "set", "values": {"height_m": 3}}]}, "invalid_request", "number in 1.5..1.95 m"),
        ({"edits": [{"op": "set", "values": {"height_m": "tall"}}]}, "invalid_request", "number in 1.5..1.95 m"),
        ({"edits": [{"op": "set", "values": {"top_color": 1}}]}, "invalid_request", "three numbers"),
        ({"edits": [{"op": "set", "values": {"pattern": "dots"}}]}, "invalid_request", "one of: stripes, plain"),
        ({"edits": [{"op": "mix", "amount": 1, "other": {"latents": {"body/shape": [[0.0] * 8]}}}]},
         "invalid_latents", "missing: body/tex"),
        ({"edits": [{"op": "mix", "amount": 1, "other": {"latents": {"nose/tex": [[0.0] * 8]}}}]},
         "invalid_latents", "no latents called 'nose/tex'"),
        ({"latents": {"single/shape": [[0.0] * 2]}}, "invalid_latents", "missing: single/tex"),
        ({"pose": "flying"}, "invalid_request", "no pose called 'flying'.*rest"),
    ],
)  # fmt: skip
def test_mistakes_name_what_is_possible(request_: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(PopulaceError, match=says) as caught:
        chosen(**request_)
    assert caught.value.code == code
    assert caught.value.hint


def test_people_of_parts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """On the embedded family: undress, dress from another, wear something new, be given whole."""
    from backend.families.people import model as people_model

    model = people_model.load(torch.device("cpu"), weights.locate("people", tmp_path_factory.mktemp("data")))
    info = families.info("people")
    hatted, bare = None, None
    for seed in range(200):
        codes = model.sample(seed, 0.7, {}).codes
        assert {n: tuple(c.shape) for n, c in codes.items()} == {n: (1, info.codes[n].size) for n in codes}
        if "accessory/shape" in codes:
            hatted = seed if hatted is None else hatted
        else:
            bare = seed if bare is None else bare
    assert hatted is not None
    assert bare is not None
    hat = {n: c for n, c in latents.to_rows(model.sample(hatted, 0.7, {})).items() if n.startswith("accessory/")}

    def choose(**request: Any) -> Latents:
        return choose_latents(parse_request(request), model)

    take = {"op": "part", "parts": ["accessory"], "other": {"seed": hatted}}
    wearing = choose(seed=bare, latents=hat)
    assert equal(choose(seed=bare, edits=[take]), wearing)
    assert wearing.codes.keys() - model.sample(bare, 0.7, {}).codes.keys() == hat.keys()
    assert equal(choose(seed=bare, edits=[take, {"op": "remove", "parts": ["accessory"]}]), choose(seed=bare))
    whole = latents.to_rows(model.sample(bare, 0.7, {}))
    assert equal(choose(seed=hatted, latents=whole), choose(seed=bare))  # no hat comes back from the seed
    with pytest.raises(PopulaceError, match="missing: accessory/tex"):
        choose(seed=bare, latents={"accessory/shape": hat["accessory/shape"]})


def test_families_publish_parts_that_match_their_codes() -> None:
    for info in families.infos():
        assert {f"{part}/{kind}" for part in info.parts for kind in latents.KINDS} <= info.codes.keys()
        assert info.parts[0] == "body"
    assert [a.name for a in capsule.INFO.attributes] == list(MODEL.describe(MODEL.sample(0, 1.0, {})))
