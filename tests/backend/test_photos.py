# SPDX-License-Identifier: GPL-3.0-or-later
"""From a photo to a person on the main road, with the capsule family: latents with maps, pose, camera, edits."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backend import __main__ as cli
from backend import checks, families, latents, packet, pipeline, poses
from backend.batch import plan, results
from backend.families.base import Encoded, Latents, PersonPhoto
from backend.families.capsule.model import CapsuleModel
from backend.families.capsule.photo import flattened
from backend.photo.album import Album
from backend.protocol import Inversion, PopulaceError, parse_request

MODEL = CapsuleModel(torch.device("cpu"))
SMALL = {"family": "capsule", "grid_resolution": 40, "faces": 1500, "texture_size": 512, "maps": "color"}
QUICK = {"steps": 7}
TALL = 160  # pixels


def person_of(seed: int) -> Latents:
    """A capsule person in plain colours."""
    return MODEL.edit(MODEL.sample(seed, 1.0, {}), {"pattern": "plain"})


def picture(who: Latents, tall: int = TALL, lean: float = 0.0) -> Image.Image:
    """RGBA as seen from far in front, flat colours; `lean` in degrees to the left."""
    field = flattened(MODEL.decode(who)[0])
    low, high = field.bounds
    scale = float(high[1] - low[1]) / tall
    x, y = torch.arange(float(low[0]), float(high[0]), scale), torch.arange(float(high[1]), float(low[1]), -scale)
    points = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x)), torch.zeros(len(y), len(x))], -1)
    inside = (field.sdf(points.reshape(-1, 3)) < 0).reshape(len(y), len(x), 1)
    rgb = field.color(points.reshape(-1, 3)).reshape(len(y), len(x), 3)
    rgba = torch.cat([rgb, inside], 2)
    image = Image.new("RGBA", (len(x) + 120, len(y) + 100))
    image.paste(Image.fromarray((rgba.numpy() * 255 + 0.5).astype(np.uint8)), (70, 40))
    return image.rotate(lean, Image.Resampling.BICUBIC)


def file(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


PHOTO = file(picture(person_of(3)))


def make(album: Album, seen: list[tuple[str, float]] | None = None, **request: Any) -> packet.HumanAsset:
    step = (
        (lambda stage, fraction: seen.append((stage, fraction))) if seen is not None else lambda stage, fraction: None
    )
    asked = parse_request({**SMALL, "inversion": QUICK, **request})
    return pipeline.generate(asked, MODEL, step, album)[0]


@pytest.fixture(scope="module")
def album() -> Album:
    return Album()


@pytest.fixture(scope="module")
def stages() -> list[tuple[str, float]]:
    return []


@pytest.fixture(scope="module")
def person(album: Album, stages: list[tuple[str, float]]) -> packet.HumanAsset:
    return make(album, stages, photos=[{"image": album.add(PHOTO)}])


def encode(image: Image.Image, **options: Any) -> Encoded:
    rgba = np.array(image)
    return MODEL.encode([PersonPhoto(rgba, image.getchannel("A").getbbox())], Inversion(**options), lambda s, f: None)


def test_the_capsule_family_finds_sizes_colours_and_lean() -> None:
    who = person_of(3)
    glance, fitted = (encode(picture(who), steps=steps) for steps in (0, 28))
    assert fitted.scores["mask_iou"] > max(0.85, glance.scores["mask_iou"] + 0.05)
    true, found = (MODEL.describe(p) for p in (who, fitted.latents))
    assert found["pattern"] == "plain"
    for name in ("top_color", "bottom_color"):
        assert found[name] == pytest.approx(true[name], abs=0.06)
    assert "body/photo" in glance.latents.maps
    assert not encode(picture(who), steps=0, texture=False).latents.maps
    for degrees in (0, 12, -8):
        turn = encode(picture(who, lean=degrees), steps=0).rotations["pelvis"]
        assert np.degrees(2 * np.arctan2(turn[3], turn[0])) == pytest.approx(degrees, abs=2)


def test_stages_are_told_in_order(person: packet.HumanAsset, stages: list[tuple[str, float]]) -> None:
    names = list(dict.fromkeys(stage for stage, _ in stages))
    assert names[:5] == ["photo", "encode", "fit", "project", "sample"]
    fractions = [fraction for _, fraction in stages]
    assert fractions == sorted(fractions)
    assert 0.4 < max(f for s, f in stages if s == "project") < 0.6
    assert fractions[-1] == pytest.approx(1)


def test_a_photo_can_be_cancelled_at_every_stage(album: Album) -> None:
    for stop in ("photo", "encode", "fit", "project"):

        def step(stage: str, fraction: float, stop: str = stop) -> None:
            if stage == stop:
                raise PopulaceError("cancelled", "The job was cancelled.")

        request = parse_request({**SMALL, "inversion": QUICK, "photos": [{"image": album.add(PHOTO)}] * 2})
        with pytest.raises(PopulaceError, match=r"^The job was cancelled"):
            pipeline.generate(request, MODEL, step, album)


def test_the_packet_holds_all_that_makes_the_person_again(person: packet.HumanAsset) -> None:
    data = packet.dumps(person)
    read = packet.loads(data)
    assert packet.dumps(read) == data
    assert read.maps == person.maps
    assert read.maps.keys() == {"body/photo"}
    recipe = {k: v for k, v in read.meta["recipe"].items() if k not in ("version", "weights_sha256")}
    assert not {"photos", "inversion", "latents", "latent_maps"} & recipe.keys()
    assert read.meta["asked"]["photos"] == 1
    own = Album()
    maps = {name: own.add(png) for name, png in read.maps.items()}
    codes = {name: rows.tolist() for name, rows in read.latents.items()}
    again = pipeline.generate(parse_request({**recipe, "latents": codes, "latent_maps": maps}), MODEL, images=own)[0]
    for name in packet.Part.__dataclass_fields__:
        a, b = getattr(person.parts[0], name), getattr(again.parts[0], name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, name
    assert person.rig is not None
    assert again.rig is not None
    assert np.array_equal(person.rig.rotations, again.rig.rotations)
    assert np.array_equal(person.rig.translation, again.rig.translation)
    assert again.maps == person.maps
    assert again.meta["recipe"] == person.meta["recipe"]


def test_camera_and_pose_of_the_packet_are_those_of_the_photo(album: Album) -> None:
    """The posed person, seen by the packet's camera, covers what the person covers in the photo."""
    asset = make(album, photos=[{"image": album.add(file(picture(person_of(3), lean=9)))}], inversion={"steps": 35})
    part, rig, told = asset.parts[0], asset.rig, asset.meta["photo"]
    assert rig is not None
    assert asset.meta["bones"][0] == "pelvis"
    assert np.allclose(rig.rotations[0], told["rotations"]["pelvis"], atol=1e-6)
    assert np.allclose(rig.rotations[1:], [1, 0, 0, 0])
    posed = poses.skin(part.vertices, part.skin_indices, part.skin_weights, rig, rig.rotations, rig.translation)
    assert posed[:, 1].min() == pytest.approx(0, abs=1e-5)
    camera = told["camera"]
    seen = np.concatenate([posed, np.ones((len(posed), 1))], 1) @ np.linalg.inv(camera["c2w"]).T
    slope = np.tan(camera["fov_y_rad"] / 2)
    y = camera["height"] / 2 * (1 + seen[:, 1] / seen[:, 2] / slope)
    x = camera["width"] / 2 - camera["height"] / 2 * seen[:, 0] / seen[:, 2] / slope
    box = told["box"]
    assert np.abs(np.array([y.min(), y.max()]) - [box[1], box[3]]).max() < 0.05 * TALL
    assert np.abs(np.array([x.min(), x.max()]) - [box[0], box[2]]).max() < 0.12 * TALL
    assert told["cut_off"] == []
    json.dumps(asset.meta, allow_nan=False)


