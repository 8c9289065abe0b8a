# SPDX-License-Identifier: GPL-3.0-or-later
"""Files of photos: formats, modes, orientation, profiles, and everything that is none."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from backend.photo import header
from backend.photo.read import decode, decode_map
from backend.protocol import PopulaceError

GRADIENT = np.stack(np.broadcast_arrays(np.arange(96)[None] * 2, np.arange(64)[:, None] * 3, 90), 2).astype(np.uint8)


def encoded(image: Any, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_head(width: int, height: int, more: bytes = b"") -> bytes:
    """A PNG that claims this size, with hardly any pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "how", "off"), [("PNG", {}, 0), ("JPEG", {"quality": 95}, 8), ("WEBP", {}, 12),
                                                  ("JPEG", {"progressive": True, "quality": 95}, 8),
                                                  ("WEBP", {"lossless": True}, 0)])  # fmt: skip
@pytest.mark.parametrize("orientation", range(1, 9))
def test_formats_come_out_upright(kind: str, how: dict[str, Any], off: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(GRADIENT), kind, exif=exif, **how)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    found = decode(data)
    assert found.shape == (*upright.shape[:2], 4)
    assert (found[:, :, 3] == 255).all()
    assert (found[:, :, :3] == upright).all()
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(
        encoded(Image.fromarray(GRADIENT), exif=exif))))).astype(int)  # fmt: skip
    assert np.abs(found[:, :, :3] - turned).mean() <= off
    measured = header.measure(data)
    assert (measured.format, measured.height, measured.width) == (kind, *upright.shape[:2])


def test_modes() -> None:
    grey = GRADIENT[:, :, 0]
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (decode(encoded(wide))[:, :, 1] == grey).all()
    assert (decode(encoded(Image.fromarray(grey)))[:, :, :3] == grey[:, :, None]).all()
    assert (decode(encoded(Image.fromarray(grey), "JPEG", quality=95))[:, :, 2] == decode(
        encoded(Image.fromarray(grey), "JPEG", quality=95))[:, :, 0]).all()  # fmt: skip
    black = decode(encoded(Image.fromarray(grey > 100)))
    assert set(np.unique(black[:, :, 0])) == {0, 255}
    palette = Image.fromarray(GRADIENT).quantize(16)
    assert (decode(encoded(palette))[:, :, :3] == np.asarray(palette.convert("RGB"))).all()
    see_through = decode(encoded(palette, transparency=3))[:, :, 3]
    assert ((see_through == 0) == (np.asarray(palette) == 3)).all()
    alpha = np.dstack([GRADIENT, GRADIENT[:, :, 0]])
    for image in (Image.fromarray(alpha), Image.fromarray(alpha).convert("LA")):
        assert (decode(encoded(image))[:, :, 3] == GRADIENT[:, :, 0]).all()
    assert (decode(encoded(Image.fromarray(alpha)))[:, :, :3] == GRADIENT).all()
    print_ready = Image.fromarray(GRADIENT).convert("CMYK")
    assert np.abs(decode(encoded(print_ready, "JPEG", quality=95)).astype(int)[:, :, :3] - GRADIENT).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.fromarray(np.full((40, 40, 3), value, np.uint8)) for value in (200, 10, 90)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True}
                                                                                if kind == "WEBP" else {}))  # fmt: skip
    assert (decode(data)[:, :, :3] == 200).all()


