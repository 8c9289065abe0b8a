# SPDX-License-Identifier: GPL-3.0-or-later
"""Get3DHuman on the main road: an official file is imported, then people are made, mixed, re-textured and fitted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backend import __main__ as cli
from backend import families, packet, pipeline, weights
from backend.checkpoints import convert
from backend.families.base import Latents, PersonPhoto
from backend.families.get3dhuman import inversion
from backend.families.get3dhuman.colors import GRAZING, BlendedColors, NearestColors, Picture, colored_obj, facing
from backend.families.get3dhuman.config import CENTRE, DISTANCE, INVERSE, SCALE, Config, to_ndc
from backend.families.get3dhuman.inversion import Rates, Target
from backend.families.get3dhuman.model import Get3DHumanModel
from backend.families.get3dhuman.networks import Get3DHuman, RefineNet
from backend.families.get3dhuman.tracer import trace, trace_quickly
from backend.protocol import Inversion, PopulaceError, parse_request
from backend.render.camera import Camera, perspective, to_clip
from backend.settings import Settings

TINY = Config.tiny()
SMALL: dict[str, Any] = {"family": "get3dhuman", "grid_resolution": 32, "faces": 1000, "texture_size": 512}
MINUTES = ["--family=get3dhuman", "--grid-resolution=32", "--faces=1000", "--texture-size=512", "--device", "cpu"]


def tiny_networks() -> tuple[Get3DHuman, RefineNet]:
    torch.manual_seed(3)
    networks = Get3DHuman(TINY, discriminators=True)
    with torch.no_grad():
        networks.mlp_shape.filters[-1].weight *= 40  # a clear surface
        networks.mlp_texture.filters[-1].weight *= 20
    return networks, RefineNet(TINY.refine_width)


def official_files(folder: Path, prefix: str = "module.") -> tuple[Path, Path]:
    """As the authors write them: parallel training's prefix, discriminators and losses left in."""
    networks, refine = tiny_networks()
    one, two = folder / "Get3DHuman_shape_texture_v2.pth", folder / "Get3DHuman_refinement_v1.pth"
    torch.save({prefix + name: tensor for name, tensor in networks.state_dict().items()}, one)
    torch.save({**refine.state_dict(), "netD.scale0_layer0.0.weight": torch.ones(3),
                "criterionVGG.vgg.slice1.0.weight": torch.ones(2)}, two)  # fmt: skip
    return one, two


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with both files imported."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPULACE_HOME", str(folder))
        for file in reversed(official_files(folder)):  # the order does not matter
            assert cli.main(["weights", "import", "get3dhuman", str(file), "--own"]) == 0
    return folder


@pytest.fixture(autouse=True)
def at_home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used = request.getfixturevalue("home") if "home" in request.fixturenames else tmp_path
    monkeypatch.setenv("POPULACE_HOME", str(used))


@pytest.fixture(scope="module")
def model(home: Path) -> Get3DHumanModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPULACE_HOME", str(home))
        loaded = families.load("get3dhuman", "cpu", Settings.load())
    assert isinstance(loaded, Get3DHumanModel)
    return loaded


def made(model: Get3DHumanModel, **changes: Any) -> packet.HumanAsset:
    return pipeline.generate(parse_request({**SMALL, **changes}), model)[0]


# -------------------------------------------------------------------------------------------------------------- import