def test_poses_over_the_photos(album: Album, person: packet.HumanAsset) -> None:
    photos = [{"image": album.add(PHOTO)}]
    rest = make(album, photos=photos, pose="rest")
    assert rest.rig is not None
    assert rest.rig.rotations is None
    assert rest.meta["photo"]["camera"] == person.meta["photo"]["camera"]
    turn = [np.cos(0.2), 0, np.sin(0.2), 0]
    own = make(album, photos=photos, joint_rotations={"head": turn})
    bones = own.meta["bones"]
    assert own.rig is not None
    assert np.allclose(own.rig.rotations[bones.index("head")], turn, atol=1e-6)
    assert own.meta["recipe"]["joint_rotations"].keys() == {"pelvis", "head"}


def test_rotations_of_ones_own_without_photos(album: Album) -> None:
    turn = [-np.cos(0.5), 0, 0, -np.sin(0.5)]  # the same turn as without the signs
    sitting, own = make(album, pose="sitting"), make(album, pose="sitting", joint_rotations={"upperarm_l": turn})
    assert sitting.rig is not None
    assert own.rig is not None
    row = own.meta["bones"].index("upper_arm.L")  # by the poses' own name for it
    assert np.allclose(own.rig.rotations[row], [np.cos(0.5), 0, 0, np.sin(0.5)], atol=1e-6)
    others = np.arange(len(own.rig.rotations)) != row
    assert np.array_equal(own.rig.rotations[others], sitting.rig.rotations[others])
    alone = make(album, joint_rotations={"upper_arm.L": turn})
    assert alone.rig is not None
    posed = poses.skin(alone.parts[0].vertices, alone.parts[0].skin_indices, alone.parts[0].skin_weights, alone.rig,
                       alone.rig.rotations, alone.rig.translation)  # fmt: skip
    assert posed[:, 1].min() == pytest.approx(0, abs=1e-5)
    for wrong, said in (({"tail": turn}, "no bone 'tail'.*There are: pelvis"), ({"head": [1, 1, 0, 0]}, "length 1"),
                        ({"head": [0, 0, 0, 0]}, "length 1"), ({"head": [1, 0, 0]}, "4 items")):  # fmt: skip
        with pytest.raises(PopulaceError, match=said) as caught:
            make(album, joint_rotations=wrong)
        assert caught.value.code == "invalid_request"
    with pytest.raises(PopulaceError, match="skeleton"):
        make(album, parameters={"single": True}, joint_rotations={"head": turn})


