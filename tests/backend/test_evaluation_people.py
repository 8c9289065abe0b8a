# SPDX-License-Identifier: GPL-3.0-or-later
"""The evaluation as a whole, on families whose people are known in closed form."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from backend import __main__ as cli
from backend import families
from backend.evaluation import measure, parts, people, portraits, rebuild, reconstruct, shapes
from backend.evaluation.command import as_text
from backend.evaluation.portraits import PARTS
from backend.families.base import Attribute, Latents, Rig
from backend.families.capsule.model import CapsuleModel
from tests.backend.geometry_fields import Shape

GRID = 40


class Ball:
    """A ball in canonical space; person space is moved by the code. The right half is red."""

    name = "human"
    rig = None
    focus = None
    region_density = None

    def __init__(self, radius: torch.Tensor, move: torch.Tensor) -> None:
        self.radius, self.move = radius, move
        self.bounds = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])

    def sdf(self, points):
        return points.norm(dim=1) - self.radius

    def color(self, points):
        red, grey = points.new_tensor([0.8, 0.1, 0.1]), points.new_tensor([0.5, 0.5, 0.5])
        return torch.where(points[:, :1] > 0, red, grey)

    def material(self, points):
        return points.new_tensor([0.5, 0.0]).expand(len(points), 2)

    def offset(self, points):
        return self.move.expand_as(points)

    def region(self, points):
        return torch.zeros(len(points), dtype=torch.int64)


class Balls:
    """Codes: body/shape [1, 4] = logarithm of the radius / 0.5 m, and the movement in metres."""

    name, device, weights_sha256 = "balls", torch.device("cpu"), None

    def sample(self, seed, truncation_psi, parameters=None):
        rng = np.random.default_rng(seed)
        code = torch.from_numpy(truncation_psi * 0.15 * rng.standard_normal((1, 4))).float()
        return Latents("balls", {"body/shape": code, "body/tex": torch.zeros(1, 2)})

    def decode(self, latents, separate=False):
        code = latents.codes["body/shape"][0]
        return [Ball(0.5 * code[0].exp(), code[1:])]


# --- portraits --------------------------------------------------------------------------------------------------------


def test_a_portrait_of_a_ball() -> None:
    model = Balls()
    made = portraits.generated(model, Latents("balls", {"body/shape": torch.zeros(1, 4)}), 48)
    assert made.facts["height_m"] == pytest.approx(1.0, abs=0.01)
    assert made.facts["closed"]
    assert made.facts["genus"] == 0
    assert made.facts["self_intersections"] == 0
    centre = np.array([0, 0.5, 0])
    assert np.abs(np.linalg.norm(made.points - centre, axis=1) - 0.5).max() < 0.005
    assert np.linalg.norm(made.points.mean(0) - centre) < 0.02  # all of it is visible, evenly
    # area on the front picture: a disc of radius 0.5 m; half of it red, seen from the front on the right
    metres = 2 * 1 / float(portraits.cameras(torch.zeros(3)).projection[0, 1, 1]) / portraits.SIZE
    assert (made.parts[0] > 0).sum() * metres**2 == pytest.approx(math.pi / 4, rel=0.02)
    inside = made.parts[0] == 1 + PARTS.index("body")
    red = inside & (made.pictures[0, ..., 0] > made.pictures[0, ..., 1] + 40)
    assert red[:, : portraits.SIZE // 2 - 1].sum() == 0
    assert red.sum() / inside.sum() == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.median(made.pictures[0][red], 0) - [204, 26, 26]).max() <= 1  # half-covered pixels are paler
    middle = made.normals[0, (inside.nonzero()[0].min() + inside.nonzero()[0].max()) // 2, portraits.SIZE // 2]
    assert np.abs(middle.astype(int) - [128, 128, 255]).max() <= 6  # towards the camera
    assert np.ptp(made.silhouettes, axis=0).max() < 0.02  # a ball looks alike from everywhere


def test_portraits_are_kept_and_found_again(tmp_path: Path) -> None:
    calls = []

    def make() -> portraits.Portrait:
        calls.append(1)
        return portraits.generated(Balls(), Balls().sample(3, 1), 24)

    first = portraits.cached(tmp_path / "a" / "3.npz", make)
    again = portraits.cached(tmp_path / "a" / "3.npz", make)
    assert len(calls) == 1
    assert again.facts == first.facts
    assert np.array_equal(first.pictures, again.pictures)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["3.npz"]


def test_points_inside_a_shell_are_not_visible() -> None:
    made = portraits.figure(Balls().decode(Latents("balls", {"body/shape": torch.zeros(1, 4)}))[0], 40)
    camera = portraits.sphere(portraits.bounds_of(made.mesh))
    raster = portraits.draw(made.mesh, camera, 96)
    rays = torch.nn.functional.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    centre = torch.tensor([0.0, 0.5, 0.0])
    assert portraits.visible(centre + 0.499 * rays, camera, raster.depth).all()
    assert not portraits.visible(centre + 0.4 * rays, camera, raster.depth).any()


# --- the report -------------------------------------------------------------------------------------------------------


class Strangers:
    """Reference people of the ball family, of other seeds; `taller` moves them to another distribution."""

    def __init__(self, bigger: float = 0.0) -> None:
        self.bigger = bigger

    def seeds(self, split, count):
        return [{"test": 10_000, "train": 20_000}[split] + i for i in range(count)]

    def portrait(self, seed):
        latents = Balls().sample(seed, 1)
        code = latents.codes["body/shape"] + torch.tensor([self.bigger, 0, 0, 0])
        return portraits.generated(Balls(), Latents("balls", {"body/shape": code}), 32)

    def reality(self, seed):
        raise NotImplementedError


INFO = families.info("capsule")
FEW = {"only": ("shapes", "novelty", "health"), "count": 14, "grid": 24}


def test_the_same_distribution_and_another_one(tmp_path: Path) -> None:
    same = people.run(Balls(), INFO, Strangers(), people.Options(cache=tmp_path, **FEW))
    assert same["counts"] == {"generated": 14, "test": 14, "train": 14}
    assert same["seeds"]["test"] == [10_000, 10_013]
    assert same["health"]["closed"] == 1
    assert 0.2 < same["shapes"]["chamfer"]["one_nna"] < 0.8
    assert same["shapes"]["chamfer"]["coverage"] > 0.4
    assert same["novelty"]["generated_mm"] == pytest.approx(same["novelty"]["test_mm"], rel=0.6)
    other = people.run(
        Balls(),
        INFO,
        Strangers(-1.2),
        people.Options(cache=tmp_path / "other", **(FEW | {"only": ("renders", "shapes")})),
    )
    assert other["shapes"]["chamfer"]["one_nna"] > 0.95
    assert other["shapes"]["chamfer"]["coverage"] < same["shapes"]["chamfer"]["coverage"]
    assert other["renders"]["fid"] > 3 * other["renders"]["fid_floor"]
    assert other["renders"]["front"]["recall"] < 0.2
    json.dumps(other, allow_nan=False)
    # a second run takes every portrait from the cache
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    again = people.run(Balls(), INFO, Strangers(), people.Options(cache=tmp_path, **(FEW | {"only": ("shapes",)})))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert again["shapes"] == same["shapes"]


def test_a_time_box_says_how_many_it_reached() -> None:
    report = people.run(Balls(), INFO, Strangers(), people.Options(minutes=0.0, **(FEW | {"only": ("health", "swap")})))
    assert report["counts"] == {"generated": 5}  # health needs nobody to compare with
    assert any("5 of 14" in note for note in report["notes"])
    assert report["swap"] is None


def test_unknown_sections_are_named() -> None:
    with pytest.raises(people.PopulaceError, match="no section 'beauty'"):
        people.run(Balls(), INFO, Strangers(), people.Options(only=("beauty",)))


def test_the_command_needs_a_kit_or_asks_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MAKEHUMAN_DATA", raising=False)
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path))
    capsule = ["eval", "--family", "capsule", "--count", "5", "--few", "3", "--device", "cpu"]
    assert cli.main(capsule) == 2
    assert "--kit" in capsys.readouterr().err
    assert cli.main([*capsule, "--kit", str(tmp_path)]) == 2
    assert "not a MakeHuman data folder" in capsys.readouterr().err
    assert cli.main([*capsule, "--minutes", "0"]) == 2
    capsys.readouterr()
    assert cli.main([*capsule, "--only", "health", "height", "labels", "attributes", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"generated": 5}
    assert report["health"]["closed"] == report["health"]["one_component"] == report["height"]["within_1_percent"] == 1
    assert report["attributes"]["height_m"]["miss"] < 1e-3
    text = as_text(report)
    assert "health.closed" in text
    assert "attributes.height_m.leak_most" in text


# --- parts ------------------------------------------------------------------------------------------------------------


class Snowman:
    """A head (face), two hands, shoes and a top, all balls; `leak` moves the hands when the top changes."""

    name = "human"
    focus = None
    region_density = None
    worn = ("top", "shoes")
    bounds = torch.tensor([[-0.9, 0.0, -0.5], [0.9, 1.8, 0.5]])
    rig = Rig(("torso", "head", "hand_l", "hand_r"), (-1, 0, 0, 0), torch.zeros(4, 3), torch.zeros(4, 3))
    centres = torch.tensor([[0, 0.9, 0], [0, 1.5, 0], [0.6, 0.9, 0], [-0.6, 0.9, 0], [0, 0.3, 0]])

    def __init__(self, top: float, leak: float) -> None:
        self.radii = torch.tensor([0.3 + top, 0.25, 0.15 + leak, 0.15 + leak, 0.25])

    def _each(self, points):
        """Distances to the balls, and to bars of 6 cm that join them into one piece."""
        across = torch.stack([points[:, 1] - 0.9, points[:, 2]], 1).norm(dim=1)
        along = torch.stack([points[:, 0], points[:, 2]], 1).norm(dim=1)
        bars = torch.minimum(torch.maximum(across - 0.06, points[:, 0].abs() - 0.6),
                             torch.maximum(along - 0.06, (points[:, 1] - 0.9).abs() - 0.6))  # fmt: skip
        return torch.cat([(points[:, None] - self.centres).norm(dim=2) - self.radii, bars[:, None]], 1)

    def sdf(self, points):
        return self._each(points).amin(1)

    def color(self, points):
        return torch.full_like(points, 0.5)

    def material(self, points):
        return points.new_tensor([0.5, 0.0]).expand(len(points), 2)

    def offset(self, points):
        return torch.zeros_like(points)

    def label(self, points):
        return torch.tensor([1, 0, 0, 0, 2, 0])[self._each(points).argmin(1)]

    def skin(self, points):
        bone = torch.tensor([0, 1, 2, 3, 0, 0])[self._each(points).argmin(1)]
        index = torch.stack([bone, (bone + 1) % 4, (bone + 2) % 4, (bone + 3) % 4], 1)
        return index, torch.tensor([[1.0, 0, 0, 0]]).expand(len(points), 4)


class Snowmen(Balls):
    name = "snowmen"
    leak = 0.0

    def decode(self, latents, separate=False):
        top = float(latents.codes["top/shape"][0, 0])
        if not separate:
            return [Snowman(top, self.leak * top)]
        whole = Snowman(top, self.leak * top)
        fields = []
        for i, name in enumerate(("body", *whole.worn)):
            part = Snowman(top, 0)
            index = {0: [1, 2, 3, 5], 1: [0], 2: [4]}[i]
            part.sdf = lambda p, index=index: whole._each(p)[:, index].amin(1)  # type: ignore[method-assign]
            part.name = name
            fields.append(part)
        return fields


def snowman(top: float) -> Latents:
    return Latents("snowmen", {"body/shape": torch.zeros(1, 1), "top/shape": torch.tensor([[top]])})


def test_swapping_a_part_that_keeps_to_itself_and_one_that_does_not() -> None:
    model = Snowmen()
    clean = parts.swap_locality(model, [(snowman(0.0), snowman(0.03))], grid=60)
    for place in (parts.FACE, parts.HANDS, parts.SHOES):
        assert clean[place]["still"] > 0.99
        assert clean[place]["same_color"] == 1
    model.leak = 0.1  # 3 mm
    leaky = parts.swap_locality(model, [(snowman(0.0), snowman(0.03))], grid=60)
    assert leaky[parts.HANDS]["still"] < 0.05
    assert 3 < leaky[parts.HANDS]["moved_mm_95"] < 12  # to the nearest vertex, which is not the nearest point
    assert leaky[parts.FACE]["still"] > 0.99


def test_label_iou_of_consistent_parts_and_of_families_without_parts() -> None:
    found = parts.label_iou(Snowmen(), [snowman(0.02)], grid=60)
    assert set(found) == {"body", "top", "shoes"}
    assert min(found.values()) > 0.97
    a = np.zeros((1, 4, 4), int)
    b = a.copy()
    a[:, :2], b[:, 1:3] = 1, 1  # rows 0-1 against rows 1-2
    a[:, 3] = b[:, 3] = 3
    assert parts.iou(parts.intersections_and_unions(a, b)) == {"body": pytest.approx(1 / 3), "top": 1.0}


def test_sliders_of_the_capsule_person_are_exact() -> None:
    model = CapsuleModel(torch.device("cpu"))
    latents = [model.sample(s, 0.7, {}) for s in range(3)]
    found = parts.sliders(model, INFO.attributes, latents)
    assert set(found) == {a.name for a in INFO.attributes}
    for name, figures in found.items():
        assert figures["miss"] < 1e-3, name
        assert figures["hit"] == 1, name
    assert found["height_m"]["leak"] < 1e-3
    assert parts.height_error(model, latents[:2], 128)["largest"] < 0.01


def test_sliders_are_measured_on_the_surface() -> None:
    """The capsule's height moves the measured height by what was asked for, and no colour; wider capsules have bulk."""
    model = CapsuleModel(torch.device("cpu"))
    latents = [model.sample(s, 0.7, {}) for s in range(4)]
    found = measure.slider_effects(model, INFO.attributes, latents, 64)
    assert set(found) == {"height_m", "weight"}
    assert found["height_m"]["error_m"] < 0.01
    assert found["height_m"]["height_m"] > 2
    assert found["weight"]["height_m"] < 0.2
    assert found["weight"]["bulk"] > 1
    colors = {k: v for figures in found.values() for k, v in figures.items() if k.endswith("_color")}
    assert colors
    assert max(colors.values()) < 1e-3


