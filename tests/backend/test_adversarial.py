# SPDX-License-Identifier: GPL-3.0-or-later
"""The adversarial stages: what critics see of people, anchors, gradients, resuming, and that the game is learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from backend import weights
from backend.families.people.model import PeopleModel, load
from backend.protocol import PopulaceError
from backend.render.camera import Camera, look_at, orthographic
from backend.render.volume import camera_rays, render_uniform
from backend.training import command, gan, loop
from backend.training.adversarial import (
    SIZES,
    VOLUMES,
    AdversarialStage,
    angle_between,
    draw_z,
    picture_of,
    superres,
    volume_of,
)
from backend.training.gan import Fakes, Game, augment
from backend.training.people_scene import PeopleScene, part_color, part_distances
from backend.training.splits import split_of
from backend.training.views import camera_of, make_reals, random_views

MINI = dataclasses.replace(SIZES["tiny"], height=16, coarse=16, volume=4, batch=4, warm_up=1, prior_every=2, pool=4,
                           sheet=1)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> weights.Weights:
    return weights.locate("people", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def frozen(path: weights.Weights) -> PeopleModel:
    return load(CPU, path)


def noise_shot(seed: int, views: object, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, *size, 4), dtype=np.uint8)


def stage_of(path: weights.Weights, settings=MINI, seed: int = 0, **options) -> AdversarialStage:
    reals = make_reals(noise_shot, 4, (settings.height, settings.height * 3 // 4), seed)
    return AdversarialStage(load(CPU, path), reals, settings, seed, **options)


def step_of(stage: Game, step: int, samples: range | None = None) -> None:
    for phase in stage.phases(step, samples or range(stage.batch)):
        phase.optimiser.zero_grad()
        phase.loss()[0].backward()
        phase.optimiser.step()
    stage.after(step)


# --- the game is learned ----------------------------------------------------------------------------------------------


class Ball:
    """A ball whose colour is read from a picture facing +Z."""

    parts = ("ball",)
    bounds = torch.tensor([[-0.35] * 3, [0.35] * 3])

    def __init__(self, skin: Tensor) -> None:
        self.skin = skin  # [3, R, R]

    def distances(self, points: Tensor, asked: Tensor | None = None) -> Tensor:
        return points.norm(dim=1, keepdim=True) - 0.3

    def color(self, part: int, points: Tensor) -> Tensor:
        at = (points[None, None, :, :2] / 0.35).to(self.skin)
        return functional.grid_sample(self.skin[None], at, align_corners=True)[0, :, 0].T


class Painter(Game):
    """Balls in two colours that vary; the generator's skin was blurred and dyed, and has to be learned back."""

    name = "painter"
    settings = gan.Settings(batch=8, base=12, limit=24, rate_critic=0.004, gamma=0.05, weight_volume=0.3, augment=0.0,
                            half_life=120.0, warm_up=20)  # fmt: skip

    def __init__(self, seed: int = 0) -> None:
        stripes = (torch.arange(8) // 2 % 2).float()[None, :, None].expand(1, 8, 8)
        self.true = torch.cat([0.2 + 0.6 * stripes, 0.3 + 0.2 * stripes, 0.7 - 0.4 * stripes])
        dyed = self.true.mean((1, 2), keepdim=True) + torch.tensor([0.35, -0.25, -0.3])[:, None, None]
        self.skin = nn.Parameter((dyed + 0.2 * (self.true - self.true.mean((1, 2), keepdim=True))).contiguous())
        c2w = look_at(torch.tensor([0.0, 0.0, 2.0]), torch.zeros(3))
        self.camera = Camera(c2w, orthographic(0.35, 0.75, 1.0, 3.0))
        super().__init__(self.settings, [({"skin": self.skin}, 0.02)], (16, 12), (4, 1), CPU, seed)

    def draw(self, skin: Tensor, keys: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pictures and volumes of people whose skins are lighter or darker."""
        line = (torch.arange(4) + 0.5) / 4 * 0.6 - 0.3
        points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
        pictures, volumes = [], []
        for key in keys:
            ball = Ball(skin + 0.1 * float(np.random.default_rng(key).normal()))
            seen = render_uniform(ball, camera_rays(self.camera, (16, 12), ball.bounds), 12, 0.01)
            pictures.append(picture_of(seen, (16, 12)))
            distance = ball.distances(points) / 0.3
            volumes.append(torch.cat([distance, ball.color(0, points) * 2 - 1], 1).T.reshape(4, 4, 4, 4))
        return torch.stack(pictures), torch.stack(volumes)

    def fakes(self, step: int, samples: range, anchored: bool = True) -> Fakes:
        pictures, volumes = self.draw(self.skin, [[self.seed, step, i] for i in samples])
        n = len(pictures)
        return Fakes(pictures, torch.zeros(n, 3), volumes, torch.ones(n, 1))

    @torch.no_grad()
    def reals(self, step: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        pictures, volumes = self.draw(self.true, [[self.seed, step, i, 1] for i in samples])
        return pictures, torch.zeros(len(pictures), 3), volumes

    def _keys(self, step: int, samples: range, purpose: int) -> list[list[int]]:
        return [[self.seed, step, i, purpose] for i in samples]

    def sheet(self) -> None:
        return None

    @torch.no_grad()
    def distance(self) -> float:
        """Between the mean pictures of the averaged model and of the truth: root mean square over the ball."""
        keys = [[0]]
        with self.average.in_place():
            fake, real = self.draw(self.skin, keys)[0], self.draw(self.true, keys)[0]
        return float((fake - real)[:, :3].square().mean().sqrt())


def test_the_game_teaches_the_generator(tmp_path: Path) -> None:
    """65 steps bring a dyed, blurred skin twice as near to the true one; critics alone move nothing."""
    stage = Painter()
    before = stage.distance()
    loop.run(stage, tmp_path, loop.Box(max_steps=20))
    assert stage.distance() == before
    loop.run(stage, tmp_path, loop.Box(max_steps=65))
    assert before > 0.5
    assert stage.distance() < before / 2


# --- people as scenes -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mapping_z_is_sampling(frozen: PeopleModel) -> None:
    from backend.families.base import seeded_normal

    z = draw_z([1, 2, 3], CPU)
    person = int(np.random.default_rng([1, 2, 3, 1]).integers(2**53))
    assert torch.equal(z["top/tex"], torch.from_numpy(seeded_normal(person, "top/tex", (1, 8))))
    codes, expected = frozen.mapped(z, 0.7).codes, frozen.sample(person, 0.7, {}).codes
    assert codes.keys() == expected.keys()
    assert all(torch.equal(codes[k], expected[k]) for k in codes)


@torch.no_grad()
def test_the_way_back_from_person_space(frozen: PeopleModel) -> None:
    """Points near the skin go to person space by the field's own offset and come back within millimetres."""
    field = frozen.decode(frozen.sample(3, 0.7))[0]
    scene = PeopleScene(field)
    generator = torch.Generator().manual_seed(0)
    points = field.bounds[0] + (field.bounds[1] - field.bounds[0]) * torch.rand(20000, 3, generator=generator)
    points = points[field.sdf(points).abs() < 0.02]
    person = points + field.offset(points) - torch.tensor([0, scene.floor, 0])
    error = (scene.canonical(person) - points).norm(dim=1)
    assert float(error.quantile(0.95)) < 0.005
    assert float(error.max()) < 0.015  # where the control points of fingers change
    assert ((person >= scene.bounds[0]) & (person <= scene.bounds[1])).all()
    bottom = scene.distances(torch.cartesian_prod(torch.linspace(-0.3, 0.3, 40), torch.tensor([-0.004, 0.006]),
                                                  torch.linspace(-0.15, 0.25, 40))).amin(1)  # fmt: skip
    assert (bottom[0:].reshape(40, 2, 40)[:, 0] > 0).all()  # nothing below the floor
    assert (bottom.reshape(40, 2, 40)[:, 1] < 0).any()


@torch.no_grad()
def test_asking_for_parts_gives_their_columns(frozen: PeopleModel) -> None:
    field = frozen.decode(frozen.sample(0, 0.7))[0]
    scene = PeopleScene(field)
    generator = torch.Generator().manual_seed(0)
    points = scene.bounds[0] + (scene.bounds[1] - scene.bounds[0]) * torch.rand(3000, 3, generator=generator)
    whole = scene.distances(points)
    assert whole.shape == (3000, len(scene.parts))
    everything = scene.distances(points, torch.ones_like(whole, dtype=torch.bool))
    assert torch.allclose(everything, whole)
    label = whole.argmin(1)
    asked = functional.one_hot(label, len(scene.parts)).bool()
    found = scene.distances(points, asked)
    own = found.gather(1, label[:, None]).squeeze(1)
    gap = (own - whole.gather(1, label[:, None]).squeeze(1)).abs()
    assert float((gap < 1e-6).float().mean()) > 0.98  # the rest lies where a part just begins to cover another
    assert float(gap[whole.amin(1).abs() < 0.01].max()) < 0.005
    assert (found[:, 1:][~asked[:, 1:]] == 1).all()
    canonical = scene.canonical(points)
    union = part_distances(field, canonical).amin(1)
    assert torch.allclose(union, field.sdf(canonical), atol=1e-6)
    near = union.abs() < 0.01
    for i, part in enumerate(scene.parts):
        at = near & (label == i)
        if at.any():
            assert torch.allclose(part_color(field, part, canonical[at]), field.color(canonical[at]), atol=1e-6)


@torch.no_grad()
def test_guided_people_look_like_people_of_432_samples(frozen: PeopleModel) -> None:
    """The colour, silhouette, depth and labels of 11 guided samples of the parts that matter, over 100 times fewer
    evaluations of local generators than 432 samples of all."""
    scene = PeopleScene(frozen.decode(frozen.sample(0, 0.7))[0])
    stage = object.__new__(AdversarialStage)
    stage.settings = dataclasses.replace(SIZES["base"], low_factor=2)
    view, size = np.array([0.5, 0.1, 0.0]), (96, 72)
    guided, guide, low = stage.render(scene, view, size)
    full = render_uniform(
        scene, camera_rays(camera_of(view, scene.joint("head")), size, scene.bounds), 432, stage.settings.beta
    )
    assert guided.asked < 11 * guided.rays * len(scene.parts) * 0.6
    assert full.asked / guided.asked > 100
    assert full.asked / (guided.asked + low.asked) > 15  # the small picture is half as high here, a quarter in superres
    solid = full.mask > 0.98
    assert float((guided.mask - full.mask).abs().mean()) < 0.003
    assert float((guided.rgb - full.rgb)[solid].abs().mean()) < 2 / 255
    assert float((guided.depth - full.depth)[solid].abs().median()) < 0.0005
    assert (guided.label.argmax(1) == full.label.argmax(1))[solid].float().mean() > 0.98
    assert guide.asked.shape == guided.label.shape


@torch.no_grad()
def test_feature_volumes_are_distance_and_colour(frozen: PeopleModel) -> None:
    field = frozen.decode(frozen.sample(0, 0.7))[0]
    box = VOLUMES[2]
    volume = volume_of(field, box, 6)
    assert volume.shape == (4, 6, 6, 6)
    point = torch.tensor([box.centre]) + torch.tensor([box.half_size]) * torch.tensor([[-5 / 6, 1 / 6, 5 / 6]])
    expected = (field.sdf(point) / 0.03).clamp(-1, 1)
    assert torch.allclose(volume[0, 0, 3, 5], expected, atol=1e-5)
    far = volume[0].abs() == 1
    assert (volume[1:, far] == 0).all()


# --- steps ------------------------------------------------------------------------------------------------------------


def test_anchors_hold_nothing_back_at_the_start(path: weights.Weights) -> None:
    stage = stage_of(path)
    anchors = stage.fakes(0, range(2)).anchors
    assert set(anchors) == {"code", "volume", "depth", "normal"}
    assert all(float(value.detach()) < 2e-4 for _, value in anchors.values())
    with torch.no_grad():
        for name, parameter in stage.learned.items():
            if name.startswith("mappings"):
                parameter.mul_(1.2)
    moved = stage.fakes(0, range(2)).anchors
    assert all(float(moved[k][1].detach()) > 1e-3 for k in ("code", "volume"))
    assert float(moved["normal"][1].detach()) > 1e-3


def test_gradients_reach_what_learns_and_nothing_else(path: weights.Weights) -> None:
    stage = stage_of(path, dataclasses.replace(MINI, train=("mapping", "tex", "shape"), warm_up=0))
    phase = next(iter(stage.phases(1, range(2))))
    phase.loss()[0].backward()
    touched = {n for n, p in stage.model.networks.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for start in (
        "mappings.body_tex",
        "mappings.top_tex",
        "mappings.top_shape",
        "body_tex",
        "textures.bottom",
        "shapes",
    ):
        assert any(n.startswith(start) for n in touched), start
    assert not any(n.startswith(("mappings.body_shape", "body_shape", "attributes")) for n in touched)
    assert all(p.grad is None for p in stage.critics.parameters())
    assert all(p.grad is None for p in stage.teacher.networks.parameters())


def test_a_resumed_stage_ends_with_the_same_bytes(path: weights.Weights, tmp_path: Path) -> None:
    settings = dataclasses.replace(MINI, batch=1, train=("mapping",))
    loop.run(stage_of(path, settings), tmp_path / "whole", loop.Box(max_steps=2))
    for end in (1, 2):
        loop.run(stage_of(path, settings), tmp_path / "pieces", loop.Box(max_steps=end))
    whole, pieces = (tmp_path / k / loop.CHECKPOINT for k in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()
    assert len(list((tmp_path / "pieces" / "sheets").glob("*.png"))) == 2


def test_shares_of_a_batch_add_up_to_the_batch(path: weights.Weights) -> None:
    """Two processes with half of the samples each have, on average, the gradients of one that has them all."""

    def gradients(samples: range) -> dict[str, Tensor]:
        stage = stage_of(path, dataclasses.replace(MINI, warm_up=0, train=("tex",)))
        found = {}
        for phase in stage.phases(0, samples):
            phase.loss()[0].backward()
            parameters = stage.learned if phase.name == "generator" else dict(stage.critics.named_parameters())
            found |= {f"{phase.name}/{k}": p.grad.clone() for k, p in parameters.items() if p.grad is not None}
            for p in parameters.values():
                p.grad = None
        return found

    whole, first, second = gradients(range(4)), gradients(range(2)), gradients(range(2, 4))
    for key, value in whole.items():
        halves = [part.get(key, torch.zeros_like(value)) for part in (first, second)]
        assert torch.allclose(sum(halves) / 2, value, rtol=1e-3, atol=2e-5 * float(value.abs().max()) + 1e-7), key


def test_superres_is_guided_by_the_frozen_small_picture(path: weights.Weights) -> None:
    settings = superres(MINI)
    assert (settings.height, settings.low_factor, settings.train) == (64, 4, ("tex",))
    reals = make_reals(noise_shot, 4, (64, 48), 0)
    stage = AdversarialStage(load(CPU, path), reals, settings, 0, "superres")
    fakes = stage.fakes(1, range(2))
    assert fakes.pictures.shape == (4, 4, 64, 48)
    weight, up = fakes.anchors["up"]
    assert weight == 1
    assert 0 < float(up.detach()) < 0.2
    step_of(stage, 5, range(2))


def test_finishing_puts_the_averages_in(path: weights.Weights, tmp_path: Path) -> None:
    stage = stage_of(path, dataclasses.replace(MINI, batch=2, warm_up=0, half_life=4.0))
    step_of(stage, 0, range(2))
    name, parameter = next(
        (n, p) for n, p in stage.learned.items() if not torch.equal(p.detach(), stage.average.values[n])
    )
    stage.finish()
    assert torch.equal(parameter.detach(), stage.average.values[name])
    file = tmp_path / "weights.safetensors"
    command.write_weights(stage.model, file)
    again = load(CPU, weights.Weights("people", weights.sha256_of(file), (file,)))
    for seed in (0, 1):
        a, b = (m.sample(seed, 0.7).codes for m in (stage.model, again))
        assert all(torch.allclose(a[k], b[k], atol=0.02) for k in a)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_mirrored_pictures_have_mirrored_cameras() -> None:
    pictures, views = torch.rand(64, 4, 8, 6), torch.rand(64, 3)
    keys = [[7, i] for i in range(64)]
    shown, angles = augment(pictures, views, keys, 0.0)
    flipped = angles[:, 0] != views[:, 0]
    assert 16 < int(flipped.sum()) < 48
    assert torch.equal(shown[flipped], pictures[flipped].flip(3))
    assert torch.equal(angles[flipped, 0], -views[flipped, 0])
    assert torch.equal(shown[~flipped], pictures[~flipped])
    again, _ = augment(pictures, views, keys, 1.0)
    assert torch.equal(again, augment(pictures, views, keys, 1.0)[0])
    assert not torch.equal(again, shown)


def test_shifting_brings_in_white_and_no_silhouette() -> None:
    empty = torch.tensor([1.0, 1.0, 1.0, -1.0])[:, None, None].expand(4, 16, 16)
    shown, _ = augment(empty[None].expand(32, -1, -1, -1), torch.zeros(32, 3), [[i] for i in range(32)], 0.0)
    assert torch.equal(shown, empty[None].expand(32, -1, -1, -1))


def test_gradients_are_spread_where_texels_agree() -> None:
    """One lit texel lights its blocks a little; a lit block of 4 x 4 is lit five times; noise stays noise; linear."""
    one = torch.zeros(3, 2, 32, 32)
    one[1, 0, 5, 6] = 1
    found = gan.spread(one)
    assert float(found[1, 0, 5, 6]) > 1
    assert 0 < float(found[1, 0, 12, 12]) < 0.1
    assert found[0].abs().sum() == found[2].abs().sum() == 0
    flat = gan.spread(torch.ones(1, 1, 32, 32))
    assert torch.allclose(flat, torch.full_like(flat, 1 + 4 + 16))
    a, b = (torch.randn(2, 3, 20, 18, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert torch.allclose(gan.spread(a + b), gan.spread(a) + gan.spread(b), atol=1e-5)


def test_angles_between_normals() -> None:
    a = functional.normalize(torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0]]), dim=1).requires_grad_()
    b = functional.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]), dim=1)
    found = angle_between(a, b)
    assert found.tolist() == pytest.approx([0, np.pi / 2, np.pi / 4], abs=2e-4)
    found.sum().backward()
    assert torch.isfinite(a.grad).all()


