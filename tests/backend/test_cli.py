# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line as a user meets it: files, exit codes, one sentence when it fails."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from backend import __main__ as cli
from backend import addon, packet
from backend.progress import Progress
from backend.protocol import PopulaceError

SMALL = ["--family=capsule", "--grid-resolution=48", "--faces=1500", "--texture-size=512", "--device", "cpu"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_generate_writes_glbs_and_says_so_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["generate", "--seed", "7", "--count", "2", "--out", str(out), "--json", *SMALL]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seed"] for line in lines] == [7, 8]
    assert sorted(p.name for p in out.iterdir()) == ["person_000007.glb", "person_000008.glb"]
    assert all(Path(line["path"]).read_bytes().startswith(b"glTF") for line in lines)
    assert all(part["closed"] for line in lines for part in line["parts"])
    assert lines[0]["packet_sha256"] != lines[1]["packet_sha256"]
    assert cli.main(["generate", "--seed", "8", "--out", str(out), "--json", *SMALL]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["packet_sha256"] == lines[1]["packet_sha256"]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert cli.main([*arguments, "--json", *SMALL]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_words_and_attributes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(["generate", "--out", str(tmp_path), "--prompt", "1.9 m, red top, with a beard", "--set",
                    "bottom_color=teal", "--set", "weight=0.25", "--set", "pattern=plain"], capsys)  # fmt: skip
    assert line["height_m"] == pytest.approx(1.9, abs=0.01)
    assert line["attributes"]["weight"] == pytest.approx(0.25, abs=1e-5)
    assert line["attributes"]["top_color"] == pytest.approx([1, 0, 0], abs=1e-3)
    assert line["attributes"]["bottom_color"] == pytest.approx([0, 128 / 255, 128 / 255], abs=1e-3)
    assert line["attributes"]["pattern"] == "plain"
    assert line["words_ignored"] == ["beard"]
    assert cli.main(["generate", "--out", str(tmp_path), "--prompt", "beard", *SMALL]) == 0
    assert "not understood: beard" in capsys.readouterr().err


def test_edits_are_applied_in_the_order_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    (eight,) = said(["generate", "--seed", "8", *out], capsys)
    for edits in (["--set", "weight=1", "--mix", "8:1"], ["--vary", "8:1"], ["--part", "body=8"]):
        (line,) = said(["generate", "--seed", "7", *edits, *out], capsys)
        assert line["attributes"] == eight["attributes"], edits
    (line,) = said(["generate", "--seed", "7", "--mix", "8:1", "--set", "weight=1", *out], capsys)
    assert line["attributes"]["weight"] == pytest.approx(1, abs=1e-5)
    (seven, looks) = (said(["generate", "--seed", "7", *more, *out], capsys)[0] for more in ([], ["--retexture", "8"]))
    assert looks["height_m"] == seven["height_m"]
    assert looks["attributes"]["top_color"] == eight["attributes"]["top_color"]


def test_levels_of_detail_and_pose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(["generate", "--out", str(tmp_path), "--lods", "2", "--pose", "sitting", "--separate"], capsys)
    assert [part["lod"] for part in line["parts"]] == [0, 1]
    assert sorted(path.name for path in tmp_path.glob("*.glb")) == ["person_000000.glb", "person_000000_LOD1.glb"]
    assert [Path(path).name for path in line["paths"]] == ["person_000000.glb", "person_000000_LOD1.glb"]


def test_maps_and_shape_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(["generate", "--out", str(tmp_path), "--maps=color", "--shape-keys", "weight, height_m"], capsys)
    data = (tmp_path / "person_000000.glb").read_bytes()
    assert b'"targetNames":["weight_min","weight_max","height_m_min","height_m_max"]' in data
    assert data.count(b"image/png") == 1
    assert cli.main(["generate", "--out", str(tmp_path), "--shape-keys=pattern", *SMALL]) == 2
    assert "has no shape keys of 'pattern'" in capsys.readouterr().err


def test_whole_requests_and_what_overrules_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"seed": 7, "truncation_psi": 0.5, "edits": [{"op": "set", "values": {"weight": 0.75}}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    ask = ["generate", "--request", str(tmp_path / "request.json"), "--out", str(tmp_path)]
    (line,) = said(ask, capsys)
    assert line["seed"] == 7
    assert line["attributes"]["weight"] == pytest.approx(0.75, abs=1e-5)
    (other,) = said([*ask, "--seed", "9", "--set", "weight=0.5"], capsys)
    assert other["seed"] == 9
    assert other["attributes"]["weight"] == pytest.approx(0.5, abs=1e-5)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(request).encode())))
    (again,) = said(["generate", "--request", "-", "--out", str(tmp_path)], capsys)
    assert again["packet_sha256"] == line["packet_sha256"]


def test_interpolation_ends_at_both_people_in_equal_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(["interpolate", "--from", "7", "--to", "8", "--steps", "3", "--out", str(tmp_path)], capsys)
    ends = [said(["generate", "--seed", seed, "--out", str(tmp_path)], capsys)[0] for seed in ("7", "8")]
    assert [lines[0]["attributes"], lines[2]["attributes"]] == [end["attributes"] for end in ends]
    assert [Path(line["path"]).name for line in lines] == [f"person_000007_to_000008_0{i}.glb" for i in range(3)]
    looks = said(["interpolate", "--from", "7", "--to", "8", "--steps", "2", "--kinds", "tex", "--out", str(tmp_path)],
                 capsys)  # fmt: skip
    assert looks[1]["height_m"] == ends[0]["height_m"]
    assert looks[1]["attributes"]["top_color"] == ends[1]["attributes"]["top_color"]


def test_generate_obj_and_family_parameter(tmp_path: Path) -> None:
    command = ["generate", "--out", str(tmp_path), "--format", "obj", "--set", "single=true", *SMALL]
    assert cli.main(command) == 0
    assert (tmp_path / "person_000000/human.obj").read_text().count("\nf ") > 1000


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--family", "unicorn"], 2, "no model family 'unicorn'"),
        (["--grid-resolution", "9999"], 2, "--grid-resolution"),
        (["--set", "nose=1"], 2, "no parameter 'nose'"),
        (["--set", "height_m=3"], 2, "1.5..1.95 m"),
        (["--set", "top_color=nice"], 2, "no colour"),
        (["--mix", "3:2"], 2, "edits.0.mix.amount"),
        (["--part", "nose=3"], 2, "no part 'nose'"),
        (["--remove", "body"], 2, "cannot be taken off"),
        (["--pose", "flying"], 2, "no pose called 'flying'"),
        (["--request", "nowhere.json"], 2, "--request nowhere.json"),
        (["--request", __file__], 2, "not JSON"),
        (["--truncation-psi", "nan"], 2, "--truncation-psi"),
    ],
)
def test_mistakes_get_one_sentence_and_no_traceback(
    arguments: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--out", str(tmp_path), *SMALL, *arguments]) == code
    errors = capsys.readouterr().err
    assert says in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("*.glb"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PopulaceError("no_gpu", "No GPU.", "Use the CPU."), 5),
        (PopulaceError("weights_missing", "No weights."), 6),
        (PopulaceError("weights_corrupt", "Bad weights."), 6),
        (PopulaceError("out_of_disk", "Full."), 7),
        (OSError(errno.ENOSPC, "No space left on device", "x.glb"), 7),
        (PermissionError(errno.EACCES, "Permission denied", "x.glb"), 1),
        (MemoryError(), 1),
        (RuntimeError("odd"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(packet, "write_file", fail)
    assert cli.main(["generate", "--out", str(tmp_path), *SMALL]) == code
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert code == 130 or errors.startswith("populace: ")


def test_f25_read_only_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["generate", "--out", str(tmp_path / "file"), *SMALL]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_no_gpu_is_exit_code_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["generate", "--out", str(tmp_path), *SMALL[:-1], "cuda"]) == 5


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "demo",
        "generate",
        "interpolate",
        "plan",
        "batch",
        "farm",
        "serve",
        "doctor",
        "addon",
        "weights",
        "bench",
        "exit codes",
        "POPULACE_HOME",
    ):
        assert word in text
    assert all(f"\n  {code}  " in text for code in (0, 1, *cli.EXIT_CODES.values(), 130))


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate", "--seed", "-1"], ["generate", "--count", "0"],
                                       ["serve", "--port", "70000"], ["generate", "--set", "x"],
                                       ["generate", "--mix", "3"], ["generate", "--lods", "9"],
                                       ["interpolate", "--from", "1"],
                                       ["interpolate", "--from", "1", "--to", "2", "--kinds", "x"]])  # fmt: skip
