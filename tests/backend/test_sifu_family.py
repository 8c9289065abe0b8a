# SPDX-License-Identifier: GPL-3.0-or-later
"""SIFU and GTA as families: the authors' files are imported safely, a photo becomes latents, latents a field.

The networks are made so that the answer is known: occupancy is a steep function of the body's distance, colour one of
its code. So the surface must be the body's own, and everything on the way can be checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree

from backend import __main__ as cli
from backend import families, pipeline, poses
from backend.checkpoints import convert
from backend.evaluation.inversion import align, make_case, surface_error
from backend.families.base import Latents, LatticeField, PersonPhoto
from backend.families.sifu.config import Config
from backend.families.sifu.model import SifuModel, crop
from backend.families.sifu.networks import Reconstructor
from backend.families.sifu.prior import Placed, SkinnedBody, framed
from backend.families.sifu.stages import Stages
from backend.families.sifu.training import Scan, network_image, photo_of
from backend.families.sifu.transformer import position_table
from backend.geometry.bake import bake
from backend.geometry.clean import clean, is_closed
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface
from backend.geometry.unwrap import unwrap
from backend.protocol import Inversion, PopulaceError, parse_request
from backend.settings import Settings
from backend.training.photos import stand
from tests.backend.sifu_bodies import capsule_body

CPU = torch.device("cpu")
STEEP = 60.0


def known_network(kind: Any = "sifu", seed: int = 0) -> Reconstructor:
    """Occupancy sigmoid(STEEP * signed distance / sqrt 3), colour tanh(2 code - 1) / 2 + 0.5; the rest is random."""
    torch.manual_seed(seed)
    config = Config.tiny(kind)
    network = Reconstructor(config).eval().requires_grad_(False)
    body = config.features - 8
    geo, color = network.decoders.geo_mlp.filters[4], network.decoders.color_mlp.filters[4]
    skip = geo.weight.shape[1] - config.features
    for layer in (geo, color):
        layer.weight.zero_()
        layer.bias.zero_()
    geo.weight[0, skip + body] = STEEP
    for channel in range(3):
        color.weight[channel, skip + body + 1 + channel] = 2.0
        color.bias[channel] = -1.0
    return network


def photo_of_body(body: SkinnedBody, placed: Placed, size: int = 300) -> PersonPhoto:
    """A picture of the body's codes, taller than wide, the person right of the middle."""
    scan = Scan(placed.vertices(body), body.faces, body.codes, placed)
    square = (photo_of(scan, size, None) * 255).round().to(torch.uint8).movedim(0, 2).numpy()
    rgba = np.zeros((size + 100, size + 60, 4), np.uint8)
    rgba[30 : 30 + size, 50 : 50 + size] = square
    rows, columns = np.nonzero(rgba[..., 3] > 127)
    return PersonPhoto(rgba, (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))


def posed_body(name: str = "standing_1") -> tuple[SkinnedBody, Placed]:
    body = capsule_body(3000)
    turns = torch.from_numpy(poses.to_matrices(poses.pose(name, body.rig(torch.zeros(2)))[0])).float()
    return body, framed(body, torch.zeros(2), turns, 0.85)


@pytest.fixture(scope="module")
def model() -> SifuModel:
    return SifuModel(Stages.of_network(known_network()), lambda: capsule_body(3000), CPU, "0" * 64)


@pytest.fixture(scope="module")
def made(model: SifuModel):
    body, placed = posed_body()
    encoded = model.encode([photo_of_body(body, placed)], Inversion(steps=0))
    return encoded, model.decode(encoded.latents)[0]


def test_a_photo_becomes_latents_pose_and_camera(model: SifuModel, made) -> None:
    encoded, _ = made
    body, placed = posed_body()
    assert encoded.latents.maps["body/photo"].shape == (512, 512, 4)
    assert encoded.scores["mask_iou"] > 0.8  # the pose is one of the library, found by its outline
    assert set(encoded.rotations) == set(body.bones)
    found = model.placed(encoded.latents.codes["body/shape"][0])
    turns = torch.from_numpy(poses.to_matrices(np.array(list(encoded.rotations.values())))).float()
    assert torch.allclose(turns, found.rotations, atol=1e-5)
    camera = encoded.camera
    c2w, focal = np.array(camera["c2w"]), camera["height"] / 2 / np.tan(camera["fov_y_rad"] / 2)
    posed = body.posed(found.shape, found.rotations).numpy()
    seen = (posed - c2w[:3, 3]) @ c2w[:3, :3]
    pixels = np.stack([camera["width"] / 2 + focal * seen[:, 0] / -seen[:, 2],
                       camera["height"] / 2 - focal * seen[:, 1] / -seen[:, 2]], 1)  # fmt: skip
    photo = photo_of_body(body, placed)
    left, top, right, bottom = photo.box
    assert np.abs(pixels.min(0) - [left, top]).max() < 12
    assert np.abs(pixels.max(0) - [right, bottom]).max() < 12