def test_objects_in_pieces_are_found() -> None:
    """A pair of shoes is whole, a top in two is not; the snowman's head and hands are three pieces, of which the
    largest is kept."""

    class Apart(Snowmen):
        def decode(self, latents, separate=False):
            def balls(*places):
                return lambda p: torch.stack([(p - torch.tensor(c)).norm(dim=1) - 0.15 for c in places]).amin(0)

            pair = balls((-0.3, 0.0, 0.0), (0.3, 0.0, 0.0))
            fields = [Shape(pair), Shape(pair), Shape(balls((0.0, 0.0, 0.0)))]
            for field, name in zip(fields, ("shoes", "top", "hair"), strict=True):
                field.name = name
            return fields

    found = measure.object_pieces(Apart(), [snowman(0.0)], 48)
    assert found is not None
    assert {k: v["whole"] for k, v in found.items()} == {"shoes": 1, "top": 0, "hair": 1}
    assert all(v["closed"] == 1 for v in found.values())


def test_sliders_that_miss_and_leak_are_found() -> None:
    """Asked for a, it sets half of it, and moves b by a fifth of b's range as well."""

    class Bad:
        def describe(self, latents):
            return {k: float(v) for k, v in zip(("a", "b"), latents.codes["x"][0])}

        def edit(self, latents, values):
            x = latents.codes["x"].clone()
            if "a" in values:
                x[0, 0], x[0, 1] = values["a"] / 2, x[0, 1] + 2
            else:
                x[0, 1] = values["b"]
            return Latents("bad", {"x": x})

    attributes = [Attribute("a", "A", "number", 0, 1), Attribute("b", "B", "number", 0, 10)]
    found = parts.sliders(Bad(), attributes, [Latents("bad", {"x": torch.tensor([[0.5, 5.0]])})])
    assert found["a"]["miss"] == pytest.approx((0.1 + 0.4) / 2)
    assert found["a"]["leak"] == pytest.approx(0.2)
    assert found["a"]["leaks_to"] == "b"
    assert found["b"]["miss"] == pytest.approx(0, abs=1e-7)
    assert found["b"]["leak"] == 0
    assert parts.distance(Attribute("c", "C", "color"), (0.1, 0.2, 0.3), (0.1, 0.5, 0.3)) == pytest.approx(0.3)
    assert parts.distance(Attribute("d", "D", "choice"), "x", "y") == 1


