# SPDX-License-Identifier: GPL-3.0-or-later
"""E3DGE on the main road with small made-up weights: files are imported, heads sampled, inverted, edited and mixed."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend import __main__ as cli
from backend import families, latents, packet, pipeline, weight_files, weights
from backend.checkpoints import convert
from backend.families.base import Latents, PersonPhoto
from backend.families.e3dge import DIRECTIONS, checkpoint, directions, face, looks
from backend.families.e3dge.config import HALF_SIDE, Config, from_metadata
from backend.families.e3dge.inversion import E3dge
from backend.families.e3dge.model import MAP, METRES, E3dgeModel
from backend.protocol import Inversion, PopulaceError, parse_request
from backend.settings import Settings

TINY = Config.tiny()
SMALL: dict[str, Any] = {"family": "e3dge", "grid_resolution": 32, "faces": 1000, "texture_size": 512}


@pytest.fixture(autouse=True)
def few_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "AVERAGE_OF", 1000)


@functools.cache
def network() -> E3dge:
    """Untrained, but its distance is about that of a ball: waves of the place that later layers hand on, summed."""
    torch.manual_seed(1)
    net = E3dge(TINY).eval()
    with torch.no_grad():
        for layer in net.generator.style:
            layer.weight.mul_(2)  # people differ
        generator = torch.Generator().manual_seed(2)
        first, *others = net.generator.field.pts_linears
        for values in (first.weight, first.bias):
            values.uniform_(-0.1, 0.1, generator=generator)
        for layer in others:
            layer.weight.copy_(torch.eye(TINY.width) / 30 + 0.001 * torch.randn(16, 16, generator=generator))
            layer.bias.zero_()
        net.average(500, torch.randn(500, TINY.style_dim, generator=generator))
        points = (torch.rand(1, 2000, 3, generator=generator) - 0.5) * 2 * HALF_SIDE
        rows = net.sample(torch.randn(20, TINY.style_dim, generator=generator), 0.7).renderer
        hidden = net.generator.field.hidden(points.expand(20, -1, -1), rows).flatten(0, 1)
        ball = points[0].norm(dim=1, keepdim=True).repeat(20, 1) - 0.07
        fit = torch.linalg.lstsq(torch.cat([hidden, torch.ones(len(hidden), 1)], 1), ball).solution
        net.generator.field.sigma_linear.weight.copy_(fit[:-1].T)
        net.generator.field.sigma_linear.bias.copy_(fit[-1])
        net.generator.renderer.sigmoid_beta.fill_(0.005)
        net.generator.field.rgb_linear.weight.mul_(20)
        for parameter in net.encoder.styles_pigan.parameters():
            parameter.mul_(0.3)  # small offsets from the mean
    return net


def official_files(folder: Path) -> list[Path]:
    """As the authors write them: StyleSDF's names without netGlobal, everything else that such files hold left in."""
    net = network()
    state = net.state_dict()

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    generator = {name.replace("network.netGlobal.", "network."): tensor for name, tensor in part("generator.").items()
                 if "netLocal" not in name}  # fmt: skip
    one, two, three = (folder / name for name in checkpoint.PUBLISHED)
    torch.save({"g_ema": generator, "g": generator, "mean_latent": torch.zeros(1, 16)}, one)
    torch.save({"g_ema": {"style.0.weight": torch.zeros(2, 2)}, "d": part("camera.")}, two)
    torch.save({"iter": 100, "encoder": part("encoder.") | {"latent_avg": torch.zeros(3)},
                "netLocal": part("generator.renderer.network.netLocal."), "grid_align": part("grid_align."),
                "Fuse_sft_block": part("fuse."), "discriminator": {"x": torch.zeros(1)},
                "encoder_optimizer": {"state": {}}}, three)  # fmt: skip
    return [one, two, three]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with all three files and a direction imported."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPULACE_HOME", str(folder))
        patch.setattr(checkpoint, "AVERAGE_OF", 1000)
        files = [str(file) for file in official_files(folder)]
        assert cli.main(["weights", "import", "e3dge", *files, "--own"]) == 0
        smile = folder / "smile.safetensors"
        generator = np.random.default_rng(0)
        smile.write_bytes(directions.pack({"smiling": {"renderer": generator.normal(size=16) / 4,
                                                       "decoder": generator.normal(size=16) / 4}}))  # fmt: skip
        assert cli.main(["weights", "import", "--name", "e3dge_directions", str(smile)]) == 0
    return folder