def test_the_field_is_the_body_where_the_networks_say_so(model: SifuModel, made) -> None:
    encoded, field = made
    assert isinstance(field, LatticeField)
    mesh = extract_surface(field, 96)
    assert is_closed(mesh)
    found = model.placed(encoded.latents.codes["body/shape"][0])
    network = found.to_network(mesh.points)
    off = found.mesh(model.body).nearest(network).distance / found.scale
    assert off.mean() < 0.003
    assert off.max() < 0.02
    assert (field.sdf(found.to_metres(torch.zeros(1, 3))) < 0).all()
    outside = torch.tensor([[0.9, 0.0, 0.0], [5.0, 1.0, 0.0]])
    assert (field.sdf(outside) > 0).all()


def test_the_rest_pose_is_the_bodys_and_posing_again_gives_the_photo(model: SifuModel, made) -> None:
    encoded, field = made
    found = model.placed(encoded.latents.codes["body/shape"][0])
    at = torch.arange(0, len(field.posed), 7)
    vertices = field.posed[at]
    rest = vertices + field.offset(vertices)
    assert (rest - model.body.rest(found.shape)[at]).norm(dim=1).quantile(0.95) < 0.01
    indices, weights = field.skin(vertices)
    assert torch.allclose(weights.sum(1), torch.ones(len(at)), atol=1e-5)
    rotations = np.array([encoded.rotations[name] for name in field.rig.names])
    again = poses.skin(rest, indices, weights, field.rig, rotations, np.zeros((1, 3)))
    assert np.abs(again - vertices.numpy()).max() < 1e-3


def test_colours_are_the_photos_where_it_sees_and_the_networks_elsewhere(model: SifuModel, made) -> None:
    encoded, field = made
    found = model.placed(encoded.latents.codes["body/shape"][0])
    speaker = found.mesh(model.body)
    front = field.posed[(-speaker.winding_normals[:, 2] * 1.0 > 0.9) & speaker.seen()]
    back = field.posed[-speaker.winding_normals[:, 2] < -0.6]
    assert len(front) > 50
    assert len(back) > 50
    share, pixels = field._from_photo(front)
    assert share.median() > 0.9
    assert field._from_photo(back)[0].max() < 1e-3
    own = field.answers.color(found.to_network(back))
    assert torch.allclose(field.color(back), own)
    codes = speaker.carry(speaker.codes, speaker.nearest(found.to_network(back)))
    assert (own - ((2 * codes - 1).tanh() / 2 + 0.5)).abs().max() < 1e-4
    sure = share > 0.99
    assert torch.allclose(field.color(front)[sure], pixels[sure].clamp(0, 1), atol=1e-5)
    half = Latents("sifu", {**encoded.latents.codes, "body/tex": torch.full((1, 3), 0.5)}, encoded.latents.maps)
    assert torch.allclose(model.decode(half)[0].color(back), own / 2, atol=1e-6)


def test_the_common_road_bakes_it(model: SifuModel, made) -> None:
    field = made[1]
    mesh = clean(extract_surface(field, 64))
    small = simplify(mesh, 3000)
    flat = unwrap(small, field.region(small.points), 256)
    textures = bake(field, mesh, flat, 256)
    assert textures.base_color.shape == (256, 256, 3)
    assert textures.base_color.float().std() > 10


def test_the_body_fit_makes_a_bad_guess_better(model: SifuModel) -> None:
    """An arm is raised as in no pose of the library."""
    body, placed = posed_body()
    turns = placed.rotations.clone()
    arm = body.bones.index("upper_arm.L")
    turns[arm] = turns[arm] @ torch.from_numpy(poses.to_matrices(np.array([[0.966, 0, 0, 0.259]]))[0]).float()
    photo = photo_of_body(body, framed(body, placed.shape, turns, 0.85))
    first, fitted = (model.encode([photo], Inversion(steps=n)).scores["mask_iou"] for n in (0, 25))
    assert fitted > first + 0.01


