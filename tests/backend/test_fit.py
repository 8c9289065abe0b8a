# SPDX-License-Identifier: GPL-3.0-or-later
"""The fit from end to end on a small part of the MakeHuman kit: folder in, weights out, people from the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from backend import weights
from backend.families.people import model as people_model
from backend.families.people.config import BROW, IRIS, SKIN
from backend.geometry.clean import clean
from backend.geometry.tetgrid import extract_surface
from backend.pipeline import mesh_facts
from backend.training import people

KIT = Path(os.environ.get("MAKEHUMAN_DATA", Path(__file__).parents[3] / "shared" / "data" / "makehuman"))
OUTFITS = ("male_casualsuit04", "shoes02")
KEPT = {"hair": ("short01",), "eyebrows": ("eyebrow001", "eyebrow004"), "skins": ("young_asian_male", "old_asian_male",
        "young_caucasian_female", "textures")}  # fmt: skip
SKINS = ["old_asian_male", "young_asian_male", "young_caucasian_female", "young_caucasian_female2"]  # one is a variant
PEOPLE = 80

pytestmark = pytest.mark.skipif("SLOW_TESTS" not in os.environ, reason="takes minutes; asked for by SLOW_TESTS=1")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to the kit with two outfits, one hair style, two brows and three skins."""
    if not (KIT / "3dobjs" / "base.obj").exists():
        pytest.skip("no MakeHuman assets here")
    root = tmp_path_factory.mktemp("kit")
    for entry in KIT.iterdir():
        if entry.is_dir() and entry.name not in KEPT:
            (root / entry.name).symlink_to(entry)
    for folder, names in KEPT.items():
        for name in names:  # of links to files: those to folders are not searched
            shutil.copytree(KIT / folder / name, root / folder / name, copy_function=os.symlink)
    garments = json.loads((KIT / "garments.json").read_text(encoding="utf-8"))
    (root / "garments.json").write_text(json.dumps({k: garments[k] for k in OUTFITS}), encoding="utf-8")
    return root


@pytest.mark.filterwarnings("ignore:One of the clusters is empty")
def test_a_folder_becomes_people(kit: Path, tmp_path: Path) -> None:
    file = people.fit(kit, tmp_path, "tiny", seed=3, people=PEOPLE, steps=60)
    model = people_model.load(torch.device("cpu"), weights.Weights("people", weights.sha256_of(file), (file,)))
    assert [i["name"] for i in model.facts["items"]["top"]] == ["male_casualsuit04/top"]
    assert (model.facts["skins"], model.facts["brows"]) == (SKINS, list(KEPT["eyebrows"]))
    for seed in range(3):
        latents = model.sample(seed, 0.7)
        for choice in (SKIN, BROW, IRIS):  # one of each, no blend
            assert float(latents.codes["body/tex"][0, choice].sum()) == pytest.approx(1)
        with torch.no_grad():
            field = model.decode(latents)[0]
        mesh = clean(extract_surface(field, 80))
        assert mesh_facts(mesh.faces.numpy(), len(mesh.vertices))["closed"]
        said = float(model.describe(latents)["height_m"])  # type: ignore[arg-type]
        assert said - 0.02 < float(mesh.vertices[:, 1].max() - mesh.vertices[:, 1].min()) < said + 0.2  # hair, soles
        with torch.no_grad():
            roughness = field.material(mesh.points)[:, 0]
        assert 0.05 < float(roughness.min()) < float(roughness.max()) < 0.95
