# SPDX-License-Identifier: GPL-3.0-or-later
"""Official checkpoints are read without running anything; what does not fit is named. Files are written by torch."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from backend import __main__, checkpoints, families, weight_files, weights
from backend.families.get3d import checkpoint as get3d_checkpoint
from backend.families.get3d.config import Config
from backend.families.get3d.networks import Generator
from backend.protocol import PopulaceError
from backend.settings import Settings


@pytest.fixture(autouse=True)
def few_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get3d_checkpoint, "AVERAGE_OF", 100)


def tiny(kind: str = "unified", **changes: Any) -> Generator:
    torch.manual_seed(0)
    return Generator(Config.tiny(kind=kind, resolution=16, **changes))


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def official(path: Path, generator: nn.Module, **options: Any) -> Path:
    """As the authors save: generator, its average, discriminator."""
    state = generator.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    return saved(path, {"G": other, "G_ema": state, "D": {"b8.conv0.weight": torch.zeros(2)}}, **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind_come_back_exactly(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    content = {
        "float": base, "transposed": base.T, "part": base[1:3, ::2], "half": base.half(), "double": base.double(),
        "bfloat": (base / 3).bfloat16(), "long": base.long(), "int": base.int(), "short": base.short(),
        "byte": base.byte(), "char": base.to(torch.int8), "bool": base > 7, "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3), "parameter": nn.Parameter(base.clone()), "repeated": base,
    }  # fmt: skip
    tree = {"state": collections.OrderedDict(content), "list": [1, 2.5, None, True, "text", (3, [4])],
            "big": 1 << 70, "size": base.shape}  # fmt: skip
    path = saved(tmp_path / "a.pt", tree, _use_new_zipfile_serialization=zipped)
    found = checkpoints.read(path)
    assert found["list"] == tree["list"]
    assert (found["big"], found["size"]) == (1 << 70, (4, 6))
    assert list(found["state"]) == list(content)
    for name, tensor in content.items():
        array = found["state"][name].array()
        expected = tensor.detach().float() if name == "bfloat" else tensor.detach()
        assert array.flags.c_contiguous
        assert array.dtype == expected.numpy().dtype
        assert np.array_equal(array, expected.numpy())


def test_a_modules_own_state_is_read(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))  # its OrderedDict carries an attribute
    found = checkpoints.read(saved(tmp_path / "a.pth", net.state_dict()))
    assert found.keys() == net.state_dict().keys()
    assert np.array_equal(found["1.running_var"].array(), np.ones(3, np.float32))


class Runs:
    """A pickle of this would leave a marker behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "hidden", "protocol 0"])
def test_code_in_a_file_is_refused_by_name_and_never_runs(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "a.pt"
    evil = {"G_ema": {"x": torch.zeros(2)}, "augment_pipe": Runs(marker)}
    if form in ("zip", "legacy"):
        saved(path, evil, _use_new_zipfile_serialization=form == "zip")
    elif form == "plain":
        path.write_bytes(pickle.dumps(Runs(marker), protocol=4))
    elif form == "protocol 0":
        path.write_bytes(pickle.dumps(Runs(marker), protocol=0))
    else:  # within a good archive
        saved(path, {"x": torch.zeros(2)})
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, pickle.dumps([Runs(marker)], 2) if name.endswith("data.pkl") else data)
    with pytest.raises(PopulaceError, match=r"asks for (posix|nt)\.mkdir") as caught:
        checkpoints.read(path)
    assert caught.value.code == "weights_corrupt"
    assert "Nothing in it was run" in str(caught.value)
    assert not marker.exists()
    with open(path, "rb") as file:  # the marker works: Python's own machine would have run it
        if form == "plain":
            pickle.load(file)
    assert marker.exists() == (form == "plain")