def test_colours_are_what_the_profile_says() -> None:
    """A profile whose red is sRGB's green, and the other way round."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp!").replace(b"gXYZ", b"rXYZ").replace(b"tmp!", b"gXYZ")
    assert swapped != srgb
    for text in (b"sRGB", "sRGB".encode("utf-16-be")):
        swapped = swapped.replace(text, text.replace(b"R", b"x"))
    image = Image.fromarray(GRADIENT)
    other = decode(encoded(image, icc_profile=swapped)).astype(int)
    assert np.abs(other[:, :, [1, 0, 2]] - GRADIENT).max() <= 3
    for harmless in (srgb, b"no profile at all", swapped[:200]):
        assert (decode(encoded(image, icc_profile=harmless))[:, :, :3] == GRADIENT).all()
    seen = decode(encoded(Image.fromarray(np.dstack([GRADIENT, GRADIENT[:, :, 0]])), icc_profile=swapped))
    assert (seen[:, :, 3] == GRADIENT[:, :, 0]).all()


def test_the_lens_is_believed_only_of_whole_pictures() -> None:
    def told(width: int, height: int) -> float | None:
        exif = Image.Exif()
        exif.get_ifd(0x8769).update({0xA405: 28, 0xA002: width, 0xA003: height})
        return header.measure(encoded(Image.fromarray(GRADIENT), "JPEG", exif=exif)).focal_35mm

    assert told(96, 64) == told(4800, 3200) == 28  # the second one was scaled down
    assert told(96, 96) is None  # something was cut off
    assert told(0, 0) is None


def test_large_ones_are_scaled_down() -> None:
    wide = Image.new("RGB", (9000, 100), (10, 200, 30))
    for kind in ("PNG", "JPEG"):
        found = decode(encoded(wide, kind))
        assert found.shape == (46, 4096, 4) or found.shape == (45, 4096, 4)
        assert np.abs(found[:, :, :3].astype(int) - (10, 200, 30)).max() <= 3


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "image_unreadable"), (b"hello " * 30, "image_unreadable"), (b"GIF89a" + bytes(100), "image_unreadable"),
     (b"%PDF-1.7" + bytes(99), "image_unreadable"), (b"SIMPLE  =" + bytes(99), "image_unreadable"),
     (b"8BPS" + bytes(100), "image_unreadable"), (b"%!PS-Adobe-3.0 EPSF-3.0", "image_unreadable"),
     (b"\x89PNG\r\n\x1a\n", "image_unreadable"), (b"\xff\xd8\xff", "image_unreadable"),
     (b"RIFF\x10\0\0\0WEBP", "image_unreadable"), (b"RIFF\x10\0\0\0WAVE" + bytes(50), "image_unreadable"),
     (png_head(20_000, 20_000), "too_large"), (png_head(40_000, 20), "too_large"),
     (png_head(1 << 31, 9), "image_unreadable"),
     (png_head(0, 0), "image_unreadable"), (png_head(8, 8), "image_unreadable"),
     (png_head(500, 500), "image_unreadable"),
     (png_head(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(4 << 20)))), "image_unreadable"),
     (encoded(Image.fromarray(GRADIENT), "BMP"), "image_unreadable"),
     (encoded(Image.fromarray(GRADIENT), "GIF"), "image_unreadable"),
     (encoded(Image.fromarray(GRADIENT), "TIFF"), "image_unreadable")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_photo_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(PopulaceError) as caught:
        decode(data)
    assert caught.value.code == code
    assert caught.value.hint


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
FILES = [encoded(NOISE, kind, exif=bytes(Image.Exif()) or b"Exif\0\0") for kind in ("PNG", "JPEG", "WEBP")]


@pytest.mark.parametrize("data", FILES, ids=["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_cut_off_files_are_refused(data: bytes, share: float) -> None:
    with pytest.raises(PopulaceError) as caught:
        decode(data[: int(len(data) * share)])
    assert caught.value.code == "image_unreadable"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_damaged_files_are_read_or_refused(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    with contextlib.suppress(PopulaceError):  # and nothing else
        found = decode(bytes(damaged))
        assert found.dtype == np.uint8
        assert found.shape[2] == 4
        assert max(found.shape) <= 4096


def test_maps_come_back_exactly() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (32, 48, 4), np.uint8)
    pixels[:, :20, 3] = 0  # with colours under what is not seen
    assert (decode_map(encoded(Image.fromarray(pixels))) == pixels).all()
    for wrong in (encoded(Image.fromarray(GRADIENT)), encoded(Image.fromarray(pixels), "WEBP", lossless=True), b"no"):
        with pytest.raises(PopulaceError) as caught:
            decode_map(wrong)
        assert caught.value.code == "invalid_latents"