def test_the_pool_is_made_once_of_training_people(tmp_path: Path) -> None:
    asked: list[int] = []

    def shot(seed: int, views: object, size: tuple[int, int]) -> np.ndarray:
        asked.append(seed)
        return noise_shot(seed, views, size)

    file = tmp_path / "reals.safetensors"
    first, second = (make_reals(shot, 6, (8, 6), 0, path=file) for _ in range(2))
    assert len(asked) == 6
    assert {split_of(s) for s in asked} == {"train"}
    assert torch.equal(first.pictures, second.pictures)
    pictures, views = first.draw([[0], [1], [0]], CPU)
    assert pictures.shape == (6, 4, 8, 6)
    assert torch.equal(pictures[0], pictures[2])
    assert views[:, 2].tolist() == [0, 0, 0, 1, 1, 1]
    assert -1 <= float(pictures.amin()) <= float(pictures.amax()) <= 1


def test_views_look_at_the_person() -> None:
    head = torch.tensor([[0.0, 1.5, 0.0], [0.0, 1.7, 0.02]])
    for view, target in zip(random_views([4]), ([0.0, 1.0, 0.05], [0.0, 1.6, 0.01]), strict=True):
        camera = camera_of(view, head)
        clip = torch.tensor([*target, 1.0]) @ camera.mvp.T
        assert torch.allclose(clip[:2] / clip[3], torch.zeros(2), atol=1e-5)