def test_converter_keeps_every_tensor(tmp_path: Path) -> None:
    one, two = official_files(tmp_path, prefix="")  # with the prefix of parallel training: `home`
    for file, network in zip((one, two), tiny_networks()):
        found = convert("get3dhuman", file, own=True)
        kept = {name: tensor for name, tensor in network.state_dict().items()
                if tensor.is_floating_point() and not name.startswith("Dis_")}  # fmt: skip
        assert found.arrays.keys() == kept.keys()
        assert sum(float((a.astype(np.float64) ** 2).sum()) for a in found.arrays.values()) == pytest.approx(
            sum(float(t.double().square().sum()) for t in kept.values()), rel=1e-12
        )
        assert all(np.array_equal(found.arrays[name], kept[name].numpy()) for name in kept)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mlp_shape.filters.2.bias": None}, "1 tensors are missing: mlp_shape.filters.2.bias"),
        ({"backbone_shape.extra": torch.ones(1)}, "1 tensors do not belong there: backbone_shape.extra"),
        ({"filter_texture.l0.bias": torch.ones(5)}, r"filter_texture.l0.bias is \[5\] instead of \[16\]"),
        ({"mlp_shape.filters.2.bias": torch.full((8,), math.nan)}, "mlp_shape.filters.2.bias holds numbers that are"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path: Path, change: dict[str, Tensor | None], says: str) -> None:
    state = {**tiny_networks()[0].state_dict(), **change}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "file.pth")
    with pytest.raises(PopulaceError, match=says) as caught:
        convert("get3dhuman", tmp_path / "file.pth", own=True)
    assert caught.value.code == "weights_corrupt"


def test_another_resolution_is_not_official(tmp_path: Path) -> None:
    with pytest.raises(PopulaceError, match=r"missing: backbone_shape.synthesis.b128"):
        convert("get3dhuman", official_files(tmp_path)[0])
    torch.save({"something": torch.ones(2)}, tmp_path / "else.pth")
    with pytest.raises(PopulaceError, match="neither Get3DHuman's generators"):
        convert("get3dhuman", tmp_path / "else.pth")


def test_absent_weights_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--out", str(tmp_path), *MINUTES]) == 6
    said = capsys.readouterr().err
    assert "Get3DHuman_shape_texture_v2.pth" in said
    assert "populace weights import get3dhuman" in said
    assert "research" in said


def test_licence_and_hash_of_what_was_imported_are_recorded(home: Path) -> None:
    data_dir = Settings.load().data_dir
    for name, source in (("get3dhuman", "shape_texture"), ("get3dhuman_refine", "refinement")):
        manifest = weights.find(name, data_dir)
        assert manifest.imported
        assert "research" in manifest.licence
        assert source in manifest.provenance
        assert weights.sha256_of(next(home.glob(f"*{source}*.pth"))) in manifest.provenance
        assert weights.locate(name, data_dir).sha256 == manifest.sha256


# ------------------------------------------------------------------------------------------------------------ the road


def test_generate_from_the_command_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--seed", "4", "--out", str(tmp_path), "--json", *MINUTES]) == 0
    (line,) = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert Path(line["path"]).read_bytes().startswith(b"glTF")
    assert all(part["closed"] for part in line["parts"])


def test_same_seed_same_person_and_a_packet_that_makes_it_again(model: Get3DHumanModel) -> None:
    person = made(model, seed=4)
    assert packet.dumps(made(model, seed=4)) == packet.dumps(person)
    rows = {name: code.tolist() for name, code in person.latents.items()}
    again = made(model, seed=99, latents=rows)
    assert np.array_equal(again.parts[0].vertices, person.parts[0].vertices)
    assert again.parts[0].base_color_png == person.parts[0].base_color_png
    assert not np.array_equal(made(model, seed=5).parts[0].vertices, person.parts[0].vertices)


def test_a_new_texture_leaves_the_mesh_bit_for_bit(model: Get3DHumanModel, home: Path) -> None:
    person = made(model, seed=4)
    other = made(model, seed=4, edits=[{"op": "reroll", "seed": 8, "kinds": ["tex"]}])
    fresh = families.load("get3dhuman", "cpu", Settings.load())  # remembers nothing
    cold = pipeline.generate(parse_request({**SMALL, "seed": 4, "edits": [
        {"op": "reroll", "seed": 8, "kinds": ["tex"]}]}), fresh)[0]  # fmt: skip
    for one in (other, cold):
        assert one.parts[0].vertices.tobytes() == person.parts[0].vertices.tobytes()
        assert one.parts[0].faces.tobytes() == person.parts[0].faces.tobytes()
        assert one.parts[0].base_color_png != person.parts[0].base_color_png
    assert other.parts[0].base_color_png == cold.parts[0].base_color_png


