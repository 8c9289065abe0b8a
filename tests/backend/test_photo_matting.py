# SPDX-License-Identifier: GPL-3.0-or-later
"""Who is in a photo: drawn people before backgrounds of all kinds."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from backend.photo.matting import Found, find
from backend.photo.read import load
from backend.protocol import PopulaceError

SIZE = (480, 360)  # height, width
Y, X = np.mgrid[: SIZE[0], : SIZE[1]] / 480


def people(places: Sequence[tuple[float, float, float]], size: tuple[int, int] = SIZE) -> Image.Image:
    """RGBA of people standing at (x, y of the feet), so and so tall, all in pixels; four times supersampled."""
    image = Image.new("RGBA", (size[1] * 4, size[0] * 4))
    draw = ImageDraw.Draw(image)
    for x, y, tall in places:

        def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
            return [4 * (x + x0 * tall), 4 * (y - y1 * tall), 4 * (x + x1 * tall), 4 * (y - y0 * tall)]  # noqa: B023

        for side in (-1, 1):
            draw.rectangle(box(*sorted((side * 0.02, side * 0.1))[:1], 0, sorted((side * 0.02, side * 0.1))[1], 0.5),
                           (30, 40, 90, 255))  # fmt: skip
            draw.rectangle(
                box(min(side * 0.13, side * 0.19), 0.42, max(side * 0.13, side * 0.19), 0.8), (190, 140, 110, 255)
            )
        draw.rectangle(box(-0.13, 0.45, 0.13, 0.82), (170, 40, 45, 255))
        draw.rectangle(box(-0.03, 0.8, 0.03, 0.88), (190, 140, 110, 255))
        draw.ellipse(box(-0.065, 0.86, 0.065, 1.0), (190, 140, 110, 255))
    return image.resize((size[1], size[0]), Image.Resampling.BOX)


ONE = people([(180, 440, 380)])
TWO = people([(90, 440, 300), (270, 450, 380)])
BACKGROUNDS = {
    "white": np.full((*SIZE, 3), 0.95),
    "grey, lit from the side": np.full((*SIZE, 3), 0.6) + 0.3 * X[..., None] - 0.1 * Y[..., None],
    "green screen": [0.1, 0.65, 0.25] * (1.1 - 0.4 * ((X - 0.4) ** 2 + (Y - 0.5) ** 2))[..., None],
    "wall and floor": np.where(Y[..., None] > 0.82, [0.5, 0.42, 0.35], [0.7, 0.75, 0.8]) + 0.05 * X[..., None],
    "dark": np.full((*SIZE, 3), 0.13) + 0.05 * Y[..., None],
}  # fmt: skip


def before(person: Image.Image, background: np.ndarray, noise: float = 0.012) -> np.ndarray:
    """A photo without alpha."""
    rgba = np.asarray(person) / 255
    rgb = background * (1 - rgba[..., 3:]) + rgba[..., :3] * rgba[..., 3:]
    rgb = rgb + np.random.default_rng(0).normal(0, noise, rgb.shape)
    return np.dstack([(rgb.clip(0, 1) * 255).astype(np.uint8), np.full(rgb.shape[:2], 255, np.uint8)])


def likeness(found: Found, person: Image.Image) -> float:
    mine, true = found.rgba[..., 3] / 255, np.asarray(person)[..., 3] / 255
    return float(np.minimum(mine, true).sum() / np.maximum(mine, true).sum())


def code(error: pytest.ExceptionInfo[PopulaceError]) -> str:
    assert error.value.hint
    return error.value.code


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_plain_backgrounds(name: str) -> None:
    photo = before(ONE, BACKGROUNDS[name])
    found = find(photo)
    assert likeness(found, ONE) > 0.96
    assert (found.matte, found.people, found.cut_off, found.notes) == ("background", 1, (), ())
    assert np.abs(np.array(found.box) - Image.fromarray(np.asarray(ONE)[..., 3]).getbbox()).max() <= 3
    assert (found.rgba[..., :3] == photo[..., :3]).all()  # the picture itself is left alone


def test_a_shadow_is_no_part_of_a_person() -> None:
    alpha = np.asarray(ONE)[..., 3] / 255
    shadow = ndimage.gaussian_filter(np.roll(alpha * (Y > 0.8), (10, 30), (0, 1)), 8)
    found = find(before(ONE, BACKGROUNDS["white"] * (1 - 0.3 * shadow[..., None])))
    assert likeness(found, ONE) > 0.95


def test_the_outline_is_soft() -> None:
    """Where the person covers half a pixel the matte is about a half: a far better fit than any hard outline."""
    true = np.asarray(ONE)[..., 3] / 255
    off = np.abs(find(before(ONE, BACKGROUNDS["white"])).rgba[..., 3] / 255 - true)
    edge = (true > 0.2) & (true < 0.8)
    assert off[edge].mean() < 0.2


def test_alpha_tells_all_and_so_does_a_mask() -> None:
    found = find(np.asarray(ONE))
    assert found.matte == "alpha"
    assert likeness(found, ONE) == pytest.approx(1, abs=1e-3)
    clutter = np.random.default_rng(1).uniform(0, 1, (*SIZE, 3))
    found = find(before(ONE, clutter), np.asarray(ONE)[..., 3])
    assert found.matte == "mask"
    assert likeness(found, ONE) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("way", ["alpha", "mask", "background"])
def test_several_people_are_counted_from_the_left(way: str) -> None:
    photo = np.asarray(TWO) if way == "alpha" else before(TWO, BACKGROUNDS["white"])
    mask = np.asarray(TWO)[..., 3] if way == "mask" else None
    left, right = (find(photo, mask, person) for person in (0, 1))
    assert left.people == right.people == 2
    assert left.box[2] < right.box[0]
    assert left.notes == ("2 people are in the photo",)
    assert likeness(left, people([(90, 440, 300)])) > 0.95
    assert likeness(right, people([(270, 450, 380)])) > 0.95
    with pytest.raises(PopulaceError, match="only 2 people") as caught:
        find(photo, mask, 2)
    assert code(caught) == "no_person_found"


def test_specks_are_nobody_and_loose_pieces_are_somebodys() -> None:
    rgba = np.asarray(ONE).copy()
    rgba[10:20, 10:20] = 255  # a speck far away
    gap = slice(round(440 - 0.3 * 380), round(440 - 0.25 * 380))
    rgba[gap] = 0  # knees that the mask has missed
    found = find(rgba)
    assert found.people == 1
    assert found.box[1] > 40
    assert found.box[3] >= 439
    assert found.rgba[15, 15, 3] == 0


def test_clothes_like_the_background_are_told_of() -> None:
    """A red shirt before a red wall: the head is there, and so is the skirt."""
    wall = np.broadcast_to(np.array([170, 40, 45]) / 255, (*SIZE, 3))
    person = np.asarray(ONE).copy()
    arms = np.r_[: round(180 - 0.13 * 380) + 1, round(180 + 0.13 * 380) - 1 : SIZE[1]]
    person[:, arms, 3] = 0
    person[round(440 - 0.45 * 380) : 440, 142:218] = (30, 40, 90, 255)
    found = find(before(Image.fromarray(person), wall))
    assert (found.people, found.is_torn) == (1, True)
    assert found.notes == ("parts of the person look like the background: a mask would help",)
    assert not find(before(ONE, BACKGROUNDS["white"])).is_torn


@pytest.mark.parametrize(
    ("place", "sides"),
    [((180, 560, 500), ("bottom",)), ((30, 440, 380), ("left",)), ((180, 330, 380), ("top",)),
     ((180, 640, 700), ("top", "bottom"))],
)  # fmt: skip
def test_cut_off_people_are_taken_and_it_is_said(place: tuple[float, float, float], sides: tuple[str, ...]) -> None:
    person = people([place])
    for photo in (np.asarray(person), before(person, BACKGROUNDS["green screen"])):
        found = find(photo)
        assert found.cut_off == sides
        assert "cut off" in found.notes[0]
        assert likeness(found, person) > 0.93


def test_nobody_and_nearly_nobody() -> None:
    small, grey = (100, 100), np.full((100, 100, 3), 0.9)
    for photo, said in (
        (np.zeros((100, 100, 4), np.uint8), "empty"),
        (before(people([]), BACKGROUNDS["white"]), "nobody"),
        (np.asarray(people([(50, 90, 50)], small)), "only 50 pixels"),
        (before(people([(50, 90, 40)], small), grey), "pixels tall"),
    ):
        with pytest.raises(PopulaceError, match=said) as caught:
            find(photo)
        assert code(caught) == "no_person_found"
    photo = before(ONE, BACKGROUNDS["white"])
    for value, said in ((0, "empty"), (255, "white everywhere")):
        with pytest.raises(PopulaceError, match=said) as caught:
            find(photo, np.full(SIZE, value, np.uint8))
        assert code(caught) == "no_person_found"


@pytest.mark.parametrize("kind", ["noise", "blobs", "stripes"])
def test_without_a_plain_background_a_mask_is_asked_for(kind: str) -> None:
    rng = np.random.default_rng(2)
    blobs = np.asarray(Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).resize(SIZE[::-1])) / 255
    background = {"noise": rng.uniform(0, 1, (*SIZE, 3)), "blobs": blobs,
                  "stripes": np.where((X * 20).astype(int)[..., None] % 2, 0.2, 0.9) * np.ones(3)}[kind]  # fmt: skip
    with pytest.raises(PopulaceError, match="not plain") as caught:
        find(before(ONE, background))
    assert code(caught) == "mask_needed"


def test_load_takes_files_and_masks_of_other_sizes() -> None:
    def file(image: Image.Image, kind: str = "PNG") -> bytes:
        out = io.BytesIO()
        image.save(out, kind)
        return out.getvalue()

    photo = file(Image.fromarray(before(ONE, np.random.default_rng(1).uniform(0, 1, (*SIZE, 3)))[..., :3]), "WEBP")
    mask = ONE.getchannel("A").resize((720, 960))
    for kind in ("PNG", "JPEG"):
        assert likeness(load(photo, file(mask, kind)), ONE) > 0.97
    clear = Image.new("RGBA", mask.size)
    clear.putalpha(mask)  # painted on nothing
    assert likeness(load(photo, file(clear)), ONE) > 0.97
    with pytest.raises(PopulaceError, match="proportions") as caught:
        load(photo, file(mask.resize((500, 500))))
    assert code(caught) == "image_unreadable"