def test_several_photos_count_and_their_number_is_told(album: Album) -> None:
    two = [{"image": album.add(file(picture(person_of(seed))))} for seed in (3, 4)]
    first, both = (make(album, photos=photos, inversion={"steps": 0}) for photos in (two[:1], two))
    assert both.meta["photo"]["box"] == first.meta["photo"]["box"]
    assert not np.array_equal(both.latents["body/tex"], first.latents["body/tex"])
    with pytest.raises(PopulaceError, match=r"^Photo 2 of 2: The photo is empty"):
        make(album, photos=[two[0], {"image": album.add(file(Image.new("RGBA", (90, 90))))}])


def test_families_say_what_they_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    info = families.info
    photos = parse_request({"family": "capsule", "photos": [{"image": "a" * 64}]})
    for inputs, request, said in ((("seed",), photos, "makes nobody from photos"),
                                  (("image",), parse_request({"family": "capsule"}), "from photos only")):  # fmt: skip
        monkeypatch.setattr(families, "info", lambda name, inputs=inputs: replace(info(name), inputs=inputs))
        with pytest.raises(PopulaceError, match=said) as caught:
            checks.check(request)
        assert caught.value.code == "invalid_request"
        assert caught.value.hint


def test_what_photos_cannot_do(album: Album) -> None:
    photos = [{"image": album.add(PHOTO)}]
    with pytest.raises(PopulaceError) as caught:
        make(Album(), photos=photos)
    assert caught.value.code == "image_missing"
    with pytest.raises(PopulaceError) as caught:
        pipeline.generate(parse_request({**SMALL, "photos": photos}), MODEL)
    assert caught.value.code == "image_missing"
    rows = {name: code.tolist() for name, code in person_of(1).codes.items()}
    with pytest.raises(PopulaceError) as caught:
        make(album, latents=rows, latent_maps={"body/photo": album.add(file(Image.new("RGB", (64, 64))))})
    assert caught.value.code == "invalid_latents"