@pytest.mark.parametrize(("program", "says"), [
    (b"cbuiltins\neval\n(V1\ntR.", "asks for builtins.eval"),
    (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.", "asks for builtins.exec"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n(I1\ntR.", "calls torch._utils._rebuild_tensor_v2 with arguments"),
    (b"ccollections\nOrderedDict\n(V1\ntR.", "calls collections.OrderedDict with arguments"),
    (b"(ccollections\nOrderedDict\no.", "the instruction OBJ"),
    (b"(icollections\nOrderedDict\n.", "the instruction INST"),
    (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the instruction NEWOBJ"),
    (b"\x82\x01.", "the instruction EXT1"),
    (b"P1\n.", "the instruction PERSID"),
    (b"\x80\x05\x97.", "the instruction NEXT_BUFFER"),
    (b"]I1\nb.", "fills a list as if it were a dict"),
    (b"I1\nI2\na.", "fills a int as if it were a list"),
    (b"I1\n)R.", "calls something that is not a name"),
    (b"}]I1\ns.", "keys that are neither text nor numbers"),
    (b"h\x05.", "refers to something that it does not have"),
    (b"t.", "take more than there is"),
    (b"(V__import__('os').mkdir('x')\n(V1\nQ.", "outside of the file"),
])  # fmt: skip
def test_every_other_instruction_is_refused_by_name(tmp_path: Path, program: bytes, says: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(program)
    with pytest.raises(PopulaceError, match=says):
        checkpoints.read(path)


def test_no_name_of_pythons_own_instructions_slips_through() -> None:
    """Whatever is not listed is refused, so a new instruction is refused too."""
    harmless = checkpoints._PUSH | set(checkpoints._CONSTANTS)
    acts = ("PROTO FRAME STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 LIST DICT APPEND "
            "APPENDS SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE "
            "BUILD BINPERSID")  # fmt: skip
    for opcode in pickletools.opcodes:
        if opcode.name not in harmless | set(acts.split()):
            with pytest.raises(ValueError, match=f"the instruction {opcode.name},"):
                checkpoints._step(opcode.name, None, [{}, (), (), ()], {}, lambda *a: None)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_a_sentence(tmp_path: Path, zipped: bool) -> None:
    whole = saved(tmp_path / "a.pt", {"G_ema": {"x": torch.arange(64.0)}}, _use_new_zipfile_serialization=zipped)
    data, part = whole.read_bytes(), tmp_path / "b.pt"
    for end in range(0, len(data), 7):
        part.write_bytes(data[:end])
        with pytest.raises(PopulaceError) as caught:
            checkpoints.read(part)
        assert caught.value.code == "weights_corrupt"
        assert caught.value.message.startswith("b.pt was not read: ")


def test_damaged_numbers_and_extents_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": torch.arange(64.0)})
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<3f", 5, 6, 7))
    data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(PopulaceError, match="storage 0 is damaged"):
        checkpoints.numbers("a.pt", checkpoints.read(path))
    storage = checkpoints.Storage("FloatStorage", "0", 6, lambda: b"\0" * 24)
    for offset, shape, strides in ((0, (7,), (1,)), (3, (2, 2), (3, 1)), (0, (6,), (-1,)), (0, (1000,), (0,)),
                                   (7, (), ()), (0, (2,), ()), (0, [2], [1]), (True, (2,), (1,))):  # fmt: skip
        with pytest.raises(ValueError, match="a tensor"):
            checkpoints._tensor(storage, offset, shape, strides)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02", b"hello", b"\x89HDF\r\n", b"{}" * 50])
def test_foreign_files_are_a_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(PopulaceError, match=r"a\.pt was not read"):
        checkpoints.read(path)


@pytest.mark.parametrize("kind", ["unified", "separate"])
def test_get3ds_average_generator_is_taken_whole(tmp_path: Path, kind: str) -> None:
    generator = tiny(kind)
    path = official(tmp_path / "shapenet_chair.pt", generator)
    made = checkpoints.convert("get3d", path, own=True)
    assert made.name == "get3d_chair"
    assert made.arrays.keys() == generator.state_dict().keys()
    for name, tensor in generator.state_dict().items():
        if name.endswith("w_avg"):
            assert np.abs(made.arrays[name]).max() > 0
        else:
            assert np.array_equal(made.arrays[name], tensor.numpy()), name
    bare = saved(tmp_path / "mine.pt", generator.state_dict())
    assert checkpoints.convert("get3d", bare, own=True).name == "get3d_own"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = tiny().state_dict()
    root = "synthesis.generator.tri_plane_synthesis."

    def says(changed: dict[str, Any], own: bool = True) -> str:
        with pytest.raises(PopulaceError) as caught:
            checkpoints.convert("get3d", saved(tmp_path / "a.pt", {"G_ema": changed}), own)
        assert caught.value.code == "weights_corrupt"
        return caught.value.message

    without = {name: tensor for name, tensor in state.items() if name != "mapping.fc3.bias"}
    assert "1 tensors are missing: mapping.fc3.bias" in says(without)
    assert "1 tensors do not belong there: extra.weight" in says({**state, "extra.weight": torch.zeros(1)})
    wider = {**state, f"{root}b8.conv1.noise_const": torch.zeros(16, 16)}
    assert f"{root}b8.conv1.noise_const is [16, 16] instead of [8, 8]" in says(wider)
    assert "16 x 16 pixels instead of 256 x 256" in says(state, own=False)
    assert "mapping.fc0.weight holds numbers that are not finite" in says(
        {**state, "mapping.fc0.weight": torch.full((32, 32), torch.nan)})  # fmt: skip
    assert "mapping.fc0.bias holds int64" in says({**state, "mapping.fc0.bias": torch.zeros(32).long()})
    assert "'mapping.fc0.bias' is not a tensor" in says({**state, "mapping.fc0.bias": 3})
    assert "it is no GET3D generator" in says({"w": torch.zeros(1)})
    with pytest.raises(PopulaceError, match="holds no tensors by name"):
        checkpoints.convert("get3d", saved(tmp_path / "a.pt", []))


def test_import_by_the_command_then_the_family_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))
    settings = Settings.load()
    with pytest.raises(PopulaceError, match="not here") as caught:
        families.load("get3d", "cpu", settings)
    assert caught.value.code == "weights_missing"
    assert "populace weights import get3d" in caught.value.hint
    path = official(tmp_path / "shapenet_car.pt", tiny())
    assert __main__.main(["weights", "import", "get3d", str(path)]) == 6
    assert "16 x 16 pixels instead of 256 x 256" in capsys.readouterr().err
    assert __main__.main(["weights", "import", "get3d", str(path), "--own"]) == 0
    said = capsys.readouterr().out
    assert "CC-BY-NC-SA-4.0" in said
    assert weights.sha256_of(path) in said
    manifest = weights.find("get3d_car", settings.data_dir)
    assert (manifest.licence, manifest.imported) == ("CC-BY-NC-SA-4.0", True)
    model = families.load("get3d", "cpu", settings)
    assert model.weights_sha256 == manifest.sha256
    mean = model.generator.mapping.w_avg
    assert torch.allclose(model.sample(5, 0.0, {}).codes["body/tex"], mean.expand(5, -1))
    assert __main__.main(["weights", "list"]) == 0
    listed = capsys.readouterr().out
    for name in ("get3d_chair", "get3d_motorbike", "get3d_table"):
        assert name in listed
    weight_files.remove("get3d_car", settings.data_dir)
    with pytest.raises(PopulaceError, match="not here"):
        families.load("get3d", "cpu", settings)
    assert not list(settings.data_dir.rglob("*.converted"))