@pytest.fixture(autouse=True)
def at_home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used = request.getfixturevalue("home") if "home" in request.fixturenames else tmp_path
    monkeypatch.setenv("POPULACE_HOME", str(used))


@pytest.fixture(scope="module")
def model(home: Path) -> E3dgeModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPULACE_HOME", str(home))
        loaded = families.load("e3dge", "cpu", Settings.load())
    assert isinstance(loaded, E3dgeModel)
    return loaded


def photo(model: E3dgeModel, seed: int = 7, noise: float = 0.0) -> PersonPhoto:
    """A photo that the generator itself took, of 128 pixels, with a matte."""
    codes, _ = model._codes(model.sample(seed, 0.7))
    view = model.net.render(codes, model.net.cameras(torch.tensor([[0.2, 0.1]])))
    rgb = np.asarray((view.thumb[0].permute(1, 2, 0) + 1) * 127.5).repeat(8, 0).repeat(8, 1)
    rgb = rgb + np.random.default_rng(seed).normal(size=rgb.shape) * noise
    alpha = np.full((128, 128, 1), 255)
    return PersonPhoto(np.concatenate([rgb.clip(0, 255), alpha], 2).astype(np.uint8), (0, 0, 128, 128))


def made(model: E3dgeModel, **changes: Any) -> packet.HumanAsset:
    return pipeline.generate(parse_request({**SMALL, **changes}), model)[0]


# --------------------------------------------------------------------------------------------------------------- import


def test_converter_keeps_every_tensor(tmp_path: Path) -> None:
    expected, found, notes = network().state_dict(), {}, {}
    for file, name in zip(official_files(tmp_path), ("e3dge", "e3dge_pose", "e3dge_encoder")):
        converted = convert("e3dge", file, own=True)
        assert converted.name == name
        found |= converted.arrays
        notes |= converted.metadata
    assert from_metadata({**notes, "title": ""}) == replace_samples(TINY)
    floats = {name for name, tensor in expected.items() if tensor.is_floating_point()}
    assert found.keys() == floats
    for name in floats - {"w_avg", "decoder_avg"}:
        assert np.array_equal(found[name], expected[name].numpy())
    torch.testing.assert_close(torch.from_numpy(found["w_avg"]), expected["w_avg"], atol=0.1, rtol=0)


def replace_samples(config: Config) -> Config:
    """How many samples a ray takes no file says."""
    return replace(config, samples=Config().samples)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_files_of_other_sizes_are_refused_unless_they_are_ones_own(tmp_path: Path, which: int) -> None:
    with pytest.raises(PopulaceError, match=r"another shape|are missing|do not belong") as caught:
        convert("e3dge", official_files(tmp_path)[which])
    assert caught.value.code == "weights_corrupt"


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path) -> None:
    file = official_files(tmp_path)[0]
    content = torch.load(file, weights_only=True)
    del content["g_ema"]["style.1.weight"]
    torch.save(content, file)
    with pytest.raises(PopulaceError, match=r"generator\.style\.1\.weight"):
        convert("e3dge", file, own=True)
    content["g_ema"] |= {"style.1.weight": torch.zeros(16, 16), "decoder.extra": torch.zeros(1)}
    torch.save(content, file)
    with pytest.raises(PopulaceError, match=r"do not belong there: generator\.decoder\.extra"):
        convert("e3dge", file, own=True)
    torch.save({"something": torch.zeros(2)}, file)
    with pytest.raises(PopulaceError, match=r"none of E3DGE's files"):
        convert("e3dge", file)