def test_a_new_shape_moves_the_colours_too(model: Get3DHumanModel) -> None:
    """Said openly: the texture's filter sees the shape's picture."""
    one, two = model.sample(4, 1.0, {}), model.sample(5, 1.0, {})
    mixed = Latents(model.name, {"body/shape": two.codes["body/shape"], "body/tex": one.codes["body/tex"]})
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([-0.5, 0.5, -0.5])
    (a,), (b,) = model.decode(one, look="field"), model.decode(mixed, look="field")
    assert not torch.allclose(a.color(points), b.color(points))


def test_interpolation_goes_straight_in_w_and_variation_keeps_its_distance(model: Get3DHumanModel) -> None:
    from backend.edits import choose_latents

    def codes(**request: Any) -> dict[str, Tensor]:
        return dict(choose_latents(parse_request({**SMALL, "truncation_psi": 1.0, **request}), model).codes)

    a, b = codes(seed=4), codes(seed=5)
    half = codes(seed=4, edits=[{"op": "mix", "other": {"seed": 5, "truncation_psi": 1.0}, "amount": 0.5}])
    for name, code in half.items():
        torch.testing.assert_close(code, (a[name] + b[name]) / 2)
    assert torch.equal(model.sample(4, 1.0, {}).codes["body/shape"], a["body/shape"])
    shape_only = codes(seed=4, edits=[{"op": "mix", "other": {"seed": 5, "truncation_psi": 1.0}, "amount": 0.5,
                                       "kinds": ["shape"]}])  # fmt: skip
    assert torch.equal(shape_only["body/tex"], a["body/tex"])
    near, far = (codes(seed=4, edits=[{"op": "vary", "seed": 9, "amount": amount}]) for amount in (0.1, 0.6))
    for name in a:
        assert 0 < float((near[name] - a[name]).norm()) < float((far[name] - a[name]).norm())


def test_truncation_goes_to_the_stored_mean(model: Get3DHumanModel) -> None:
    mean = model.networks.backbone_shape.mapping.w_avg
    torch.testing.assert_close(model.sample(1, 0.0, {}).codes["body/shape"][0], mean)
    one, half = (model.sample(1, psi, {}).codes["body/shape"][0] for psi in (1.0, 0.5))
    torch.testing.assert_close(half, (one + mean) / 2)


