# SPDX-License-Identifier: GPL-3.0-or-later
"""The form of a request: every edit survives JSON, and what is wrong gets one sentence that repeats nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.protocol import MAX_EDITS, OPS, GenerateRequest, PopulaceError, parse_json, parse_request

seeds = st.integers(0, 2**53 - 1)
amounts = st.floats(0, 1)
kinds = st.sampled_from([["shape"], ["tex"], ["shape", "tex"], ["tex", "shape"]])
parts = st.lists(st.sampled_from(["body", "top", "hair"]), min_size=1, unique=True)
latents = st.fixed_dictionaries({"top/shape": st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=1,
                                                       max_size=2)})  # fmt: skip
people = st.fixed_dictionaries({"seed": seeds}, optional={"truncation_psi": st.floats(0, 1.5)}) | st.fixed_dictionaries(
    {"latents": latents}
)
values = st.dictionaries(
    st.sampled_from(["height_m", "top_color", "hair"]),
    st.floats(-9, 9) | st.lists(amounts, min_size=3, max_size=3) | st.text(st.characters(codec="utf-8"), max_size=9),
    min_size=1,
)


def op(name: str, required: dict[str, Any], **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"op": st.just(name), **required}, optional=optional)


edits = st.one_of(
    op("mix", {"other": people, "amount": amounts}, kinds=kinds),
    op("vary", {"seed": seeds, "amount": amounts}, parts=parts | st.none(), kinds=kinds),
    op("part", {"parts": parts, "other": people}, kinds=kinds),
    op("remove", {"parts": parts}),
    op("reroll", {"seed": seeds}, lock=st.just([]) | parts, kinds=kinds),
    op("set", {"values": values}),
    op("words", {"text": st.text(st.characters(codec="utf-8"), max_size=20)}),
)


@given(st.lists(edits, max_size=5), st.booleans(), st.integers(1, 4))
def test_requests_survive_json(edits: list[dict[str, Any]], separate: bool, lods: int) -> None:
    raw = {"seed": 5, "prompt": "tall", "edits": edits, "separate": separate, "lods": lods, "pose": "standing_1"}
    request = parse_request(raw)
    assert [edit.op for edit in request.edits] == [edit["op"] for edit in edits]
    assert parse_request(parse_json(request.model_dump_json().encode())) == request
    for said, heard in zip(edits, request.model_dump(mode="json", exclude_unset=True)["edits"]):
        assert heard == said


def test_defaults_change_nothing() -> None:
    request = GenerateRequest()
    assert (request.edits, request.prompt, request.separate, request.lods, request.pose) == ([], None, False, 1, "rest")
    reroll = parse_request({"edits": [{"op": "reroll", "seed": 1}]}).edits[0]
    assert reroll.model_dump() == {"op": "reroll", "seed": 1, "lock": [], "kinds": ["shape", "tex"]}


MIX = {"op": "mix", "other": {"seed": 1}, "amount": 0.5}


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"edits": [MIX] * (MAX_EDITS + 1)}, "edits: .* at most 64"),
        ({"edits": [{"op": "sesame"}]}, f"edits.0: op must be one of: {', '.join(OPS)}"),
        ({"edits": [{"seed": 1}]}, "edits.0: op must be one of"),
        ({"edits": [MIX, MIX | {"amount": 1.01}]}, "edits.1.mix.amount: .* less than or equal to 1"),
        ({"edits": [MIX | {"amount": "0.5"}]}, "edits.0.mix.amount: .* valid number"),
        ({"edits": [MIX | {"amount": float("nan")}]}, "edits.0.mix.amount: .* finite"),
        ({"edits": [MIX | {"kinds": ["shape", "shape"]}]}, "kinds: a name appears twice"),
        ({"edits": [MIX | {"kinds": []}]}, "kinds: .* at least 1"),
        ({"edits": [MIX | {"other": {}}]}, "other: a person is given by seed or by latents"),
        ({"edits": [MIX | {"other": {"seed": 1, "latents": {"a": [[1.0]]}}}]}, "one of the two"),
        ({"edits": [MIX | {"sesame": 1}]}, "edits.0.mix.sesame: Extra inputs"),
        ({"edits": [{"op": "remove", "parts": []}]}, "parts: .* at least 1"),
        ({"edits": [{"op": "set", "values": {}}]}, "values: .* at least 1"),
        ({"edits": [{"op": "set", "values": {"top_color": [0, 0, 1.5]}}]}, "top_color.color.2: .* less than or equal"),
        ({"edits": [{"op": "set", "values": {"top_color": [0, 0]}}]}, "top_color.color: .* at least 3"),
        ({"edits": [{"op": "set", "values": {"weight": True}}]}, "weight.number: .* valid number"),
        ({"edits": [{"op": "words", "text": "x" * 1001}]}, "text: .* at most 1000"),
        ({"prompt": "x" * 1001}, "prompt: .* at most 1000"),
        ({"latents": {"a": [[0.0], [0.0, 1.0]]}}, "latents.a: latents must be rows of equal length"),
        ({"latents": {"a": [[0.0] * 4097]}}, "latents.a.0: .* at most 4096"),
        ({"latents": {f"a{i}": [[0.0]] for i in range(65)}}, "latents: .* at most 64"),
        ({"lods": 5}, "lods: .* less than or equal to 4"),
        ({"maps": "all"}, "maps: .* 'pbr' or 'color'"),
        ({"shape_keys": ["weight", "weight"]}, "shape_keys: a name appears twice"),
        ({"shape_keys": [f"a{i}" for i in range(17)]}, "shape_keys: .* at most 16"),
        ({"pose": "../etc"}, "pose: .* pattern"),
    ],
)
def test_mistakes_get_one_sentence(request_: dict[str, Any], says: str) -> None:
    with pytest.raises(PopulaceError, match=says) as caught:
        parse_request(request_)
    assert caught.value.code == "invalid_request"
    assert "sesame" not in caught.value.message or "Extra" in says  # names of fields are said, values never
