# SPDX-License-Identifier: GPL-3.0-or-later
"""Get3DHuman learns from folders of renders: what is inside, and every stage of the command."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.__main__ import main
from backend.families.get3dhuman import losses
from backend.families.get3dhuman.config import DISTANCE, SCALE, to_ndc, to_world
from backend.families.get3dhuman.networks import Get3DHuman
from backend.families.get3dhuman.people import People, to_picture
from backend.families.get3dhuman.stages import SIZES, DistillStage, RefineStage, TeacherStage
from backend.families.get3dhuman.teacher import Teacher
from backend.families.get3dhuman.training import Branch
from backend.protocol import PopulaceError
from backend.training import checkpoint, loop, renders
from tests.backend import render_folders

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
Known = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Known]:
    path = tmp_path_factory.mktemp("renders") / "set"
    return path, render_folders.write(path, "get3dhuman", count=24, size=32)


@pytest.fixture(scope="module")
def people(folder: tuple[Path, Known]) -> People:
    return People(renders.read(folder[0], maps=True))


def test_what_a_front_camera_sees(people: People, folder: tuple[Path, Known]) -> None:
    item = people.items[3]
    centre, half = folder[1][item.name]
    seen = people.seen([item])
    assert seen.picture.shape == (1, 3, 32, 32)
    mask = seen.mask[0, 0]
    assert bool((seen.depth[0, 0][~mask] == 1).all())
    nearest = -to_picture(np.array([[0.0, 0.9, float(half[2])]]))[0, 2]
    assert float(seen.depth.min()) == pytest.approx(float(nearest), abs=0.01)
    found = losses.normals_of_depth(seen.depth)[0]
    inner = torch.nn.functional.avg_pool2d(mask[None, None].float(), 5, 1, 2)[0, 0] == 1
    cosine = (found * seen.normal[0]).sum(0)[inner]
    assert float(cosine.mean()) > 0.95  # depth and normals speak of one surface
    rows = mask.any(1).nonzero()
    top = to_picture(np.array([[0.0, float(centre[1] + half[1]), 0.0]]))[0, 1]
    assert float(2 * rows[0] / 31 - 1) == pytest.approx(float(top), abs=3 / 31)  # the apex is less than a pixel wide


def test_places_are_those_of_the_family() -> None:
    metres = np.random.default_rng(0).uniform(-1, 1, (9, 3))
    ndc = to_picture(metres)
    assert torch.allclose(ndc, to_ndc(torch.from_numpy(100 * metres).float()), atol=1e-5)
    assert np.allclose(to_world(ndc).numpy() / 100, metres, atol=1e-5)


def test_inside_is_what_no_view_sees_through(people: People, folder: tuple[Path, Known]) -> None:
    item = people.items[0]
    centre, half = folder[1][item.name]
    ndc, value = people.occupancy(item, 4000, np.random.default_rng(0))
    points = to_world(ndc).numpy() / 100
    radius = np.sqrt((((points - centre) / half) ** 2).sum(1))
    assert 0.2 < float(value.mean()) < 0.8
    clear = np.abs(radius - 1) * half.min() > 0.08  # a pixel is 7 cm
    truth = (radius > 1)[clear]
    wrong = (value.numpy()[clear] > 0.5) != truth
    assert wrong[truth].mean() < 0.1  # four views leave corners of their common prism
    assert wrong[~truth].mean() < 0.01
    depth = np.abs(radius - 1) * half.min() * 100 * SCALE  # ndc, less than the way to the surface
    told = (2 * value.numpy() - 1) * DISTANCE
    assert np.abs(told[clear & (radius < 1)] + depth[clear & (radius < 1)]).mean() < 0.05
    assert value.numpy().min() < 0.2  # deep inside
    assert (value.numpy() == 1).any()


def test_colours_are_of_the_surface(people: People, folder: tuple[Path, Known]) -> None:
    item = people.items[0]
    centre, half = folder[1][item.name]
    ndc, rgb = people.colors(item, 400, np.random.default_rng(0))
    points = to_world(ndc).numpy() / 100
    radius = np.sqrt((((points - centre) / half) ** 2).sum(1))
    assert np.median(np.abs(radius - 1)) < 0.1
    assert len(rgb.unique(dim=0)) == 1
    assert (points[:, 2] > 0.1).any()
    assert (points[:, 2] < -0.1).any()


def test_codes_begin_with_what_is_known(people: People) -> None:
    item = people.items[2]
    one, two = people.z(item, 16, "shape"), people.z(item, 16, "texture")
    assert torch.equal(one[:4], two[:4])
    assert not torch.equal(one[4:], two[4:])
    assert torch.equal(one, people.z(item, 16, "shape"))
    assert len(people.z(item, 3, "shape")) == 3


def test_codes_are_standard_normal_together(people: People) -> None:
    """Three numbers that say almost the same, one that is rare, one that everybody has: as colours and words are."""
    rng = np.random.default_rng(0)
    same, found = rng.standard_normal(len(people.items)), []
    for i, item in enumerate(people.items):
        code = [*(same[i] + 0.1 * rng.standard_normal(3)), 5.0 if i == 3 else -0.9, 0.7, rng.standard_normal()]
        found.append(renders.Item(item.name, item.cameras, item.unit_m, tuple(code)))
    told = People(replace(people.renders, items=tuple(found)))
    known = np.array([told.z(item, 9, "shape").numpy() for item in found if not item.held_out])[:, :5]
    assert np.abs(known.mean(0)).max() < 0.2
    assert np.abs(np.cov(known, rowvar=False) - np.eye(5)).max() < 0.3
    assert abs(np.corrcoef(known[:, 0], [i.code[0] for i in found if not i.held_out])[0, 1]) > 0.9  # alike stays alike
    bare = People(replace(people.renders, items=tuple(replace(item, code=()) for item in found)))
    assert bool(torch.isfinite(bare.z(bare.items[0], 9, "shape")).all())


def steps(stage: TeacherStage | DistillStage | RefineStage, count: int) -> list[dict[str, float]]:
    told = []
    for step in range(count):
        good, figures = loop._step(stage, step, loop.World())
        assert good
        assert all(math.isfinite(value) for value in figures.values())
        told.append(figures)
    return told


def test_the_teacher_learns_all_five_things(people: People) -> None:
    settings = replace(TINY, batch=4, points=256, measure_every=1000)
    stage = TeacherStage(people, settings, 0, CPU)
    before = stage.measure()
    steps(stage, 100)
    after = stage.measure()
    assert before.keys() == after.keys()
    for name, share in {"mask": 0.95, "normal": 0.5, "depth": 0.5, "occupancy": 0.65, "color": 0.85}.items():
        assert after[name] < share * before[name], name


@pytest.mark.parametrize("branch", ["shape", "texture"])
def test_a_branch_learns_from_codes(people: People, branch: Branch) -> None:
    teacher = TeacherStage(people, TINY, 0, CPU)
    torch.manual_seed(1)
    student = Get3DHuman(teacher.settings.config, discriminators=True)
    stage = DistillStage(people, replace(TINY, measure_every=1000), student, teacher.teacher, branch, 0, CPU)
    before = stage.measure()
    told = steps(stage, 40)
    after = stage.measure()
    assert after["latent"] < 0.65 * before["latent"]
    assert math.isfinite(after["frechet"])
    assert stage.bounds().keys() == {"real", "teacher"}
    assert "path/loss" in told[0]
    assert "path/loss" not in told[1]
    assert stage.sheet(2).shape == (160, 64, 3)


def test_resumed_distillation_ends_with_the_same_bytes(people: People, tmp_path: Path) -> None:
    teacher = TeacherStage(people, TINY, 0, CPU).teacher

    def run(where: Path, *until: int) -> dict[str, torch.Tensor]:
        for count in until:
            torch.manual_seed(1)
            student = Get3DHuman(replace(TINY.config, resolution=32), discriminators=True)
            stage = DistillStage(people, TINY, student, teacher, "shape", 0, CPU)
            loop.run(stage, where, loop.Box(max_steps=count))
        return checkpoint.load(where / loop.CHECKPOINT)[0]

    whole, pieces = run(tmp_path / "a", 6), run(tmp_path / "b", 3, 6)
    assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_refined_pictures_come_nearer(people: People) -> None:
    torch.manual_seed(0)
    teacher = Teacher(replace(TINY.config, resolution=32), TINY.residues)
    stage = RefineStage(people, replace(TINY, batch=4), teacher, 0, CPU)
    assert stage.measure().keys() == {"fool", "matching", "moduli", "difference", "before"}
    told = [figures["refine/difference"] for figures in steps(stage, 40)]
    assert sum(told[-5:]) < 0.95 * sum(told[:5])
    assert stage.sheet(2).shape == (96, 64, 3)


def test_the_command_goes_through_all_stages(
    folder: tuple[Path, Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    words = ["train", "--family", "get3dhuman", "--renders", str(folder[0]), "--out", str(run), "--size", "tiny",
             "--max-steps", "3", "--device", "cpu"]  # fmt: skip
    assert main([*words, "--stage", "texture"]) == 1
    assert "begins where teacher ends" in capsys.readouterr().err
    assert main(words) == 0
    for name in ("teacher", "shape", "texture", "refine"):
        assert (run / name / loop.CHECKPOINT).exists()
    made = run / "get3dhuman.safetensors"
    assert main(["weights", "import", str(made), "--name", "pillars", "--licence", "CC0-1.0"]) == 0
    assert main(["weights", "use", "pillars", "--for", "get3dhuman"]) == 0
    from backend import families
    from backend.settings import Settings

    model = families.load("get3dhuman", "cpu", Settings.load())
    (field,) = model.decode(model.sample(0, 1.0, {}), look="published")  # type: ignore[call-arg]
    assert field.look == "published"  # type: ignore[attr-defined]  # so there is a refine net


def test_folders_of_another_framing_are_refused(folder: tuple[Path, Known], tmp_path: Path) -> None:
    render_folders.write(tmp_path / "g3", "get3d", count=2)
    with pytest.raises(PopulaceError, match="not framed as Get3DHuman's pictures: perspective"):
        People(renders.read(tmp_path / "g3"))
    found = renders.read(folder[0], maps=True)
    wide = replace(found, lens=renders.Lens(half_height=2.0))
    with pytest.raises(PopulaceError, match="half_height 2 instead of"):
        People(wide)
    item = found.items[0]
    sides = renders.Item(item.name, {k: v for k, v in item.cameras.items() if k != "00"})
    with pytest.raises(PopulaceError, match=f"{item.name} has no front view"):
        People(replace(found, items=(sides,)))