def test_edits_of_what_a_photo_showed(album: Album) -> None:
    photos = [{"image": album.add(PHOTO)}]

    def maps(*edits: dict[str, Any]) -> set[str]:
        asked = parse_request({**SMALL, "photos": photos, "edits": list(edits)})
        return set(pipeline.choose_latents(asked, MODEL, {}, seen).maps)

    seen = encode(picture(person_of(3)), steps=0).latents
    assert maps() == {"body/photo"}
    assert maps({"op": "set", "values": {"height_m": 1.9}}) == {"body/photo"}
    assert maps({"op": "set", "values": {"top_color": [1, 0, 0]}}) == set()
    assert maps({"op": "words", "text": "tall"}) == {"body/photo"}
    assert maps({"op": "reroll", "seed": 5, "kinds": ["tex"]}) == set()
    assert maps({"op": "reroll", "seed": 5, "kinds": ["shape"]}) == {"body/photo"}
    assert maps({"op": "reroll", "seed": 5, "lock": ["body"]}) == {"body/photo"}
    for amount, kept in ((0.4, {"body/photo"}), (0.5, set())):
        assert maps({"op": "mix", "other": {"seed": 5}, "amount": amount}) == kept
        assert maps({"op": "vary", "seed": 5, "amount": amount}) == kept
        assert maps({"op": "vary", "seed": 5, "amount": amount, "kinds": ["shape"]}) == {"body/photo"}


def test_maps_change_sides_with_their_parts() -> None:
    def wearing(*parts: str, shown: Sequence[str] = ()) -> Latents:
        codes = {f"{part}/{kind}": torch.full((1, 2), float(len(part))) for part in parts for kind in ("shape", "tex")}
        return Latents("toy", codes, {f"{part}/photo": torch.zeros(2, 2, 4, dtype=torch.uint8) for part in shown})

    mine, theirs = wearing("body", "top", "hat", shown=("body", "hat")), wearing("body", "top", shown=("top",))
    assert latents.take_parts(mine, theirs, ["top"]).maps.keys() == {"body/photo", "hat/photo", "top/photo"}
    assert latents.take_parts(mine, theirs, ["top"], ["shape"]).maps.keys() == {"body/photo", "hat/photo"}
    assert latents.take_parts(mine, theirs, ["hat"]).maps.keys() == {"body/photo"}
    assert latents.remove(mine, ["hat"]).maps.keys() == {"body/photo"}
    assert latents.mix(mine, theirs, 0.49).maps.keys() == {"body/photo", "hat/photo"}
    assert latents.mix(mine, theirs, 0.5).maps.keys() == {"top/photo"}
    assert latents.mix(mine, theirs, 1.0, ["shape"]).maps.keys() == {"body/photo"}  # its hat is gone with its shape
    assert latents.reroll(mine, theirs, ["hat"]).maps.keys() == {"hat/photo", "top/photo"}
    other = replace(mine, codes={**mine.codes, "hat/tex": torch.zeros(1, 2)}, maps={})
    assert latents.keep_maps(mine, other).maps.keys() == {"body/photo"}
    assert latents.keep_maps(mine, replace(other, maps=theirs.maps)).maps.keys() == {"top/photo"}


# ------------------------------------------------------------------------------------------- command line and batches


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "Zoë 1.png").write_bytes(PHOTO)
    return tmp_path / "photos"


OPTIONS = ["--family=capsule", "--grid-resolution=40", "--faces=1000", "--texture-size=512", "--device=cpu",
           "--maps=color", "--steps=2"]  # fmt: skip


def test_invert_writes_files_and_tells(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, out = folder / "Zoë 1.png", tmp_path / "out"
    mask = tmp_path / "mask.png"
    Image.open(photo).getchannel("A").save(mask)
    arguments = ["invert", str(photo), str(photo), "--each", "--mask", str(mask), "--mask", str(mask), "--json",
                 "--set", "height_m=1.9", "--pose", "rest", "--out", str(out), *OPTIONS]  # fmt: skip
    assert cli.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in out.iterdir()) == ["Zoë_1.glb", "Zoë_1_2.glb"]
    assert lines[0]["packet_sha256"] == lines[1]["packet_sha256"]
    assert lines[0]["height_m"] == pytest.approx(1.9, abs=0.02)
    assert lines[0]["photo"]["matte"] == "mask"
    assert lines[0]["photo"]["scores"]["mask_iou"] > 0.4


def test_invert_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, text = str(folder / "Zoë 1.png"), tmp_path / "text.jpg"
    text.write_text("no photo at all, but rather long a text")
    for arguments, exit_code, said in (
        ([str(tmp_path / "none.jpg")], 4, "none.jpg: No such file"),
        ([str(text)], 4, "text.jpg: This is not a picture"), ([str(tmp_path)], 4, "directory"),
        ([photo, "--mask", photo, "--mask", photo], 2, "photos: 1, masks: 2"),
        ([photo, "--person", "1"], 4, "only one person is"), ([photo, "--person", "-1"], 2, "photos.0.person"),
        ([photo, "--steps", "5000"], 2, "inversion.steps"), ([photo] * 9, 2, "at most 8"),
    ):  # fmt: skip
        found = cli.main(["invert", *OPTIONS, *arguments, "--out", str(tmp_path)])
        errors = capsys.readouterr().err
        assert said in errors
        assert found == exit_code