# --- reconstruction ---------------------------------------------------------------------------------------------------


def test_pull_back_inverts_a_smooth_offset() -> None:
    field = SimpleNamespace(offset=lambda p: 0.1 * torch.sin(p) + 0.05)
    x = torch.rand(50, 3)
    back = reconstruct.pull_back(field, x + field.offset(x))
    assert torch.allclose(back, x, atol=1e-4)


def test_points_that_a_view_sees_through() -> None:
    camera = portraits.around(8, 1.4)
    made = portraits.figure(Balls().decode(Latents("balls", {"body/shape": torch.zeros(1, 4)}))[0], 40)
    masks = portraits.draw(made.mesh, camera, 96).mask
    rays = torch.nn.functional.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    rays = rays[rays[:, 1].abs() < 0.8]  # near the poles the frame ends
    centre = torch.tensor([0.0, 0.5, 0.0])
    assert len(reconstruct.through(masks, camera.mvp, centre + 0.49 * rays)) == 0
    assert len(reconstruct.through(masks, camera.mvp, centre + 0.58 * rays)) > 0.9 * len(rays)


def test_a_ball_is_reconstructed() -> None:
    """Radius and movement come out, and with them all figures: the family can make this person exactly."""
    model = Balls()
    truth = Latents("balls", {"body/shape": torch.tensor([[0.2, 0.04, 0.0, -0.05]]), "body/tex": torch.zeros(1, 2)})
    made = portraits.figure(model.decode(truth)[0], 48)
    points, canonical = portraits.surface_points(made, 6000)
    target = reconstruct.Target(
        points, torch.nn.functional.normalize(canonical, dim=1), made.field.color(canonical),
        torch.zeros(len(points), dtype=torch.int64), torch.tensor([[1.0, 1.0, 1.0]]),
    )  # fmt: skip
    reality = rebuild.Reality(
        target, made.head, made.height, lambda camera, size: portraits.photograph(made, camera, size)
    )
    bank = [model.sample(100 + i, 1.0) for i in range(12)]
    found = rebuild.rebuild(model, reality, bank, replace(reconstruct.Steps(), body=60, parts=60), 48)
    itself = 1000 * shapes.chamfer(portraits.surface_points(made, rebuild.DENSE, 1)[0].numpy(), points.numpy())
    assert found["chamfer_mm"] < itself + 1.5  # two samplings of one surface are that far apart
    assert found["height_error_m"] < 0.005
    assert found["psnr"] > 28
    assert found["ssim"] > 0.95
    assert found["label_iou"]["body"] > 0.98
    json.dumps(found, allow_nan=False)


