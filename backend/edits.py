# SPDX-License-Identifier: GPL-3.0-or-later
"""From a request to the person it asks for: the seed or the given latents, then the words, then the edits in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import UInt8
from torch import Tensor

from backend import checks, families, latents, words
from backend.families.base import FamilyModel, Latents
from backend.protocol import (
    Edit,
    GenerateRequest,
    Mix,
    Person,
    Remove,
    Reroll,
    SetValues,
    TakeParts,
    Vary,
    Words,
)

Maps = Mapping[str, UInt8[Tensor, "H W 4"]]
"""Pixels of `latent_maps` by the id that a request has for them."""


def choose_latents(
    request: GenerateRequest, model: FamilyModel, maps: Maps | None = None, seen: Latents | None = None
) -> Latents:
    """The person of the request, or of photos in which the family has `seen` one, after all edits.

    Raises `invalid_latents` and `invalid_request` before anything is computed, and where an edit cannot be done.
    """
    checks.check(request)
    now = seen
    if now is None:
        seeded = model.sample(request.seed, request.truncation_psi, request.parameters)
        now = _with_maps(_given(seeded, request.latents or {}, model), request.latent_maps, maps)
    for edit in _steps(request):
        now = apply(edit, now, request, model, maps)
    return now


def _with_maps(person: Latents, names: Mapping[str, str], maps: Maps | None) -> Latents:
    return replace(person, maps={name: (maps or {})[image] for name, image in names.items()}) if names else person


def words_ignored(request: GenerateRequest) -> list[str]:
    """Everything in prompt and words edits that was not understood, in order."""
    attributes = families.info(request.family).attributes
    return [
        word
        for edit in _steps(request)
        if isinstance(edit, Words)
        for word in words.understand(edit.text, attributes).ignored
    ]


def apply(edit: Edit, now: Latents, request: GenerateRequest, model: FamilyModel, maps: Maps | None = None) -> Latents:
    """One edit of one person; seeds are drawn with the truncation and parameters of the request."""
    info = families.info(model.name)

    def sample(seed: int, truncation_psi: float = request.truncation_psi) -> Latents:
        return model.sample(seed, truncation_psi, request.parameters)

    def person(other: Person) -> Latents:
        if other.seed is not None:
            return sample(other.seed, other.truncation_psi)
        whole = latents.from_rows(model.name, other.latents or {}, model.device)
        checks.complete(info, whole.codes, latents.parts_of(now)[0])
        return _with_maps(whole, other.latent_maps, maps)

    match edit:
        case Mix():
            return latents.mix(now, person(edit.other), edit.amount, edit.kinds)
        case Vary():
            mean = {name: code for name, code in sample(edit.seed, 0.0).codes.items() if info.codes[name].normal}
            return latents.vary(now, sample(edit.seed), edit.amount, edit.parts, edit.kinds, mean)
        case TakeParts():
            return latents.take_parts(now, person(edit.other), edit.parts, edit.kinds)
        case Remove():
            return latents.remove(now, edit.parts)
        case Reroll():
            return latents.reroll(now, sample(edit.seed), edit.lock, edit.kinds)
        case SetValues():
            return latents.keep_maps(now, model.edit(now, edit.values))
        case Words():
            said = words.understand(edit.text, info.attributes, model.describe(now))
            return latents.keep_maps(now, model.edit(now, said.values)) if said.values else now


def _given(seeded: Latents, rows: dict[str, list[list[float]]], model: FamilyModel) -> Latents:
    """The seed's codes with the given ones in place; given ones with a whole body are a whole person."""
    given = latents.from_rows(model.name, rows, model.device).codes
    body = latents.parts_of(seeded)[0]
    is_whole = all(name in given for name in seeded.codes if name.partition("/")[0] == body)
    codes = given if is_whole else {**seeded.codes, **given}
    checks.complete(families.info(model.name), codes, body)
    return Latents(model.name, codes)


def _steps(request: GenerateRequest) -> list[Edit]:
    prompt = [] if request.prompt is None else [Words(op="words", text=request.prompt)]
    return [*prompt, *request.edits]
