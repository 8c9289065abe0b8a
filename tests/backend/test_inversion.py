# SPDX-License-Identifier: GPL-3.0-or-later
"""Photos to people: frames, maps, light, fit and measures against what is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backend import families, poses
from backend.evaluation import inversion as measured
from backend.families.base import Latents, PersonPhoto
from backend.families.people import encoder, fit, inversion, photo_maps, pose_search
from backend.families.people.config import PARTS, TRIM
from backend.families.people.encoder import JOINTS, Placement, joint_rotations, mirrored, placement
from backend.families.people.wardrobe import OPEN, SKIRT
from backend.photo import posing
from backend.protocol import Inversion, PopulaceError
from backend.settings import Settings
from backend.training import photos
from backend.training.encoder import EncoderStage
from backend.training.encoder import Settings as Plan


@pytest.fixture(scope="module")
def model():
    return families.load("people", "cpu", Settings.load())


@pytest.fixture(scope="module")
def figure(model):
    return photos.make_figure(model, model.sample(11, 0.7), 96)


@pytest.fixture(scope="module")
def shot(figure):
    """A person, in a calm pose, in a photo whose camera is known."""
    return _shoot(figure, photos.random_rotations(np.random.default_rng(3), figure.bones), 0.3)


def _shoot(figure, rotations, yaw: float):
    """(rotations, vertices, view, photo)."""
    vertices = photos.stand(figure, rotations)
    view = photos.view_from(vertices, yaw, 0.05, distance=3.5)
    view = photos.View(view.c2w, 2 * math.atan(1.3 * math.tan(view.fov / 2)))
    light = photos.Light(np.array([0.3, 0.5, 0.81]), np.full(3, 0.6), np.full(3, 0.5), np.full(3, 0.3))
    image = photos.take(figure, rotations, view, light, 480, 2, vertices)
    rgba = (image * 255 + 0.5).astype(np.uint8)
    rows, columns = np.nonzero(rgba[..., 3] > 127)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return rotations, vertices, view, PersonPhoto(rgba, box)


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [(0, 0, -1), (0.3, -0.2, -1), (-1, 1, -0.5)])
def test_towards_turns_the_axis_of_view(direction):
    d = torch.tensor(direction, dtype=torch.float32)
    turn = encoder.towards(d)
    torch.testing.assert_close(turn @ torch.tensor([0, 0, -1.0]), d / d.norm(), atol=1e-6, rtol=0)
    torch.testing.assert_close(turn @ turn.T, torch.eye(3), atol=1e-6, rtol=0)


def test_rotations_survive_six_numbers():
    q = np.random.default_rng(0).normal(size=(50, 4))
    matrices = torch.from_numpy(poses.to_matrices(q))
    torch.testing.assert_close(encoder.to_rotation(encoder.to_six(matrices)), matrices)


def test_a_crop_is_seen_by_the_camera_it_says():
    """White dots on black are found in the square where its own pinhole says they are."""
    height, width, fov = 300, 500, math.radians(60)
    focal = 0.5 * height / math.tan(fov / 2)
    dots = [(400, 80), (440, 120), (420, 200)]
    rgba = np.zeros((height, width, 4), np.uint8)
    rgba[..., 3] = 255
    for x, y in dots:
        rgba[y, x] = 255
    seen = encoder.crop(PersonPhoto(rgba, (360, 40, 480, 240)), 400, fov)
    for x, y in dots:
        ray = torch.tensor([(x + 0.5 - width / 2) / focal, -(y + 0.5 - height / 2) / focal, -1.0])
        local = seen.turn.T @ ray
        column = (local[0] / -local[2] / math.tan(seen.fov / 2) + 1) / 2 * 400
        row = (1 + local[1] / local[2] / math.tan(seen.fov / 2)) / 2 * 400
        patch = seen.square[0, int(row) - 3 : int(row) + 4, int(column) - 3 : int(column) + 4]
        assert patch.sum() > 0.5 * seen.square[0].sum() / len(dots)
    assert float(seen.seen.mean()) < 1  # beyond the right edge of the photo nothing is known


def test_kinematics_equal_the_exports(figure):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(len(figure.bones.names), 4))
    q[:, 0] += 3
    rotations = torch.from_numpy(poses.to_matrices(q))
    heads = torch.from_numpy(figure.bones.heads.astype(np.float64))
    turns, places = posing.forward_kinematics(rotations[None], heads[None], figure.bones.parents.tolist())
    exact = poses.bone_matrices(figure.bones, q, np.zeros((1, 3)))
    np.testing.assert_allclose(turns[0].numpy(), exact[:, :, :3], atol=1e-12)
    vertices = torch.from_numpy(figure.vertices[:500].astype(np.float64))
    indices = torch.from_numpy(figure.skin_indices[:500].astype(np.int64))
    weights = torch.from_numpy(figure.skin_weights[:500].astype(np.float64))
    weights = weights / weights.sum(1, keepdim=True)
    mine = posing.skin(vertices, indices, weights, turns[0], places[0], heads)
    theirs = poses.skin(vertices, indices, weights, figure.bones, q, np.zeros((1, 3)))
    np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-6)


def test_a_pose_in_the_mirror_is_the_mirrored_pose(figure):
    rotations = photos.random_rotations(np.random.default_rng(2), figure.bones, 1.0)
    other = photos.mirrored(rotations, figure.bones.names)
    symmetric = poses.Bones(figure.bones.names, figure.bones.parents, figure.bones.heads.copy(), figure.bones.tails)
    names = list(symmetric.names)
    for j, name in enumerate(names):  # a skeleton that is its own mirror image
        if name.endswith("_l"):
            k = names.index(name[:-2] + "_r")
            symmetric.heads[k] = symmetric.heads[j] * [-1, 1, 1]
        elif not name.endswith("_r"):
            symmetric.heads[j, 0] = 0
    ends = [poses.bone_matrices(symmetric, r, np.zeros((1, 3))) for r in (rotations, other)]
    at = [np.einsum("jik,jk->ji", m[:, :, :3], symmetric.heads.astype(np.float64)) + m[:, :, 3] for m in ends]
    partner = [names.index(n[:-2] + {"_l": "_r", "_r": "_l"}[n[-2:]]) if n[-2:] in ("_l", "_r") else j
               for j, n in enumerate(names)]  # fmt: skip
    np.testing.assert_allclose(at[1], at[0][partner] * [-1, 1, 1], atol=1e-9)


def test_what_is_said_of_the_mirrored_square_is_the_mirrored_answer():
    random = torch.Generator().manual_seed(4)
    said = {"turn": torch.randn(1, 6, generator=random), "joints": torch.randn(1, 6 * len(JOINTS), generator=random),
            "place": torch.randn(1, 3, generator=random), "top/worn": torch.ones(1, 1)}  # fmt: skip
    other, mirror = mirrored(said), torch.diag(torch.tensor([-1.0, 1, 1]))
    partner = [JOINTS.index(n[:-2] + {"_l": "_r", "_r": "_l"}[n[-2:]]) if n[-2:] in ("_l", "_r") else j
               for j, n in enumerate(JOINTS)]  # fmt: skip
    turned = mirror @ joint_rotations(said["joints"])[0, partner] @ mirror
    torch.testing.assert_close(joint_rotations(other["joints"])[0], turned)
    here, there = placement(said, 0.7), placement(other, 0.7)
    torch.testing.assert_close(there.turn, mirror @ here.turn @ mirror)
    torch.testing.assert_close(there.shift, mirror @ here.shift)
    assert all(torch.equal(mirrored(other)[name], value) for name, value in said.items())


# --- photo maps ------------------------------------------------------------------------------------------------------


def test_a_map_is_a_picture_and_back():
    random = torch.Generator().manual_seed(0)
    planes = [(torch.rand(4, *p.shape, generator=random) * 255).round() / 255 for p in photo_maps.PLACES]
    planes = [torch.cat([p[:3] * (p[3:] > 0.5), (p[3:] > 0.5).float()]) for p in planes]
    for a, b in zip(planes, photo_maps.planes_of(photo_maps.picture_of(planes)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="photo map"):
        photo_maps.planes_of(torch.zeros(10, 10, 4, dtype=torch.uint8))


def test_what_was_laid_is_read_where_it_was_laid():
    """Colours that are the coordinates come back as the coordinates, and nowhere else."""
    line = torch.linspace(-0.2, 0.2, 300)
    x, y = torch.meshgrid(line, line + 1.0, indexing="ij")
    points = torch.stack([x, y, torch.full_like(x, 0.1)], -1).reshape(-1, 3)
    facing = torch.tensor([0.0, 0, 1]).expand_as(points)
    colors = torch.stack([points[:, 0] + 0.5, points[:, 1] - 0.5, torch.full((len(points),), 0.25)], 1)
    canvas = photo_maps.Canvas()
    canvas.lay(points, facing, colors, torch.ones(len(points)), photo_maps.BODY_BOX)
    picture = canvas.finish(symmetric=False)
    assert picture is not None
    planes = photo_maps.planes_of(picture)
    middle = ((points[:, :2] - points.new_tensor([0, 1.0])).abs() < 0.18).all(1)
    color, weight = photo_maps.read(planes, points[middle], facing[middle])
    assert float(weight.min()) == 1
    assert float((color - colors[middle]).abs().max()) < 2 / 255
    assert float(photo_maps.read(planes, points, -facing)[1].max()) == 0
    assert float(photo_maps.read(planes, points + 0.5, facing)[1].max()) == 0
    assert photo_maps.Canvas().finish(symmetric=True) is None


def test_the_unseen_half_is_the_mirrored_one():
    points = torch.rand(40000, 3, generator=torch.Generator().manual_seed(1)) * 0.1 + torch.tensor([0.1, 0.9, 0.1])
    facing = torch.tensor([0.0, 0, 1]).expand_as(points)
    canvas = photo_maps.Canvas()
    canvas.lay(points, facing, torch.rand(len(points), 1).expand(-1, 3) * 0 + 0.7, torch.ones(len(points)),
               photo_maps.BODY_BOX)  # fmt: skip
    inner = points[((points - points.new_tensor([0.15, 0.95, 0.15]))[:, :2].abs() < 0.03).all(1)]
    mirrored = inner * inner.new_tensor([-1.0, 1, 1])
    for symmetric in (False, True):
        picture = canvas.finish(symmetric)
        assert picture is not None
        color, weight = photo_maps.read(photo_maps.planes_of(picture), mirrored, facing[: len(inner)])
        assert bool((weight == 1).all()) == symmetric
        if symmetric:
            assert float((color - 0.7).abs().max()) < 2 / 255


def test_a_person_without_maps_is_as_before_and_a_map_changes_only_its_part(model):
    latents = model.sample(11, 0.7)
    planes = [torch.ones(4, *p.shape) for p in photo_maps.PLACES]
    marked = Latents(latents.family, latents.codes, {"top/photo": photo_maps.picture_of(planes)})
    plain, with_map = model.decode(latents)[0], model.decode(marked)[0]
    figure = photos.make_figure(model, latents, 64)
    points = torch.from_numpy(figure.points)
    before, after, label = plain.color(points), with_map.color(points), plain.label(points)
    top = label == 1 + plain.worn.index("top")
    assert torch.equal(before[~top], after[~top])
    assert float((after[top] - 1).abs().max()) < 1e-3
    topless = {k: v for k, v in latents.codes.items() if "top" not in k}
    for name, codes in (("top/map", latents.codes), ("top/photo", topless)):
        with pytest.raises(PopulaceError, match="no map named"):
            model.decode(Latents("people", codes, {name: marked.maps["top/photo"]}))


# --- the fit ---------------------------------------------------------------------------------------------------------


def _sitting(model, figure, shot, play: float) -> tuple[fit.Sitting, dict[str, torch.Tensor]]:
    """The truth, joints and place disturbed."""
    rotations, _, view, photo = shot
    seen = encoder.crop(photo, inversion.FITTED, view.fov)
    random = torch.Generator().manual_seed(0)
    turn = torch.from_numpy(view.c2w[:3, :3].T).float()
    names = list(figure.bones.names)
    pelvis = torch.from_numpy(figure.bones.heads[names.index("pelvis")])
    shift = turn @ (pelvis - torch.from_numpy(view.c2w[:3, 3]).float())
    known = torch.from_numpy(poses.to_matrices(rotations)).float()
    at = torch.tensor([names.index(n) for n in JOINTS])
    noise = fit._rotation(play * torch.randn(len(JOINTS), 3, generator=random))
    place = Placement(seen.turn.T @ turn, seen.turn.T @ shift * (1 + 0.3 * play))
    sitting = fit.Sitting(seen, known.index_copy(0, at, noise @ known[at]), place)
    return sitting, {k: torch.from_numpy(v) for k, v in figure.codes.items()}


def test_the_truth_explains_the_photo(model, figure, shot):
    """Known codes, pose and camera: outlines within a percent, and the light is found."""
    sitting, codes = _sitting(model, figure, shot, 0.0)
    found = fit.Fit(model, codes, [sitting])
    found.solve_light()
    scores = inversion._scores(found)
    assert scores["mask_iou"] > 0.97
    assert scores["psnr_db"] > 27
    light = fit._lit(sitting)
    normals = torch.nn.functional.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    normals = normals[normals[:, 2] > 0.3]
    known = photos.Light(np.array([0.3, 0.5, 0.81]), np.full(3, 0.6), np.full(3, 0.5), np.full(3, 0.3))
    truth = photos.lit(torch.ones(len(normals), 3), normals, known)
    mine = fit.harmonics(normals) @ light
    assert float((mine - truth).abs().mean() / truth.mean()) < 0.12


def test_the_fit_comes_back_from_a_disturbed_start(model, figure, shot):
    sitting, codes = _sitting(model, figure, shot, 0.12)
    codes["body/shape"] = torch.zeros_like(codes["body/shape"])
    found = fit.Fit(model, codes, [sitting])
    found.solve_light()
    before, overlap = found.score(), inversion._scores(found)["mask_iou"]
    found.descend(20, inversion.FITTED // 2)
    found.solve_light()
    assert found.score() < 0.4 * before
    assert inversion._scores(found)["mask_iou"] > max(0.88, overlap)


def test_clothes_where_skin_is_drawn_do_not_colour_the_skin(model, figure, shot):
    """Known body and pose, but nothing is worn: most of the skin that is drawn lies on clothes of the photo."""
    sitting, codes = _sitting(model, figure, shot, 0.0)
    found = fit.Fit(model, {k: v for k, v in codes.items() if k.startswith(("body", "hair"))}, [sitting])
    found.solve_light()
    found.solve_colors()
    torch.testing.assert_close(found.codes["body/tex"][0, :3], codes["body/tex"][0, :3], atol=0.05, rtol=0)


def test_sleeves_are_found(model, figure):
    """A sweater with its sleeves cut short; the fit begins with long ones."""
    items = [item["name"] for item in model.facts["items"]["top"]]
    codes = {k: torch.from_numpy(v).clone() for k, v in figure.codes.items()}
    shape = codes["top/shape"] = torch.zeros_like(codes["top/shape"])
    shape[0, items.index("male_casualsuit02/top")], shape[0, -1] = 1, 1
    shape[0, TRIM] = torch.tensor([-0.3, *OPEN["top"][1:]])
    cut = photos.make_figure(model, Latents("people", codes))
    sitting, said = _sitting(model, cut, _shoot(cut, poses.pose("arms_down", cut.bones)[0].astype(np.float64), 0.2), 0)
    said["top/shape"][0, TRIM.start] = OPEN["top"][0]
    found = fit.Fit(model, said, [sitting])
    found.solve_light()
    before = found.score()
    found.search_length("top")
    assert float(found.codes["top/shape"][0, TRIM.start]) == pytest.approx(-0.3, abs=0.25)
    assert found.score() < 0.8 * before
    found.search_length("top")  # and they stay
    assert float(found.codes["top/shape"][0, TRIM.start]) == pytest.approx(-0.3, abs=0.25)


@pytest.mark.parametrize("part", ["top", "bottom"])
def test_an_item_is_said_as_it_was_made(model, part):
    """Nothing of it is trimmed: its code is that of the same garment off the rail."""
    from backend.training.casting import Garment
    from backend.training.people import garment_codes

    items = model.facts["items"][part]
    said = {name: torch.zeros(1, size) for name, size in encoder.layout(model.facts).items()}
    codes = encoder.write_part(part, said, model.facts, item=2)
    shape, _ = garment_codes(part, Garment(items[2]["name"], np.zeros(6)), items)
    np.testing.assert_array_equal(codes[f"{part}/shape"][0].numpy(), shape)


def test_a_skirt_that_is_said_ends_below_the_chest(model):
    """The kit's skirt is as long as the body."""
    names = [item["name"] for item in model.facts["items"]["bottom"]]
    said = {name: torch.zeros(1, size) for name, size in encoder.layout(model.facts).items()}
    codes = {k: v for k, v in model.sample(3, 0.0).codes.items() if k.startswith("body")}
    codes |= encoder.write_part("bottom", said, model.facts, names.index(SKIRT))
    worn = fit.surface_of(model, codes)
    skirt = worn.points[worn.labels == 1]
    assert len(skirt) > 500
    assert float(skirt[:, 1].max()) < 1.15  # metres; chins are at 1.45
    assert model.describe_part("bottom", {k: v for k, v in codes.items() if k.startswith("bottom")}) == "skirt"


