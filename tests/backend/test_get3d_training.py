# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D learns from folders of renders: what critics see, gradients, resuming, several processes, the command."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.__main__ import main
from backend.families.get3d.surfaces import c2w_of
from backend.families.get3d.training import SIZES, Get3dStage, angles, as_seen, at_size, on_white
from backend.protocol import PopulaceError
from backend.training import checkpoint, loop, renders
from backend.training.renders_blender import looking_at
from tests.backend import render_folders

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("renders") / "set"
    render_folders.write(path, "get3d", count=24, views=3)
    return path


@pytest.fixture
def stage(folder: Path) -> Get3dStage:
    return Get3dStage(renders.read(folder), TINY)


def test_angles_are_the_authors() -> None:
    rng = np.random.default_rng(0)
    azimuth = torch.from_numpy(rng.uniform(0, 2 * math.pi, 20)).float()
    polar = torch.from_numpy(rng.uniform(0.3, 2, 20)).float()
    found = angles(c2w_of(azimuth, polar))
    assert torch.allclose(found, torch.stack([azimuth, polar], 1), atol=1e-5)
    behind = torch.from_numpy(looking_at(np.zeros(3), math.pi, 0.2, 1.2)).float()[None]
    assert angles(behind)[0].tolist() == pytest.approx([0, math.pi / 2 - 0.2], abs=1e-5)  # fronts look along -Z


def test_reals_as_critics_see_them(stage: Get3dStage) -> None:
    pictures, cameras = stage.reals(0, range(4))
    assert pictures.shape == (4, 4, 32, 32)
    mask = pictures[:, 3]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert bool((pictures[:, :3][(mask == 0)[:, None].expand(-1, 3, -1, -1)] == -1).all())
    assert bool(((cameras[:, 1] > 1.2) & (cameras[:, 1] <= math.pi / 2)).all())
    again, _ = stage.reals(0, range(2, 4))
    assert torch.equal(again, pictures[2:])  # a share of the batch
    half = np.full((16, 16, 4), 100, np.uint8)
    assert as_seen(half)[:, 0, 0].tolist() == pytest.approx([-1, -1, -1, 100 / 255])
    assert on_white(pictures)[0, :, 0, 0].tolist() == [1, 1, 1]