def test_manifests_tell_sizes_sums_and_licence(home: Path) -> None:
    shipped = {manifest.name: manifest for manifest in weights.manifests()}
    for (file, (size, md5)), name in zip(checkpoint.PUBLISHED.items(), ("e3dge", "e3dge_pose", "e3dge_encoder")):
        manifest = shipped[name]
        assert f"{file} ({size} bytes, MD5 {md5})" in manifest.obtain
        assert "ommercial" in manifest.licence_text
        assert "not the file that its authors published" in weights.find(name, Settings.load().data_dir).provenance
    assert weight_files.licence_text(shipped["e3dge_directions"])


def test_without_the_encoder_there_are_seeds_but_no_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: E3dgeModel
) -> None:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path))
    assert cli.main(["weights", "import", "e3dge", str(official_files(tmp_path)[0]), "--own"]) == 0
    alone = families.load("e3dge", "cpu", Settings.load())
    assert torch.equal(alone.sample(3, 0.5, {}).codes["body/shape"], model.sample(3, 0.5).codes["body/shape"])
    with pytest.raises(PopulaceError, match="E3DGE_Full_Runner") as caught:
        alone.encode([photo(model)], Inversion())  # type: ignore[attr-defined]
    assert caught.value.code == "weights_missing"


# ------------------------------------------------------------------------------------------------------------- the road


def test_a_head_on_the_main_road(model: E3dgeModel) -> None:
    asset = made(model, seed=4)
    assert [fact["name"] for fact in asset.meta["parts"]] == ["head"]
    assert asset.meta["stats"]["closed"]
    assert asset.meta["bones"] == []
    assert 0.05 < asset.meta["attributes"]["height_m"] < 2 * HALF_SIDE * METRES
    again = made(model, seed=4)
    assert np.array_equal(asset.parts[0].vertices, again.parts[0].vertices)
    assert asset.parts[0].base_color_png == again.parts[0].base_color_png


def test_command_line_makes_a_head(home: Path, tmp_path: Path) -> None:
    arguments = ["--seed", "2", "--family=e3dge", "--grid-resolution=32", "--faces=1000", "--texture-size=512"]
    assert cli.main(["generate", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert any(tmp_path.iterdir())


def test_distance_is_the_generators_and_cut_at_the_frustum(model: E3dgeModel) -> None:
    codes = model.sample(4, 0.7)
    (head,) = model.decode(codes)
    inner = (torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.2
    own = model.net.generator.field.sdf(inner[None] / METRES, model._codes(codes)[0].renderer)[0] * METRES
    torch.testing.assert_close(head.sdf(inner), own)
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]]) * HALF_SIDE * METRES
    assert (head.sdf(corners) > 0).all()
    assert torch.equal(torch.cat([head.sdf(part) for part in inner.split(499)]), head.sdf(inner))


