# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights are used only when they are what the manifest promises (F19), and nothing is hashed twice in vain."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from backend import packet, weights
from backend.protocol import PopulaceError

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.float16)}
DATA = b"".join(packet.dump_tensors(TENSORS, {}))
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Path]:
    """Lay down a manifest and its file; returns the file's path. The data folder is tmp_path / "data"."""

    def lay(data: bytes = DATA, written: bytes | None = None, embedded: bool = True) -> Path:
        folder = tmp_path / "manifest"
        folder.mkdir()
        source = "" if embedded else f'repository = "someone/model"\nrevision = "{REVISION}"\n'
        (folder / "tiny.toml").write_text(
            f'name = "tiny"\ntitle = "Tiny"\nlicence = "CC0-1.0"\nlicence_url = ""\nprovenance = "made here"\n'
            f"embedded = {str(embedded).lower()}\n[[files]]\npath = \"w.safetensors\"\nsize = {len(data)}\n"
            f'sha256 = "{hashlib.sha256(data).hexdigest()}"\n{source}'
        )
        path = folder / "w.safetensors" if embedded else tmp_path / "data/weights/tiny/w.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if written is None else written)
        return path

    return lay


def locate(tmp_path: Path) -> weights.Weights:
    return weights.locate("tiny", tmp_path / "data", tmp_path / "manifest")


def test_good_weights_load_exactly(place: Callable[..., Path], tmp_path: Path) -> None:
    place()
    found = locate(tmp_path)
    assert found.sha256 == hashlib.sha256(DATA).hexdigest()
    tensors, metadata = found.read()
    assert metadata == {}
    assert all(np.array_equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype
               for name in TENSORS)  # fmt: skip
    weights.check_tensors("tiny", tensors, {"a.weight": (2, 3), "b": (4,)})


FLIPPED = DATA[:-1] + bytes([DATA[-1] ^ 1])


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("written", [DATA[:-4], FLIPPED, DATA + b"\0", pickle.dumps(TENSORS), b""],
                         ids=["truncated", "bit flipped", "too long", "renamed pickle", "empty"])  # fmt: skip
def test_f19_damaged_file_is_refused(
    place: Callable[..., Path], tmp_path: Path, written: bytes, embedded: bool
) -> None:
    path = place(written=written, embedded=embedded)
    with pytest.raises(PopulaceError, match="are damaged") as caught:
        locate(tmp_path)
    assert caught.value.code == "weights_corrupt"
    assert caught.value.hint
    assert path.exists() == embedded  # what lies in our own package stays, what was fetched is set aside
    assert path.with_name("w.safetensors.corrupt").exists() != embedded


@pytest.mark.parametrize("data", [struct.pack("<Q", 1 << 60) + DATA[8:], pickle.dumps(TENSORS)],
                         ids=["header of 2^60 bytes", "pickle with a manifest of its own"])  # fmt: skip
def test_f19_right_hash_but_not_safetensors(place: Callable[..., Path], tmp_path: Path, data: bytes) -> None:
    place(data)
    with pytest.raises(PopulaceError, match="not a safetensors file") as caught:
        locate(tmp_path).read()
    assert caught.value.code == "weights_corrupt"


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"a.weight": (2, 3)}, "do not belong there, the first is b"),
        ({"a.weight": (2, 3), "b": (4,), "c": (1,)}, "missing, the first is c"),
        ({"a.weight": (3, 2), "b": (4,)}, r"shape \[2, 3\] instead of \[3, 2\]"),
    ],
)
def test_f19_wrong_tensors_are_named(shapes: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(PopulaceError, match=says) as caught:
        weights.check_tensors("tiny", TENSORS, shapes)
    assert caught.value.code == "weights_corrupt"


def test_f19_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(PopulaceError, match=r"a\.weight holds"):
        weights.check_tensors("tiny", {"a.weight": np.full((2, 3), np.nan, np.float32)}, {"a.weight": (2, 3)})


def test_missing_weights_say_where_to_get_them(place: Callable[..., Path], tmp_path: Path) -> None:
    place(embedded=False).unlink()
    with pytest.raises(PopulaceError, match="is missing") as caught:
        locate(tmp_path)
    assert caught.value.code == "weights_missing"
    assert f"huggingface.co/someone/model at revision {REVISION}" in caught.value.hint
    with pytest.raises(PopulaceError, match="ships no weights"):
        weights.locate("other", tmp_path / "data", tmp_path / "manifest")


def test_a_file_is_hashed_once_until_it_changes(
    place: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hashed = place(), []
    real = weights.sha256_of
    monkeypatch.setattr(weights, "sha256_of", lambda p: hashed.append(p) or real(p))
    locate(tmp_path)
    locate(tmp_path)
    assert hashed == [path]
    path.write_bytes(FLIPPED)
    with pytest.raises(PopulaceError, match="are damaged"):
        locate(tmp_path)


@pytest.mark.parametrize("memory", [b"", b"[]", b"\xff", b'{"x": 1}'])
def test_damaged_memory_only_costs_a_hash(place: Callable[..., Path], tmp_path: Path, memory: bytes) -> None:
    place()
    (tmp_path / "data/weights").mkdir(parents=True)
    (tmp_path / "data/weights/verified.json").write_bytes(memory)
    assert locate(tmp_path).read()[0].keys() == TENSORS.keys()


def test_unwritable_data_folder_does_not_matter(place: Callable[..., Path], tmp_path: Path) -> None:
    place()
    (tmp_path / "data").write_text("a file where the folder should be")
    assert locate(tmp_path).read()[0].keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "tiny"', 'name = "other"'),
        ("w.safetensors", "../w.safetensors"),
        ("w.safetensors", "/etc/w.safetensors"),
        ("w.safetensors", "w.ckpt"),
        ("embedded = true", "embedded = false"),
        ('licence_url = ""', 'license_url = ""'),
        ('sha256 = "', 'sha256 = "zz'),
    ],
)
def test_manifest_rules_are_kept(place: Callable[..., Path], tmp_path: Path, old: str, new: str) -> None:
    place()
    toml = tmp_path / "manifest/tiny.toml"
    toml.write_text(toml.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"tiny\.toml"):
        weights.manifests(tmp_path / "manifest")


def test_shipped_manifests_are_sound() -> None:
    for manifest in weights.manifests():
        assert manifest.licence
        assert manifest.provenance
        if manifest.embedded:
            for file in manifest.files:
                assert manifest.location(file, Path()).stat().st_size == file.size < 64_000_000