# --- the command ------------------------------------------------------------------------------------------------------


def options(*words: str) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args(words)


def test_the_command_goes_from_weights_to_weights(
    path: weights.Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "backend.training.adversarial.SIZES", {"tiny": dataclasses.replace(MINI, batch=2, train=("mapping",))}
    )
    monkeypatch.setattr("backend.training.views.kit_shot", lambda kit: noise_shot)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    folder = tmp_path / "run"
    words = ("--kit", str(tmp_path), "--resume", str(folder), "--size", "tiny", "--stage", "adversarial",
             "--max-steps", "2", "--device", "cpu", "--export", str(tmp_path / "out.safetensors"))  # fmt: skip
    assert command.run(options(*words)) == 0
    assert (tmp_path / "out.safetensors").read_bytes() == (folder / "adversarial.safetensors").read_bytes()
    assert (folder / "adversarial" / loop.CHECKPOINT).exists()
    assert command._start(folder, "superres") == folder / "adversarial.safetensors"
    with pytest.raises(PopulaceError, match="holds another run"):
        command.run(options(*words, "--seed", "5"))


def test_a_missing_kit_is_said() -> None:
    with pytest.raises(PopulaceError, match="There is no folder"):
        command.run(options("--kit", "/nowhere/at/all", "--resume", "x"))