def test_new_looks_leave_the_surface_alone(model: E3dgeModel) -> None:
    one, other = model.sample(4, 0.7), model.sample(5, 0.7)
    mixed = latents.mix(one, other, 1.0, kinds=["tex"])
    a, b = model.decode(one)[0], model.decode(mixed)[0]
    points = (torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.2
    assert torch.equal(a.sdf(points), b.sdf(points))
    assert not torch.equal(a.color(points), b.color(points))


def test_people_between_two_people(model: E3dgeModel) -> None:
    one, other = model.sample(4, 0.7), model.sample(5, 0.7)
    half = model._codes(latents.mix(one, other, 0.5))[0]
    expected = model._codes(one)[0].between(model._codes(other)[0], 0.5)
    torch.testing.assert_close(half.renderer, expected.renderer)
    torch.testing.assert_close(half.decoder, expected.decoder)


def test_editing_moves_both_spaces_and_tells(model: E3dgeModel) -> None:
    person = model.sample(4, 0.7)
    edited = model.edit(person, {"smiling": 1.5})
    assert model.describe(edited) == {**dict.fromkeys(DIRECTIONS, 0.0), "smiling": 1.5}
    before, after = model._codes(person)[0], model._codes(edited)[0]
    for space in ("renderer", "decoder"):
        moved = getattr(after, space) - getattr(before, space)
        torch.testing.assert_close(moved, (1.5 * model.directions["smiling"][space]).expand_as(moved))
    with pytest.raises(PopulaceError, match="No direction for 'young'"):
        model.edit(person, {"young": 1.0})
    asset = made(model, seed=4, edits=[{"op": "set", "values": {"smiling": 1.5}}])
    assert asset.meta["attributes"]["smiling"] == 1.5


def test_codes_of_other_weights_are_refused(model: E3dgeModel) -> None:
    person = model.sample(0, 0.7)
    for name, code in {"body/shape": torch.zeros(3, 16), "body/tex": torch.zeros(2, 16)}.items():
        with pytest.raises(PopulaceError, match=name):
            model.decode(Latents("e3dge", {**person.codes, name: code}))
    bad = torch.zeros(64, 64, 4, dtype=torch.uint8)
    with pytest.raises(PopulaceError, match="three squares"):
        model.decode(Latents("e3dge", person.codes, {MAP: bad}))[0].color(torch.zeros(1, 3))


# --------------------------------------------------------------------------------------------------------------- photos


def test_a_photo_becomes_codes_pose_and_a_map(model: E3dgeModel) -> None:
    stages = []
    found = model.encode([photo(model)], Inversion(), lambda stage, part: stages.append(stage))
    assert stages == ["encode", "project"]
    assert found.latents.codes.keys() == model.sample(0, 0.7).codes.keys()
    panels = found.latents.maps[MAP]
    assert tuple(panels.shape) == (64, 192, 4)
    angles = found.latents.codes["body/pose"]
    pose = np.array(found.camera["c2w"])
    assert np.linalg.norm(pose[:3, 3]) == pytest.approx(METRES, rel=1e-5)
    assert pose[1, 3] == pytest.approx(METRES * np.sin(float(angles[0, 1])), abs=1e-5)
    assert set(found.scores) == {"psnr_codes", "psnr"}
    plain = model.encode([photo(model)], Inversion(texture=False))
    assert not plain.latents.maps
    several = model.encode([photo(model), photo(model, 8)], Inversion())
    each = [model.encode([photo(model, seed)], Inversion()).latents.codes["body/tex"] for seed in (7, 8)]
    torch.testing.assert_close(several.latents.codes["body/tex"], (each[0] + each[1]) / 2)


def test_a_map_holds_what_the_networks_of_detail_saw(model: E3dgeModel) -> None:
    picture = photo(model, noise=20)
    found = model.encode([picture], Inversion())
    seen, rgba = model.seen(found.latents.maps[MAP], found.latents.codes["body/pose"])
    codes, angles = model._codes(found.latents)
    cameras = model.net.cameras(angles)
    cut = model._tensor(face.frame(picture).cut(picture.rgba, 64))
    direct = model.net.see(model._for_networks(cut), model.net.render(codes, cameras), cameras)
    torch.testing.assert_close(seen.residual, direct.residual, atol=3 / 255, rtol=0)
    assert (seen.features - direct.features).abs().mean() < 0.1 * direct.features.abs().mean()
    torch.testing.assert_close(rgba, cut, atol=1e-6, rtol=0)
    edited = model.edit(found.latents, {"smiling": 2.0})
    assert torch.equal(edited.maps[MAP], found.latents.maps[MAP])


def test_the_photos_pixels_are_on_the_surface(model: E3dgeModel) -> None:
    """A photo of one colour: the front takes it, the back does not."""
    picture = photo(model)
    picture.rgba[..., :3] = (250, 20, 30)
    found = model.encode([picture], Inversion()).latents
    (head,) = model.decode(Latents("e3dge", {**found.codes, "body/pose": torch.zeros(1, 2)}, found.maps))
    (plain,) = model.decode(Latents("e3dge", found.codes))
    depth = torch.linspace(0.16, -0.16, 400)
    along = torch.stack([torch.zeros(400), torch.zeros(400), depth], 1)
    first = along[int((head.sdf(along) < 0).float().argmax())][None]
    red = torch.tensor([250.0, 20, 30]) / 255
    assert (head.color(first) - red).abs().max() < (plain.color(first) - red).abs().max() * 0.5
    behind = along[400 - 1 - int((head.sdf(along.flip(0)) < 0).float().argmax())][None]
    own = looks.own_color(head.field, head.codes.renderer, behind / METRES)
    torch.testing.assert_close(head.color(behind), own, atol=0.02, rtol=0)
    assert head.shown(first) > 0.5
    assert head.shown(behind) == 0
    assert plain.shown(first) == 0


def test_an_inverted_person_goes_down_the_road_again(model: E3dgeModel) -> None:
    found = model.encode([photo(model)], Inversion()).latents
    asset = made(model, latents=latents.to_rows(found))
    assert asset.meta["stats"]["closed"]


# ---------------------------------------------------------------------------------------------------------------- faces


def drawn(height: int, shapes: list[tuple[float, float, float, float]]) -> PersonPhoto:
    """Ellipses (x, y, half width, half height)."""
    y, x = np.mgrid[:height, :height] + 0.5
    matte = np.zeros((height, height), bool)
    for cx, cy, a, b in shapes:
        matte |= ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1
    rgba = np.zeros((height, height, 4), np.uint8)
    rgba[..., 3] = 255 * matte
    rows, columns = np.nonzero(matte.any(1))[0], np.nonzero(matte.any(0))[0]
    return PersonPhoto(rgba, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def test_the_head_is_found_above_shoulders() -> None:
    head = (200.0, 140.0, 60.0, 80.0)
    square = face.frame(drawn(400, [head, (200, 220, 30, 60), (200, 360, 170, 90)]))
    left, top, right, bottom = square.box
    assert top < 60 < 220 < bottom
    assert bottom - top == pytest.approx(160 / 0.78, rel=0.15)
    assert (left + right) / 2 == pytest.approx(200, abs=3)


def test_a_face_alone_is_taken_as_it_is_and_a_tiny_one_refused() -> None:
    whole = PersonPhoto(np.full((100, 80, 4), 255, np.uint8), (0, 0, 80, 100))
    assert face.frame(whole).box == [0, 0, 80, 80]
    with pytest.raises(PopulaceError) as caught:
        face.frame(PersonPhoto(whole.rgba, (0, 0, 20, 25)))
    assert caught.value.code == "no_person_found"


def test_cutting_beyond_the_border_repeats_it_without_matte() -> None:
    rgba = np.full((40, 40, 4), 255, np.uint8)
    rgba[:, :, 0] = np.arange(40) * 6
    cut = face.Frame(-20.0, 0.0, 40.0).cut(rgba, 40)
    assert (cut[:, :20, 3] < 128).all()
    assert (cut[:, 21:, 3] == 255).all()
    assert cut[5, 25, 0] == pytest.approx(30, abs=1)
    assert cut[5, 3, 0] == 0


# ----------------------------------------------------------------------------------------------------------- directions


def test_a_direction_is_the_normal_between_two_heaps() -> None:
    generator = np.random.default_rng(0)
    codes = generator.normal(size=(2000, 12)) * generator.uniform(0.5, 2, 12)
    true = generator.normal(size=12)
    true /= np.linalg.norm(true)
    found = directions.learn(codes.astype(np.float32), codes @ true > 0.2)
    assert found @ true / np.linalg.norm(found) > 0.98
    assert np.linalg.norm(found) == pytest.approx((codes @ true).std(), rel=0.05)
    with pytest.raises(PopulaceError):
        directions.learn(codes, np.ones(2000, bool))


def test_published_arrays_are_packed(tmp_path: Path) -> None:
    for name, size in (("r", 256), ("d", 512)):
        np.save(tmp_path / f"{name}.npy", np.arange(size, dtype=np.float64)[None])
    out = tmp_path / "out.safetensors"
    assert directions.main([str(out), f"young={tmp_path / 'r.npy'},{tmp_path / 'd.npy'}"]) == 0
    arrays, _ = packet.load_tensors(out.read_bytes())
    assert arrays["direction.young.decoder"].shape == (512,)
    assert directions.main([str(out), "taller=a,b"]) == 2