def test_a_step_with_the_other_leg_is_found(model, figure):
    """Seen from the side: the mirrored step leaves about the same outline, and from there descent does not arrive."""
    rotations = poses.pose("walking", figure.bones)[0].astype(np.float64)
    sitting, codes = _sitting(model, figure, _shoot(figure, rotations, 1.3), 0.0)
    truth, place = sitting.rotations, sitting.place
    legs = [model.bones.index(name) for name in ("thigh_l", "thigh_r", "calf_l", "calf_r")]
    off = {}
    for way in ("descent", "search"):
        sitting.rotations, sitting.place, sitting.said = pose_search.mirrored(truth, model.bones), place, None
        found = fit.Fit(model, codes, [sitting])
        found.solve_light()
        if way == "search":
            pose_search.search(found, 6, inversion.FITTED // 2, lambda fraction: None)
        found.descend(20, inversion.FITTED // 2)
        cosine = ((truth.transpose(1, 2) @ found.sittings[0].rotations).diagonal(0, 1, 2).sum(1) - 1) / 2
        off[way] = math.degrees(float(cosine[legs].clamp(-1, 1).arccos().mean()))
    assert off["descent"] > 15
    assert off["search"] < 6


def test_the_nearest_rotation_is_the_rotation_of_a_scaled_one():
    turn = torch.linalg.qr(torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turn = turn * torch.det(turn)[:, None, None]
    torch.testing.assert_close(pose_search.nearest_rotation(turn.float() * 0.3), turn.float(), atol=1e-5, rtol=0)
    half = pose_search.nearest_rotation((turn + torch.eye(3)).float() / 2)
    torch.testing.assert_close(torch.det(half), torch.ones(50), atol=1e-5, rtol=0)


def test_the_gradient_of_a_place_is_that_of_differences(model, figure, shot):
    """Sideways motion: the renderer's derivative against a wide central difference."""
    sitting, codes = _sitting(model, figure, shot, 0.03)
    found = fit.Fit(model, codes, [sitting])
    found.solve_light()

    def loss(x: torch.Tensor) -> torch.Tensor:
        place = Placement(sitting.place.turn, sitting.place.shift + torch.stack([x, x * 0, x * 0]))
        clip, vertices = found.clip(sitting, codes["body/shape"], sitting.rotations, place)
        return found.difference(0, found.draw(sitting, clip, vertices, inversion.FITTED))

    x = torch.tensor(0.02, requires_grad=True)
    loss(x).backward()
    assert x.grad is not None
    with torch.no_grad():
        h = 0.004
        slope = (loss(torch.tensor(0.02 + h)) - loss(torch.tensor(0.02 - h))) / (2 * h)
    assert float(x.grad) == pytest.approx(float(slope), rel=0.25)


def test_encode_end_to_end(model, shot):
    """At first glance and with a short fit: the fit is nearer to the photo; all edits work; the same bytes twice."""
    photo = shot[3]
    seen: list[str] = []
    quick = model.encode([photo], Inversion(steps=0, texture=False))
    fitted = model.encode([photo], Inversion(steps=12), lambda stage, fraction: seen.append(stage))
    assert list(dict.fromkeys(seen)) == ["encode", "fit", "project"]
    assert fitted.scores["mask_iou"] > quick.scores["mask_iou"]
    assert not quick.latents.maps
    assert "body/photo" in fitted.latents.maps
    assert set(fitted.rotations) == set(model.bones)
    again = model.encode([photo], Inversion(steps=12))
    assert all(torch.equal(fitted.latents.codes[k], again.latents.codes[k]) for k in fitted.latents.codes)
    assert all(torch.equal(fitted.latents.maps[k], again.latents.maps[k]) for k in fitted.latents.maps)
    edited = model.edit(fitted.latents, {"height_m": 1.9, "weight": 0.8})
    assert model.describe(edited)["height_m"] == pytest.approx(1.9, abs=0.01)
    # the photo's own camera shows our person where the photo shows them
    mine = photos.make_figure(model, fitted.latents, 80)
    field = model.decode(fitted.latents)[0]
    c2w = np.array(fitted.camera["c2w"])
    c2w[1, 3] += mine.bones.heads[1, 1] - float(field.rig.heads[1, 1])
    rotations = np.array([fitted.rotations[b] for b in mine.bones.names])
    image = photos.take(mine, rotations, photos.View(c2w, fitted.camera["fov_y_rad"]), None, photo.rgba.shape[0], 1)
    ours, theirs = image[..., 3] > 0.5, photo.rgba[..., 3] > 127
    assert (ours & theirs).sum() / (ours | theirs).sum() > fitted.scores["mask_iou"] - 0.05


def test_a_time_box_is_kept(model, shot):
    import time

    begin = time.monotonic()
    model.encode([shot[3]], Inversion(steps=1000, seconds=2.0, texture=False))
    assert time.monotonic() - begin < 60  # a thousand steps take minutes on any CPU


def test_weights_without_an_encoder_say_so(model, shot, monkeypatch):
    monkeypatch.setattr(model, "encoder", None)
    with pytest.raises(PopulaceError, match="cannot read photos") as error:
        model.encode([shot[3]], Inversion())
    assert error.value.code == "weights_missing"


# --- the encoder's training ------------------------------------------------------------------------------------------


def test_the_encoder_learns_one_photo_by_heart(model, tmp_path):
    from backend.training.encoder import make_figures

    paths = make_figures(model, tmp_path, 1)
    assert make_figures(model, tmp_path, 1) == paths
    stage = EncoderStage(model, paths, Plan(batch=2, workers=0, steps=1000), 0)
    batch = {k: torch.stack([v, v]) for k, v in stage.photos[5].items()}
    again = stage.photos[5]
    assert all(torch.equal(batch[k][0], again[k]) for k in again)
    losses = []
    for _ in range(30):
        loss, _ = stage.loss(batch)
        stage.optimiser.zero_grad()
        loss.backward()
        stage.optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]


def test_true_answers_cost_nothing(model, tmp_path):
    """What the losses ask for is what `write_codes` and `placement` read."""
    from backend.training.encoder import make_figures

    stage = EncoderStage(model, make_figures(model, tmp_path, 1), Plan(batch=1, workers=0), 0)
    batch = {k: v[None] for k, v in stage.photos[7].items()}
    said = {name: torch.zeros(1, count) for name, count in encoder.layout(model.facts).items()}
    rest = torch.tensor([1.0, 0, 0, 0, 1, 0])
    said["turn"], said["place"] = encoder.to_six(batch["turn"]), batch["place"]
    said["joints"] = (encoder.to_six(batch["rotations"][:, stage.at]) - rest).flatten(1)
    said["body/shape"], said["body/palette"] = batch["body/shape"], batch["body/tex"][:, :6]
    for name, at in (("skin", fit_slice("SKIN")), ("brow", fit_slice("BROW")), ("iris", fit_slice("IRIS"))):
        said[f"body/{name}"] = 60 * batch["body/tex"][:, at][:, : said[f"body/{name}"].shape[1]]
    for part in PARTS:
        shape, tex = batch[f"{part}/shape"], batch[f"{part}/tex"]
        said[f"{part}/worn"] = 60 * (2 * (shape[:, 31:] > 0).float() - 1)
        said[f"{part}/item"] = 60 * shape[:, : said[f"{part}/item"].shape[1]]
        said[f"{part}/looks"], said[f"{part}/palette"] = 60 * tex[:, 6:13], tex[:, :6]
        said[f"{part}/scale"], said[f"{part}/cut"] = tex[:, 13:14], torch.cat([shape[:, 24:28], shape[:, 28:30]], 1)
    terms = stage.terms(said, batch)
    assert max(float(v) for k, v in terms.items() if k != "shape") < 1e-3
    assert float(terms["shape"]) < 0.02  # the root of its guard against an infinite slope
    codes = encoder.write_codes(said, model.facts)
    worn = {part for part in PARTS if float(batch[f"{part}/shape"][0, 31]) > 0}
    assert {name.split("/")[0] for name in codes} == {"body", *worn}
    for part in worn:
        item = batch[f"{part}/shape"][:, :24].argmax(1)
        assert torch.equal(codes[f"{part}/shape"][:, :24].argmax(1), item)
    place = encoder.placement(said, float(batch["fov"]))
    torch.testing.assert_close(place.turn, batch["turn"][0], atol=1e-5, rtol=0)


def fit_slice(name: str) -> slice:
    from backend.families.people import config

    return getattr(config, name)


# --- the measures ----------------------------------------------------------------------------------------------------


def test_alignment_undoes_a_similarity(figure):
    a = figure.vertices[::3]
    turn = poses.to_matrices(np.array([[1, 0.02, 0.1, -0.03]]))[0]
    b = 1.13 * a @ turn.T + [0.3, -0.1, 0.2]
    scale, found, shift = measured.align(a, b)
    assert scale == pytest.approx(1.13, rel=2e-3)
    assert np.abs(scale * a @ found.T + shift - b).max() < 4e-3


def test_a_surface_has_no_error_to_itself_and_a_known_one_to_a_larger_ball():
    import trimesh

    ball = trimesh.creation.icosphere(4)
    near = np.asarray(ball.vertices), np.asarray(ball.faces)
    error = measured.surface_error(near[0], near[1], near[0] * 1.05, near[1])
    assert error["chamfer_mm"] == pytest.approx(50, rel=0.1)
    assert error["normal_deg"] < 5


def test_perfect_latents_are_measured_as_perfect(model):
    """The very person and pose, seen by the very camera: what the figures are when nothing is wrong."""
    from backend.families.base import Encoded

    case = measured.make_case(model, 3)
    codes = {k: torch.from_numpy(v) for k, v in case.figure.codes.items()}
    rotations = {b: tuple(map(float, q)) for b, q in zip(case.figure.bones.names, case.rotations, strict=True)}
    camera = {"c2w": case.views[0].c2w.tolist(), "fov_y_rad": case.views[0].fov, "width": 768, "height": 768}
    perfect = Encoded(Latents("people", codes), rotations, camera, {})
    out = measured._measure(model, case, perfect, measured.looks_of(model, case))
    assert out["chamfer_mm"] < 2.5  # of points drawn at random
    assert out["new_psnr_db"] > 35
    assert out["input_psnr_db"] > 28
    assert out["garments"] == 1
    assert out["edited_psnr_db"] > 35
    assert out["edit_drop_db"] < 4  # of more than 35


def test_a_killed_evaluation_goes_on(model, tmp_path, monkeypatch):
    """Whoever was measured is kept; who is not is measured; other questions are asked anew."""
    asked = measured.Asked(steps=0, pictures=False)
    whole = measured.run(model, 2, asked, cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    (kept / "00001.json").unlink()
    seen = []
    monkeypatch.setattr(measured, "measure", lambda model, index, asked, old=measured.measure:
                        seen.append(index) or old(model, index, asked))  # fmt: skip
    again = measured.run(model, 2, asked, cache=tmp_path)
    assert seen == [1]
    assert again["encoder"]["chamfer_mm"] == whole["encoder"]["chamfer_mm"]
    assert again["people"] == len(again["encoder"]["each"]) == 2
    measured.run(model, 1, measured.Asked(photos=2, steps=0, pictures=False), cache=tmp_path)
    assert seen == [1, 0]
    bias = model.encoder.head[0].bias.data
    bias[0] += 1e-3  # another encoder
    try:
        measured.run(model, 1, asked, cache=tmp_path)
    finally:
        bias[0] -= 1e-3
    assert seen == [1, 0, 0]


def test_workers_measure_the_same_people(model):
    asked = measured.Asked(steps=0, pictures=False)
    alone, two = measured.run(model, 2, asked), measured.run(model, 2, asked, workers=2)
    assert two["encoder"]["chamfer_mm"] == pytest.approx(alone["encoder"]["chamfer_mm"], abs=1e-3)
    assert [row["garments"] for row in two["encoder"]["each"]] == [row["garments"] for row in alone["encoder"]["each"]]