def test_the_same_latents_are_computed_once_and_others_are_refused(model: SifuModel, made) -> None:
    encoded, field = made
    assert model.decode(encoded.latents)[0].answers is field.answers
    with pytest.raises(PopulaceError, match="from photos, not from seeds"):
        model.decode(model.sample(7, 1.0))
    with pytest.raises(PopulaceError, match="has 3 numbers"):
        model.decode(Latents("sifu", {"body/shape": torch.ones(1, 3), "body/tex": torch.ones(1, 3)},
                             encoded.latents.maps))  # fmt: skip
    with pytest.raises(PopulaceError, match="no attribute 'age'"):
        model.edit(encoded.latents, {"age": 3.0})
    empty = PersonPhoto(np.zeros((50, 40, 4), np.uint8), (0, 0, 40, 50))
    with pytest.raises(PopulaceError, match="mask of the photo is empty"):
        model.encode([empty], Inversion(steps=0))


def test_a_crop_is_square_with_room_and_transparent_beyond_the_photo() -> None:
    rgba = np.full((100, 80, 4), 200, np.uint8)
    square, corner, side = crop(PersonPhoto(rgba, (40, 0, 80, 100)))
    assert side == 111
    assert corner == (4.0, -6.0)
    assert square.shape == (111, 111, 4)
    assert (square[:5, :, 3] == 0).all()
    assert (square[6:106, :76] == 200).all()
    assert (square[:, 76:] == 0).all()


# -------------------------------------------------------------------------------------------------------- the files


def official_files(folder: Path, kind: Any = "sifu") -> tuple[Path, Path, Reconstructor]:
    """As the authors' programs write them, at tiny size."""
    network = known_network(kind)
    state = {f"netG.{name}": tensor for name, tensor in network.state_dict().items()}
    main = {name: tensor for name, tensor in state.items() if ".normal_filter." not in name}
    main |= {"netG.reconEngine.weight": torch.ones(2), "netG.voxelization.smpl_vertices": torch.ones(3)}
    normal = {name.replace("normal_filter.", ""): tensor for name, tensor in state.items() if ".normal_filter." in name}
    one, two = folder / f"{kind}.ckpt", folder / "normal.ckpt"
    torch.save({"epoch": 3, "state_dict": main}, one)
    torch.save({"epoch": 3, "state_dict": normal}, two)
    return one, two, network


@pytest.mark.parametrize("kind", ["sifu", "gta"])
def test_the_authors_files_are_imported_and_used(kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path))
    one, two, network = official_files(tmp_path, kind)
    assert cli.main(["weights", "import", kind, str(one), "--own"]) == 0
    with pytest.raises(PopulaceError, match="normal networks") as error:
        families.load(kind, "cpu", Settings.load())
    assert f"populace weights import {kind} normal.ckpt" in str(error.value.hint)
    assert cli.main(["weights", "import", kind, str(two), "--own"]) == 0
    assert "non-commercial" in capsys.readouterr().out
    loaded = families.load(kind, "cpu", Settings.load())
    assert isinstance(loaded, SifuModel)
    assert loaded.name == kind
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    body = {side: image.flip(3) for side in "FBRL"}
    front, back = loaded.stages.normals(image, body)
    assert torch.allclose(front, network.normals(image, body)[0], atol=1e-5)
    features = torch.randn(1, network.config.features, 50, generator=torch.Generator().manual_seed(3))
    found, wanted = loaded.stages.decoders.occupancy(features), network.decoders.occupancy(features)
    assert torch.allclose(found, wanted, atol=1e-6)
    planes = loaded.stages.planes(image, front, back, body)
    # heads are not told by the shapes of an own file; everything behind the attention is compared above
    assert planes["N"].shape == (12, 32, 32)
    assert loaded.stages.config.image == 128