def test_volumes_are_computed_once_per_person(model: Get3DHumanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made_shapes, made_textures = [], []
    whole = type(model.networks)
    for name, seen in (("shape_features", made_shapes), ("texture_features", made_textures)):
        original = getattr(whole, name)

        def counted(*args: Any, original: Any = original, seen: list[int] = seen, **named: Any) -> Any:
            seen.append(1)
            return original(*args, **named)

        monkeypatch.setattr(whole, name, counted)
    one = model.sample(41, 1.0, {})
    for tex in (42, 43, 42, 41):
        other = model.sample(tex, 1.0, {})
        model.decode(Latents(model.name, {**one.codes, "body/tex": other.codes["body/tex"]}))
    assert (len(made_shapes), len(made_textures)) == (1, 3)
    assert len(model._shapes) <= 2
    assert len(model._textures) <= 2


def test_field_is_in_metres_closed_by_its_box_and_differentiable(model: Get3DHumanModel) -> None:
    (field,) = model.decode(model.sample(4, 1.0, {}))
    points = torch.tensor([[0.1, 0.9, 0.05], [0.0, 1.5, -0.1]])
    value = field.sdf(points)
    occupancy = field.shape.occupancy(to_ndc(100 * points))
    torch.testing.assert_close(value, (2 * occupancy - 1) * DISTANCE * INVERSE / 100)
    low, high = field.bounds
    border = torch.rand(500, 3) * (high - low) + low
    border[:, 1] = high[1]
    assert (field.sdf(border) > 0).all()
    assert float(to_ndc(100 * high)[:2].abs().max()) <= 1
    assert float(to_ndc(100 * low)[:2].abs().max()) <= 1
    points.requires_grad_()
    torch.testing.assert_close(field.sdf(points).detach(), value, atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(field.sdf(points).sum(), points)
    assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("codes", [{}, {"body/shape": (1, 512)}, {"body/shape": (1, 5), "body/tex": (1, 512)},
                                   {"body/shape": (2, 512), "body/tex": (1, 512)}])  # fmt: skip
def test_codes_of_somebody_else_are_refused(model: Get3DHumanModel, codes: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(PopulaceError) as caught:
        model.decode(Latents(model.name, {name: torch.zeros(shape) for name, shape in codes.items()}))
    assert caught.value.code == "invalid_latents"


def test_one_row_per_layer_is_a_code_too(model: Get3DHumanModel) -> None:
    one = model.sample(4, 1.0, {})
    rows = 2 * model.networks.backbone_shape.blocks
    plus = Latents(model.name, {name: code.expand(rows, -1).clone() for name, code in one.codes.items()})
    points = torch.rand(20, 3)
    (a,), (b,) = model.decode(one, look="field"), model.decode(plus, look="field")
    assert torch.equal(a.sdf(points), b.sdf(points))
    assert torch.equal(a.color(points), b.color(points))


# ------------------------------------------------------------------------------------------------------------- colours


def ball(ndc: Tensor, radius: float = 0.5) -> Tensor:
    return ((ndc.norm(dim=1) - radius) / (2 * DISTANCE) + 0.5).clamp(0, 1)


def ball_pictures(refined: tuple[float, float], own: float = 0.5, size: int = 96) -> list[Picture]:
    """A ball whose back and front view got these greys."""
    pictures = []
    for angle, grey in zip((math.pi, 0.0), refined):
        view = trace(ball, size, angle, torch.zeros(1))
        noise = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(0)) * 0.02
        pictures.append(Picture(view, torch.full((size, size, 3), own) + noise,
                                torch.full((size, size, 3), grey) + noise, facing(view)))  # fmt: skip
    return pictures


def test_facing_is_the_cosine_of_the_normal() -> None:
    view = trace(ball, 128, 0.0, torch.zeros(1))
    inner = view.mask & (view.points[..., :2].norm(dim=-1) < 0.45)
    assert (facing(view) - view.points[..., 2] / 0.5)[inner].abs().max() < 0.03
    assert (facing(view)[~view.mask] == 0).all()


def test_views_count_where_they_look_and_the_field_fills_the_sides() -> None:
    colors = BlendedColors(lambda ndc: torch.full_like(ndc, 0.5), ball_pictures((0.2, 0.8)))
    front, back, side = 0.5 * torch.eye(3)[[2, 2, 0]] * torch.tensor([[1.0], [-1.0], [1.0]])
    said = colors(torch.stack([front, back, side]))
    assert said[0].mean() == pytest.approx(0.81, abs=0.02)
    assert said[1].mean() == pytest.approx(0.21, abs=0.02)
    assert said[2].mean() == pytest.approx(0.51, abs=0.05)  # the mean of what the views show along the seam
    hidden = colors(torch.zeros(1, 3))  # inside: no view sees it
    assert hidden.mean() == pytest.approx(0.51, abs=0.05)


def test_field_takes_mean_and_spread_of_the_views_along_the_seam() -> None:
    colors = BlendedColors(lambda ndc: torch.full_like(ndc, 0.5), ball_pictures((0.7, 0.7), own=0.4))
    before, after = colors.seam_difference()
    assert before == pytest.approx(0.3 * math.sqrt(3), abs=1e-3)
    assert after < 1e-5
    refined, _ = colors.seam()
    assert len(refined) > 50
    assert all((p.facing[(p.facing > 0) & (p.facing < GRAZING)] < GRAZING).all() for p in colors.pictures)


def test_published_look_takes_the_nearest_point_of_a_view() -> None:
    nearest = NearestColors(ball_pictures((0.2, 0.8)))
    said = nearest(torch.tensor([[0.05, 0.1, 0.45], [0.05, -0.1, -0.45]]))
    assert said[0].mean() == pytest.approx(0.81, abs=0.02)
    assert said[1].mean() == pytest.approx(0.21, abs=0.02)
    text = colored_obj(torch.tensor([[1.0, 2, 3]]), torch.tensor([[0, 0, 0]]), torch.tensor([[0.5, 0.25, 1]]))
    assert text == "v 1.000000 2.000000 3.000000 0.5000 0.2500 1.0000\nf 1 1 1\n"


def test_every_look_colours_a_person(model: Get3DHumanModel) -> None:
    latents = model.sample(4, 1.0, {})
    points = torch.rand(100, 3) * torch.tensor([1.0, 1.5, 0.4]) - torch.tensor([0.5, 0.0, 0.2])
    looks = [model.decode(latents, look=look)[0].color(points) for look in ("blend", "published", "field")]
    for colors in looks:
        assert colors.shape == (100, 3)
        assert ((colors >= 0) & (colors <= 1)).all()
    bare = Get3DHumanModel(model.networks, None, model.device, None)
    assert torch.equal(bare.decode(latents)[0].color(points), looks[2])  # without a refine net: the field's own


# ----------------------------------------------------------------------------------------------------------- inversion


class Ellipsoids(nn.Module):
    """Stands in for the networks: w is radius, height and shift of an ellipsoid and its colour, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config(z_dim=3, w_dim=3)
        self.backbone_shape, self.backbone_texture = nn.Module(), nn.Module()
        for backbone in (self.backbone_shape, self.backbone_texture):
            backbone.blocks = 1
            backbone.mapping = _Mapping()
        line = torch.linspace(-1, 1, 33)
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.places = torch.stack([x, y])[None]

    def shape_features(self, ws: Tensor) -> tuple[Tensor, Tensor]:
        spread = ws[:, 0, :, None, None].expand(-1, -1, 33, 33)
        return spread, torch.cat([self.places, spread], 1)

    def texture_features(self, ws: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        spread = ws[:, 0, :, None, None].expand(-1, -1, 33, 33)
        return spread, spread

    def mlp_shape(self, features: Tensor) -> Tensor:
        x, y, radius, height, shift, z = features.unbind(1)
        r, h = 0.3 + 0.1 * radius.tanh(), 0.6 + 0.1 * height.tanh()
        d = torch.stack([(x - 0.2 * shift.tanh()) / r, y / h, z / 1.28 / r], 1).norm(dim=1)
        return ((d - 1) * r / (2 * DISTANCE) + 0.5)[:, None]

    def mlp_texture(self, features: Tensor) -> Tensor:
        return torch.sigmoid(features[:, 5:8])


class _Mapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc0 = nn.Linear(3, 3)

    def forward(self, z: Tensor) -> Tensor:
        return z[:, None]


ANSWER = torch.tensor([[0.7, -0.6, 0.5]])


@pytest.mark.parametrize("clues", [("depth", "normal"), ("depth",), ()])
def test_shape_is_found_again(clues: tuple[str, ...]) -> None:
    networks: Any = Ellipsoids()
    shown = inversion.show(networks, ANSWER, torch.zeros(1, 3), 48)
    assert shown.mask.float().mean() > 0.05
    target = Target(shown.mask, shown.color, **{clue: getattr(shown, clue) for clue in clues})
    start = torch.tensor([[-0.5, 0.5, -0.5]])
    code, losses = inversion.fit_shape(networks, target, start, steps=80, rates=Rates(near_mean=0.0, learning=0.1))
    assert min(losses) < losses[0] / 10
    found = inversion.show(networks, code, torch.zeros(1, 3), 48)
    overlap = (found.mask & shown.mask).sum() / (found.mask | shown.mask).sum()
    assert overlap > (0.97 if clues else 0.95)  # a silhouette of 48 pixels knows it less well
    if clues:
        assert (code - ANSWER).abs().max() < 0.05


def test_texture_is_found_again() -> None:
    networks: Any = Ellipsoids()
    colour = torch.tensor([[1.0, -0.8, 0.3]])
    target = inversion.show(networks, ANSWER, colour, 32)
    code, losses = inversion.fit_texture(networks, ANSWER, target, steps=120, rates=Rates(near_mean=0.0, learning=0.1))
    assert min(losses) < losses[0] / 20
    assert (code - colour).abs().max() < 0.05


def test_depth_moves_as_the_surface_does() -> None:
    """The gradient through the kept points is that of finite differences of whole traces."""
    networks: Any = Ellipsoids()
    wanted = inversion.show(networks, ANSWER, ANSWER, 40)
    far = Target(wanted.mask, depth=torch.full_like(wanted.depth, 2.0))
    rates = Rates(mask=0.0, depth=1.0, normal=0.0)

    def loss(w: Tensor) -> Tensor:
        return inversion.shape_loss(networks, networks.shape_features(w[None])[1], far, rates)

    w = torch.tensor([[0.7, -0.6, 0.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(w), w)
    for i in range(2):  # the shift changes which pixels are hit
        step = torch.zeros(1, 3)
        step[0, i] = 0.02
        difference = (loss(ANSWER + step) - loss(ANSWER - step)) / 0.04
        assert float(gradient[0, i]) == pytest.approx(float(difference), rel=0.15, abs=2e-4)


def test_a_picture_is_placed_as_in_training() -> None:
    picture = torch.zeros(4, 300, 200)
    picture[3, 40:240, 60:120] = 1  # 200 pixels tall, 60 wide
    picture[0, 40:140, 60:120] = 1  # the upper half is red
    target = inversion.place(picture, size=129)
    rows, columns = target.mask.nonzero(as_tuple=True)
    pixel = 2 / 128
    assert rows.max() * pixel - 1 == pytest.approx(CENTRE, abs=pixel)  # feet on the floor
    assert (rows.max() - rows.min() + 1) * pixel / SCALE == pytest.approx(180, abs=2 * pixel / SCALE)
    assert (columns.max() - columns.min() + 1) * pixel / SCALE == pytest.approx(54, abs=2 * pixel / SCALE)
    assert int(columns.min() + columns.max()) == 128
    assert target.color is not None
    assert target.color[rows.min() + 5, 64, 0] == 1
    assert target.color[rows.max() - 5, 64, 0] == 0
    with pytest.raises(PopulaceError, match="alpha is empty"):
        inversion.place(torch.zeros(4, 9, 9))


def test_a_photo_becomes_a_person(model: Get3DHumanModel) -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[5:35, 15:25] = (204, 51, 51, 255)
    photo, told = PersonPhoto(pixels, (15, 5, 25, 35)), []
    made = model.encode([photo], Inversion(steps=3), lambda stage, fraction: told.append((stage, fraction)))
    assert told == [("fit", pytest.approx(x)) for x in (0.2, 0.4, 0.6, 0.6 + 0.4 / 3, 0.6 + 0.8 / 3, 1.0)]
    (field,) = model.decode(made.latents)
    assert torch.isfinite(field.sdf(torch.rand(10, 3))).all()
    assert 0 <= made.scores["mask_iou"] <= 1
    assert math.isfinite(made.scores["psnr"])
    lens = perspective(made.camera["fov_y_rad"], 60 / 40, 1.0, 100.0)
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.8, 0.0]])  # feet and top of the head
    clip = to_clip(points, Camera(torch.tensor(made.camera["c2w"]).float(), lens).mvp)
    place = (clip[:, :2] / clip[:, 3:] * torch.tensor([1, -1]) + 1) / 2 * torch.tensor([60, 40])
    assert torch.allclose(place, torch.tensor([[20.0, 35.0], [20.0, 5.0]]), atol=0.05)
    (mean,) = (model.encode([photo], Inversion(steps=0)).latents.codes["body/shape"],)
    assert torch.allclose(mean, inversion.mean_code(model.networks, "shape"))
    hasty = model.encode([photo], Inversion(steps=1000, seconds=0.01))
    assert hasty.latents.codes["body/tex"].shape == mean.shape


def test_constants_are_those_of_the_published_projection() -> None:
    assert pytest.approx(1 / INVERSE, abs=1e-7) == SCALE
    assert pytest.approx(95 * SCALE, abs=1e-5) == CENTRE
    quick = trace_quickly(ball, 64, 0.0, torch.zeros(1))
    assert quick.mask.any()