def test_plans_name_photos(folder: Path, tmp_path: Path) -> None:
    lines = [{**SMALL, "id": "a", "photos": ["photos/Zoë 1.png"], "inversion": {"steps": 0}},
             {**SMALL, "id": "b", "photos": [{"image": "photos/Zoë 1.png", "person": 0}]},
             {**SMALL, "id": "c", "seed": 3}]  # fmt: skip
    path = tmp_path / "plan.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    first, second, third = plan.read(path)
    assert first.request.pose == "photo"
    assert list(first.images) == first.request.images() == second.request.images()
    assert plan.Item.from_json(json.loads(json.dumps(first.to_json()))) == replace(first, line=0)
    assert third.images == {}
    moved = tmp_path / "elsewhere"
    folder.parent.joinpath("photos").rename(moved)
    path.write_text(path.read_text("utf-8").replace("photos/Zo", "elsewhere/Zo"), encoding="utf-8")
    again = plan.read(path)
    assert [item.digest for item in again] == [item.digest for item in (first, second, third)]
    (moved / "Zoë 1.png").write_bytes(file(picture(person_of(4))))
    assert [a.digest == b.digest for a, b in zip(plan.read(path), again, strict=True)] == [False, False, True]
    with pytest.raises(PopulaceError, match="has changed"):
        Album(again[0].images).read(again[0].request.photos[0].image)
    (moved / "Zoë 1.png").unlink()
    with pytest.raises(PopulaceError, match=r"(?s)2 bad lines.*line 1: .*No such file.*line 2: ") as caught:
        plan.read(path)
    assert caught.value.code == "invalid_request"


def test_a_plan_of_a_folder_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = folder / "anna"
    group.mkdir()
    for name in ("front.jpg", "back.webp"):
        (group / name).write_bytes(
            file(Image.open(io.BytesIO(PHOTO)).convert("RGB"), "JPEG" if "jpg" in name else "WEBP")
        )
    (group / "front.mask.png").write_bytes(file(Image.open(io.BytesIO(PHOTO)).getchannel("A")))
    (folder / "notes.txt").write_text("no photo")
    common = [option for option in OPTIONS if "device" not in option and "steps" not in option]
    assert cli.main(["plan", "--photos", str(folder), *common]) == 0
    lines = capsys.readouterr().out
    zoe, anna = sorted((json.loads(line) for line in lines.splitlines()), key=lambda line: len(line["photos"]))
    assert (zoe["id"], anna["id"]) == ("Zo__1", "anna")
    assert [Path(photo["image"]).name for photo in anna["photos"]] == ["back.webp", "front.jpg"]
    assert "mask" not in anna["photos"][0]
    assert anna["photos"][1]["mask"].endswith("front.mask.png")
    path, out = tmp_path / "plan.jsonl", tmp_path / "out"
    path.write_text(json.dumps({**zoe, "inversion": {"steps": 0}}), encoding="utf-8")
    (item,) = plan.read(path)
    from backend.batch import item as work

    answer = work.make({"item": item.to_json(), "out": str(out), "device": "cpu"})
    work._model.cache_clear()
    assert answer.get("files") == ["Zo__1.glb"], answer
    facts = results.done(out, item, thorough=True)
    assert facts is not None
    assert facts["packet_sha256"] == answer["packet_sha256"]
    for wrong in (["--count", "2"], ["--spread", "weight=0..1"]):
        assert cli.main(["plan", "--photos", str(folder), *wrong]) == 2
    assert cli.main(["plan", "--photos", str(tmp_path / "none")]) == 2


def test_families_that_read_photos_say_so() -> None:
    for info in families.infos():
        module = __import__(f"backend.families.{info.name}.model", fromlist=["model"])
        models = [
            v for v in vars(module).values() if isinstance(v, type) and hasattr(v, "decode") and hasattr(v, "sample")
        ]
        if "image" in info.inputs and models:
            assert any(hasattr(model, "encode") for model in models), info.name