# --- sampled people ---------------------------------------------------------------------------------------------------

KIT = Path(os.environ.get("MAKEHUMAN_DATA", Path(__file__).parents[3] / "shared" / "data" / "makehuman"))


@pytest.mark.skipif(not (KIT / "3dobjs" / "base.obj").exists(), reason="no MakeHuman assets here")
def test_sampled_people_are_seen_as_generated_ones_are() -> None:
    pytest.importorskip("embreex")
    from backend.evaluation.reference import SampledPeople
    from backend.training.canonical import open_kit
    from backend.training.sampler import Sampler

    people_of = SampledPeople(KIT)
    kit = open_kit(KIT)
    people_of.sampler = Sampler(kit, kit.base.vertices * 0.1)  # the mean of 1500 people takes its time
    assert people_of.seeds("test", 3) == [0, 9, 11]
    portrait, reality = people_of.portrait(9), people_of.reality(9)
    assert portrait.points.shape == (portraits.POINTS, 3)
    assert portrait.points[:, 1].min() == pytest.approx(0, abs=0.01)
    assert portrait.points[:, 1].max() == pytest.approx(portrait.facts["height_m"], abs=0.01)
    assert portrait.facts["height_m"] == reality.height_m
    assert (portrait.pictures[:3, 0, 0] == [219, 222, 224]).all()  # the background of generated people, too
    assert set(np.unique(portrait.labels)) == {p - 1 for p in np.unique(portrait.parts) if p}
    # points and picture agree: the front half of the points falls on pixels of the same part
    camera, front = portraits.cameras(reality.head), reality.target.normals[:, 2] > 0.7
    clip = portraits.to_clip(reality.target.points[front], camera.mvp[0])
    column, row = (((clip[:, :2] * torch.tensor([1.0, -1.0]) + 1) / 2 * portraits.SIZE).long().numpy()).T
    seen = portrait.parts[0][row, column].astype(int) - 1
    assert (seen == reality.target.labels[front].numpy()).mean() > 0.85
    # what a view sees through lies in front of the nearest surface
    _, nearest = cKDTree(reality.target.points.numpy()).query(reality.target.empty.numpy())
    out = ((reality.target.empty - reality.target.points[nearest]) * reality.target.normals[nearest]).sum(1)
    assert len(out) > 5000
    assert (out > -0.005).float().mean() > 0.97