def test_wrong_command_lines_are_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    capsys.readouterr()


def test_weights_list_and_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "list", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)
    assert cli.main(["weights", "verify"]) == 0
    capsys.readouterr()
    (tmp_path / "w.safetensors").write_bytes(b"123")
    assert cli.main(["weights", "hash", str(tmp_path / "w.safetensors")]) == 0
    assert hashlib.sha256(b"123").hexdigest() in capsys.readouterr().out
    assert cli.main(["weights", "hash", str(tmp_path / "none")]) == 1


def test_doctor_reports_what_runs_where(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code == 0) == report["ok"] == (not report["problems"])
    assert {row["name"] for row in report["families"]} >= {"capsule"}
    assert report["folders"]["data"]["writable"]
    assert "generating" in report["plan"]
    assert cli.main(["doctor"]) == code
    assert "What will run how" in capsys.readouterr().out


def test_a_new_computer_is_well_without_weights_that_nobody_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set-up in Blender takes this for its answer: it must not fail where other families have no weights yet."""
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path))
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    states = {row["name"]: row["state"] for row in report["families"]}
    assert report["problems"] == []
    assert states["people"].startswith("ready")
    assert "not here" in states["get3d"]


def test_addon_zip_is_reproducible_and_valid(tmp_path: Path) -> None:
    first, second = addon.build(tmp_path / "a"), addon.build(tmp_path / "b")
    assert first.name == "populace-0.1.0.zip"
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        names = archive.namelist()
    assert {"__init__.py", "blender_manifest.toml", "LICENSE", "client.py"} <= set(names)
    assert not [name for name in names if "pycache" in name or "pictures" in name or name.startswith(".")]
    if addon.validate(first):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr("blender_manifest.toml", 'id = "x"')
        with pytest.raises(PopulaceError, match="validator refuses"):
            addon.validate(tmp_path / "bad.zip")


def test_closed_pipe_is_no_traceback(home: Path) -> None:
    """`populace doctor | head -0`"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "backend", "doctor", "--json"], stdout=writer, stderr=subprocess.PIPE,
                          text=True, timeout=60)  # fmt: skip
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


class Terminal:
    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal, self.text = is_terminal, ""

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_shows_stage_percent_and_time_left_and_leaves_a_clean_line() -> None:
    terminal = Terminal(True)
    with Progress(terminal) as progress:
        progress.show("surface", 0.5)
        assert " 50 %  surface" in terminal.text
        assert "s left" in terminal.text
    assert terminal.text.endswith("\r\x1b[K")
    plain = Terminal(False)
    with Progress(plain, plain=True) as progress:
        for fraction in (0.1, 0.2, 0.3):
            progress.show("surface", fraction)
    assert plain.text == " 10 %  surface\n"
    silent = Terminal(False)
    with Progress(silent) as progress:
        progress.show("surface", 0.5)
    assert silent.text == ""