def test_fakes_are_seen_by_the_folders_cameras_and_teach_every_layer(stage: Get3dStage) -> None:
    fakes = stage.fakes(0, range(4))
    assert fakes.pictures.shape == (4, 4, 32, 32)
    known = angles(torch.from_numpy(np.stack([view.c2w for view in stage.pool.views])))
    assert float((fakes.cameras[:, None] - known).abs().sum(2).amin(1).max()) < 1e-6
    mask = fakes.pictures[:, 3].detach()
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1
    outside = fakes.pictures.detach()[:, :3].permute(0, 2, 3, 1)[mask == 0]
    assert torch.allclose(outside, torch.tensor(-1.0))  # the bias
    (fakes.pictures.square().sum() + fakes.shapes.cross).backward()
    noises = [name for name in stage.learned if "noise_strength" in name]
    without = [k for k, p in stage.learned.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert len(noises) == 5
    assert without == []


def test_a_shape_without_surface_learns_by_its_values_alone(stage: Get3dStage) -> None:
    layer = stage.generator.synthesis.generator.mlp_synthesis_sdf.layers[1]
    with torch.no_grad():
        layer.bias.fill_(50.0)
    fakes = stage.fakes(0, range(2))
    assert float(fakes.shapes.empty.detach()) == pytest.approx(50, rel=0.1)
    fakes.shapes.empty.backward()
    assert float(layer.bias.grad) > 0  # down, towards a change of sign


def test_flexicubes_learns_too(folder: Path) -> None:
    settings = at_size("tiny", config=replace(TINY.config, surface="flexicubes", deformation_multiplier=2.0))
    stage = Get3dStage(renders.read(folder), settings)
    good, figures = loop._step(stage, 1, loop.World())
    assert good
    assert figures["generator/gradient"] > 0
    shapes = stage.fakes(2, range(2)).shapes
    assert float(shapes.weights.detach()) > 0
    shapes.regulariser().backward()
    assert "synthesis.generator.mlp_synthesis_weight.layers.0.weight" in {
        name for name, p in stage.learned.items() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }


def test_materials_learn_in_light_that_the_key_tells(folder: Path) -> None:
    stage = Get3dStage(renders.read(folder), at_size("tiny", config=replace(TINY.config, material=True)))
    good, _ = loop._step(stage, 1, loop.World())
    assert good
    one, again, other = (stage.fakes(step, range(2)).pictures for step in (2, 2, 3))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    one[:, :3].square().sum().backward()
    head = stage.generator.synthesis.to_material
    assert head.bias.grad is not None
    assert (head.bias.grad != 0).all()


def test_styles_are_mixed_by_rows_in_most(stage: Get3dStage) -> None:
    geo, tex = stage.rows(3, range(64))
    for ws in (geo, tex):
        mixed = (ws[:, 0] != ws[:, -1]).any(1).float().mean()
        assert 0.75 < float(mixed) < 1
    own = stage.generator.mapping_geo(torch.cat([stage.codes([0, 3, i, 0])[0] for i in range(64)]))
    assert torch.allclose(geo[:, 0], own[:, 0])  # the first row is never another's


def test_r1_runs_lazily_on_both_critics(stage: Get3dStage) -> None:
    told = [loop._step(stage, step, loop.World())[1] for step in (0, 1, 16)]
    assert ["critic/rgb_r1" in t and "critic/mask_r1" in t for t in told] == [True, False, True]
    assert all(math.isfinite(value) for t in told for value in t.values())


def test_a_resumed_run_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    def run(where: Path, *until: int) -> dict[str, torch.Tensor]:
        for steps in until:
            loop.run(
                Get3dStage(renders.read(folder), at_size("tiny", measure_every=99)), where, loop.Box(max_steps=steps)
            )
        return checkpoint.load(where / loop.CHECKPOINT)[0]

    whole, pieces = run(tmp_path / "a", 4), run(tmp_path / "b", 2, 4)
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_two_processes_share_a_batch(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["train", "--family", "get3d", "--renders", str(folder), "--size", "tiny", "--max-steps", "3",
             "--device", "cpu", "--out"]  # fmt: skip
    command = [sys.executable, "-m", "backend", *words, str(tmp_path / "two")]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    assert main([*words, str(tmp_path / "one")]) == 0
    one, two = (checkpoint.load(tmp_path / k / "get3d" / loop.CHECKPOINT)[0] for k in ("one", "two"))
    assert one.keys() == two.keys()
    # critics compare samples in groups, and groups end where a process's share does: alike, not equal
    for key in ("generator/mapping.fc0.weight", "generator/synthesis.to_rgb.bias", "critics/b4.out.weight"):
        start = torch.nn.functional.cosine_similarity(one[key].flatten(), two[key].flatten(), 0)
        assert float(start) > 0.98, key
    assert torch.allclose(one["generator/mapping.w_avg"], two["generator/mapping.w_avg"], atol=2e-3)


def test_the_command_makes_weights_that_make_objects(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    words = ["train", "--family", "get3d", "--renders", str(folder), "--resolution", "16", "--out", str(run), "--size",
             "tiny", "--max-steps", "5", "--device", "cpu"]  # fmt: skip
    assert main(words) == 0
    assert '"frechet"' in (run / "get3d" / "log.jsonl").read_text()
    assert list((run / "get3d" / "sheets").glob("*.png"))
    assert main(["weights", "import", str(run / "get3d.safetensors"), "--name", "balls", "--licence", "CC0-1.0"]) == 0
    assert main(["weights", "use", "balls", "--for", "get3d"]) == 0
    made = ["generate", "--family", "get3d", "--seed", "2", "--grid-resolution", "24", "--faces", "500",
            "--texture-size", "512", "--device", "cpu", "--out", str(tmp_path / "made")]  # fmt: skip
    assert main(made) == 0
    assert list((tmp_path / "made").glob("*.glb"))
    capsys.readouterr()
    assert main([*words, "--seed", "1"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_what_is_not_for_get3d_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_folders.write(tmp_path / "flat", "get3dhuman", count=2)
    with pytest.raises(PopulaceError, match="are orthographic"):
        Get3dStage(renders.read(tmp_path / "flat"), TINY)
    few = renders.read(folder)
    with pytest.raises(PopulaceError, match="items are too few"):
        Get3dStage(few.part(False), TINY)
    item = few.items[0]
    astray = {name: c2w + np.eye(4, k=3, dtype=np.float32) * 0.2 for name, c2w in item.cameras.items()}
    moved = renders.Item(item.name, astray)
    with pytest.raises(PopulaceError, match=r"ball_000/00.png does not look at the origin"):
        Get3dStage(renders.Renders(few.folder, 32, few.lens, 0, (moved, *few.items[1:])), TINY)
    assert main(["train", "--family", "get3d", "--out", str(tmp_path / "run")]) == 2
    assert "is trained on renders" in capsys.readouterr().err
    assert main(["train", "--family", "get3d", "--renders", str(folder), "--out", "x", "--stage", "fit"]) == 2
    assert "has no stage 'fit'" in capsys.readouterr().err
