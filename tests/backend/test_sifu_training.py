# SPDX-License-Identifier: GPL-3.0-or-later
"""Training of SIFU at tiny size: one capsule human is learned by heart, runs go on where they were, weights travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backend import __main__ as cli
from backend.families.sifu.config import Config, normal_sizes
from backend.families.sifu.prior import SkinnedBody, rest_placed
from backend.families.sifu.query import Answers, BodySpeaker, Query
from backend.families.sifu.stages import Stages
from backend.families.sifu.surface import cube_mesh
from backend.families.sifu.training import Scan, Settings, SifuStage, disturbed, export, make_item
from backend.families.sifu.views import normal_views
from backend.geometry.body import BodyMesh
from backend.geometry.clean import clean
from backend.training.loop import Box, run
from backend.weights import Weights, sha256_of
from tests.backend.sifu_bodies import capsule_body


def clothed() -> tuple[SkinnedBody, Scan]:
    """The capsule person in a coat: the body 3 cm thicker below the neck, in the colours of its codes."""
    body = capsule_body(3000)
    placed = rest_placed(body)
    bare = BodyMesh(body.template, body.faces, body.template)
    coat = body.template + 0.03 * bare.winding_normals * (body.template[:, 1:2] < 1.4)
    return body, Scan(placed.to_network(coat), body.faces, 0.2 + 0.6 * body.codes, placed)


@pytest.mark.parametrize("kind", ["sifu", "gta"])
def test_one_capsule_human_is_learned_in_a_minute(kind: Any, tmp_path: Path) -> None:
    body, scan = clothed()
    config = Config.tiny(kind)
    items = [make_item(scan, body, config.image, np.random.default_rng(i), noise=0.3) for i in range(2)]
    settings = Settings(batch=2, rate=4e-3, steps=80, geometry=1500, colors=500)
    stage = SifuStage(config, items, settings, 0)
    first: dict[str, float] = {}
    for step in range(settings.steps):
        for phase in stage.phases(step, range(2)):
            phase.optimiser.zero_grad()
            loss, figures = phase.loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(phase.optimiser.param_groups[0]["params"], phase.clip)
            phase.optimiser.step()
            first = first if step else {**first, **figures}
            last = figures
    assert last["right"] > 0.95
    assert last["color"] < 0.5 * first["color"]
    path = tmp_path / f"{kind}.safetensors"
    export(stage.network, path)
    stages = Stages.of_files(Weights(kind, sha256_of(path), (path,)), torch.device("cpu"))
    assert stages.config == config
    speaker = BodySpeaker(scan.placed.mesh(body))
    image = stage_image(items[0])
    views = {s: v[None, :3] for s, v in normal_views(speaker.body.vertices, body.faces, config.image).items()}
    front, back = stages.normals(image, views)
    wanted = normal_views(scan.vertices, scan.faces, config.image, ("F",))["F"][:3]
    with torch.no_grad():
        planes = stages.planes(image, front, back, views)
        answers = Answers(Query(planes, speaker, kind), stages.decoders)
        mesh = clean(cube_mesh(answers.occupancy, 96, "full"))
    truth = BodyMesh(scan.vertices, scan.faces, scan.vertices)
    off = truth.nearest(mesh.vertices).distance
    bare = truth.nearest(speaker.body.vertices).distance
    assert off.mean() < 0.6 * bare.mean()  # better than the body that it was told
    assert off.mean() < 0.014
    mask = (image[0] != 0).any(0)
    assert (front[0] - wanted).abs().mean(0)[mask].mean() < 0.25


def stage_image(item: Any) -> torch.Tensor:
    rgba = item["photo"].float()[None] / 255
    return (rgba[:, :3] * 2 - 1) * (rgba[:, 3:] > 0.5)


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    body, scan = clothed()
    config = Config.tiny()
    items = [make_item(scan, body, config.image, np.random.default_rng(0))]
    settings = Settings(batch=1, steps=4, geometry=200, colors=100)

    def steps(folder: Path, *until: int) -> SifuStage:
        for count in until:
            stage = SifuStage(config, items, settings, 0)
            run(stage, folder, Box(max_steps=count))
        return stage

    one, two = steps(tmp_path / "a", 4), steps(tmp_path / "b", 2, 4)
    for (name, a), b in zip(one.network.state_dict().items(), two.network.state_dict().values()):
        if "num_batches_tracked" not in name:
            assert torch.equal(a, b), name


def test_the_body_that_is_told_is_never_exact() -> None:
    body, scan = clothed()
    rng = np.random.default_rng(0)
    off = [(disturbed(scan.placed, rng).vertices(body) - scan.placed.vertices(body)).norm(dim=1).mean()
           for _ in range(5)]  # fmt: skip
    assert 0.005 < np.mean(off) < 0.05
    item = make_item(scan, body, 64, rng, noise=0.0)
    assert torch.allclose(item["vertices"], scan.placed.vertices(body), atol=1e-5)
    truth = BodyMesh(scan.vertices, scan.faces, scan.vertices)
    assert torch.equal(item["occupied"], truth.inside(item["points"]))
    assert 0.15 < item["occupied"].float().mean() < 0.6
    outside = item["points/values"][:, 0] < -0.06
    assert not item["occupied"][outside].any()


def test_the_command_trains_on_sampled_people(tmp_path: Path) -> None:
    """One person, one step: what is written loads as the family's weights."""
    out = tmp_path / "sifu.safetensors"
    assert cli.main(["train", "--family", "sifu", "--size", "tiny", "--people", "1", "--max-steps", "1", "--threads",
                     "1", "--device", "cpu", "--resume", str(tmp_path / "run"), "--export", str(out)]) == 0  # fmt: skip
    stages = Stages.of_files(Weights("sifu", sha256_of(out), (out,)), torch.device("cpu"))
    assert stages.config == Config.tiny()
    other = SifuStage(Config.small(), [], Settings(), 0).network.normal_filter
    assert other is not None
    strangers = tmp_path / "normals.safetensors"
    save_file({f"normal_filter.{name}": tensor for name, tensor in other.state_dict().items()}, strangers,
              normal_sizes(Config.small()))  # fmt: skip
    both = Stages.of_files(Weights("sifu", "", (out, strangers)), torch.device("cpu"))
    assert both.config == Config.tiny()  # imported normal networks of others do not take the place of its own
    assert len(list((tmp_path / "run" / "items_128").glob("*.safetensors"))) == 2
    figures = list((tmp_path / "run" / "figures").glob("*"))
    written = figures[0].stat().st_mtime_ns
    assert cli.main(["train", "--family", "gta", "--size", "tiny", "--people", "1", "--max-steps", "1", "--threads",
                     "1", "--device", "cpu", "--resume", str(tmp_path / "run")]) == 0  # fmt: skip
    assert figures[0].stat().st_mtime_ns == written  # the people of the run are there already
    assert (tmp_path / "run" / "gta.safetensors").is_file()