def changed(folder: Path, change: Any, name: str = "changed.ckpt") -> Path:
    """The tiny main file after `change(state_dict)`."""
    one, _, _ = official_files(folder)
    content = torch.load(one, weights_only=True)
    change(content["state_dict"])
    torch.save(content, folder / name)
    return folder / name


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    gone = "netG.mlp.geo_mlp.filters.2.weight"
    cases = [
        (lambda s: s.pop(gone), r"1 tensors are missing: mlp\.geo_mlp\.filters\.2\.weight"),
        (lambda s: s.update({"netG.extra": torch.ones(1)}), "1 tensors do not belong there: extra"),
        (lambda s: s.update({gone: torch.ones(3, 2, 1)}), r"filters\.2\.weight is \[3, 2, 1\] instead of"),
        (lambda s: s.update({"netG.F_filter.conv2.downsample.0.weight": torch.zeros(16)}), "differs from its second"),
        (lambda s: s.update({"netG.image_filter.encoder.en_pos_embedding": torch.zeros(1, 64, 32)}), "positions"),
        (lambda s: s.update({"netG.mlp.color_mlp.filters.0.bias": torch.full((64,), torch.nan)}), "not finite"),
    ]
    for change, said in cases:
        path = changed(tmp_path, change)
        with pytest.raises(PopulaceError, match=said):
            convert("sifu", path, own=True)
    one, two, _ = official_files(tmp_path)
    with pytest.raises(PopulaceError, match="tensors are missing"):
        convert("sifu", one)  # strict: without --own these are not the published sizes
    with pytest.raises(PopulaceError, match="it is a file of SIFU; import it as sifu"):
        convert("gta", one)
    with pytest.raises(PopulaceError, match="tensors are missing"):
        convert("sifu", two)
    assert convert("sifu", two, own=True).name == "sifu_normals"
    found = convert("sifu", one, own=True)
    assert found.name == "sifu_official"
    assert not [name for name in found.arrays if "downsample.0" in name or "pos_embedding" in name]


def test_what_networks_see_is_zero_beyond_the_matte() -> None:
    rgba = torch.rand(4, 8, 8)
    rgba[3] = (torch.arange(8) > 3).float()
    image = network_image(rgba)
    assert (image[:, :, :4] == 0).all()
    assert torch.allclose(image[:, :, 4:], rgba[:3, :, 4:] * 2 - 1)
    assert position_table(8, 32).shape == (1, 64, 32)


def test_populace_invert_makes_a_rigged_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole road with the default model's body: a picture file in, a GLB in the photo's pose out, and again from
    its latents in another pose."""
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path))
    for file in official_files(tmp_path)[:2]:
        assert cli.main(["weights", "import", "sifu", str(file), "--own"]) == 0
    body, placed = posed_body()
    photo = photo_of_body(body, placed)
    Image.fromarray(photo.rgba).save(tmp_path / "photo.png")
    out = tmp_path / "people"
    small = ["--family=sifu", "--grid-resolution=48", "--faces=1500", "--texture-size=512", "--device=cpu"]
    assert cli.main(["invert", str(tmp_path / "photo.png"), "--steps=2", "--set", "surface=official",
                     f"--out={out}", *small]) == 0  # fmt: skip
    glb = next(out.glob("*.glb")).read_bytes()
    told = json.loads(glb[20 : 20 + int.from_bytes(glb[12:16], "little")])
    assert len(told["skins"][0]["joints"]) > 20
    assert told["meshes"]
    with pytest.raises(PopulaceError, match="makes people from photos"):
        pipeline.generate(parse_request({"family": "sifu", "seed": 1}), families.load("sifu", "cpu", Settings.load()))


def test_it_works_out_of_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that ship, on a person whom nobody trained on: nearer than the body that the networks are told of
    could be by chance, and in the photo's colours."""
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path))
    people: Any = families.load("people", "cpu", Settings.load())
    model = families.load("sifu", "cpu", Settings.load())
    case = make_case(people, 1)
    encoded = model.encode(case.photos, Inversion(steps=0))  # pyright: ignore[reportAttributeAccessIssue]
    assert encoded.scores["mask_iou"] > 0.7  # of the first guess
    field = model.decode(encoded.latents)[0]
    mesh = clean(extract_surface(field, 80))
    assert is_closed(mesh)
    truth = stand(case.figure, case.rotations)
    scale, turn, shift = align(mesh.points.numpy(), truth)
    placed = scale * mesh.points.numpy() @ turn.T + shift
    assert surface_error(placed, mesh.faces.numpy(), truth, case.figure.faces)["chamfer_mm"] < 35
    near = cKDTree(truth).query(placed)[1]
    off = field.color(mesh.points).numpy() - case.figure.colors[near] / 255
    assert float(np.abs(off).mean()) < 0.15
