# SPDX-License-Identifier: GPL-3.0-or-later
"""How people's pictures are compared: a field is seen as its renders are, and unlike pictures are further away."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.evaluation.features import Target
from backend.families.get3dhuman.config import to_world
from backend.families.get3dhuman.likeness import Likeness, of_field, of_people, seen_from
from backend.families.get3dhuman.networks import Get3DHuman
from backend.families.get3dhuman.people import People, angle
from backend.families.get3dhuman.stages import SIZES
from backend.families.get3dhuman.tracer import rays
from backend.training import renders
from backend.training.renders import Item, Lens, Renders, View, Writer
from backend.training.renders_blender import cameras, lens
from tests.backend import render_folders

SIZE = 64
CENTRE, HALF = np.array([0.25, 0.8, -0.1]), np.array([0.2, 0.6, 0.35])  # no two sides are alike


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    path = tmp_path_factory.mktemp("renders") / "set"
    render_folders.write(path, "get3dhuman", count=40, size=32)
    return People(renders.read(path, maps=True))


def one_person(folder: Path) -> Renders:
    """An ellipsoid beside the axis whose red grows with x, green with z."""
    through = Lens(half_height=lens("get3dhuman", SIZE)["half_height"])
    writer, placed = Writer(folder, SIZE, through, True), cameras("get3dhuman", 4, [0])
    for name, c2w in placed.items():
        mask, depth, normal = render_folders.ellipsoid(c2w, through, SIZE, CENTRE, HALF)
        line = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
        x, y = np.meshgrid(line, -line)
        at = c2w[:3, 3] + through.half_height * (x[..., None] * c2w[:3, 0] + y[..., None] * c2w[:3, 1])
        at = at - depth[..., None] * c2w[:3, 2]
        rgb = np.stack([at[..., 0] + 0.3, at[..., 2] + 0.6, 0 * x], -1)
        rgba = np.concatenate([rgb * mask[..., None], mask[..., None]], -1)
        writer.picture("one", name, np.uint8(rgba.clip(0, 1) * 255), depth, normal)
    writer.item(Item("one", placed))
    writer.close()
    return renders.read(folder, maps=True)


@pytest.mark.parametrize("side", ["00", "01", "02", "03"])
def test_a_field_is_seen_as_its_renders_are(tmp_path: Path, side: str) -> None:
    found = People(one_person(tmp_path / "one"))
    view = View(found.items[0], side)
    turned = angle(view)
    assert turned is not None
    assert rays(SIZE, turned, torch.zeros(()))[1].tolist() == pytest.approx((-view.c2w[:3, 2]).tolist(), abs=1e-5)
    centre, half = torch.tensor(CENTRE), torch.tensor(HALF)

    def metres(ndc: torch.Tensor) -> torch.Tensor:
        return to_world(ndc).double() / 100

    def occupancy(ndc: torch.Tensor) -> torch.Tensor:
        radius = ((metres(ndc) - centre) / half).square().sum(1).sqrt()
        return torch.sigmoid(1.5 * (radius - 1)).float()  # steps no longer than the way

    def color(ndc: torch.Tensor) -> torch.Tensor:
        at = metres(ndc).float()
        return torch.stack([at[:, 0] + 0.3, at[:, 2] + 0.6, 0 * at[:, 0]], 1).clamp(0, 1)

    real = found.seen_by([view])
    made = seen_from(turned, occupancy, color, SIZE, torch.zeros(()))
    both = made.mask & real.mask
    assert int((made.mask ^ real.mask).sum()) < 0.06 * int(real.mask.sum())  # the edge
    assert float((made.depth - real.depth)[both].abs().mean()) < 0.01
    inner = torch.nn.functional.avg_pool2d(both.float(), 5, 1, 2) == 1
    for look in ("shape", "texture"):
        difference = (of_people(made, look) - of_people(real, look)).abs().mean(1, keepdim=True)  # type: ignore[arg-type]
        assert float(difference[inner].mean()) < 0.03, look
    assert float(made.picture.amax()) > 0.2


def test_views_from_above_are_left_out() -> None:
    c2w = np.eye(4, dtype=np.float32)
    c2w[:3, 1], c2w[:3, 2] = [0, 0.8, -0.6], [0, 0.6, 0.8]
    item = Item("one", {"00": c2w, "01": np.eye(4, dtype=np.float32)})
    assert angle(View(item, "00")) is None
    assert angle(View(item, "01")) == 0


def test_real_people_are_nearer_than_blank_pictures(people: People) -> None:
    unseen = [item for item in people.items if item.held_out]
    seen = [item for item in people.items if not item.held_out]
    for look in ("shape", "texture"):
        likeness = Likeness(people, unseen, look, 4 * len(unseen))  # type: ignore[arg-type]
        assert len(likeness) == len(unseen)
        assert likeness.of_real(unseen) == pytest.approx(0, abs=1e-6)
        blank = likeness.target.distance(torch.ones(4 * len(unseen), 3, 32, 32))
        assert likeness.of_real(seen) < 0.3 * blank


def test_of_so_many_pictures_as_asked_for(people: People) -> None:
    assert len(Likeness(people, people.items, "shape", 13)) == 3  # people of four pictures each
    assert len(Likeness(people, people.items, "shape", 1)) == 1


def test_fields_are_measured_from_all_sides(people: People) -> None:
    """The same field gets the same distance, whatever the texture where shapes are looked at."""
    config = SIZES["tiny"].config
    torch.manual_seed(0)
    networks = Get3DHuman(config)
    volumes = torch.randn(3, 2, config.volume, 8, 8)
    likeness = Likeness(people, people.items[:3], "shape", 12)
    bare = likeness.distance(networks, [(shape, None) for shape, _ in volumes])
    assert math.isfinite(bare)
    assert likeness.distance(networks, [(shape, texture) for shape, texture in volumes]) == bare
    assert of_field(networks, (volumes[0, 0], volumes[0, 1]), "texture", 32, (0.0, 1.0)).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="zip"):
        likeness.distance(networks, [(volumes[0, 0], None)])


def test_a_target_tells_more_unlike_from_less_unlike() -> None:
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(24, 3, 8, 8, generator=random)
    target = Target(pictures)
    assert target.distance(pictures) == pytest.approx(0, abs=1e-6)
    dimmer = [target.distance(pictures * share) for share in (0.9, 0.6, 0.0)]
    assert dimmer == sorted(dimmer)
    assert dimmer[0] > 0.01
