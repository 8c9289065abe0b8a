# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line as a user meets it: files, exit codes, one sentence when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

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
    for word in ("demo", "generate", "serve", "doctor", "addon", "weights", "bench", "exit codes", "POPULACE_HOME"):
        assert word in text
    assert all(f"\n  {code}  " in text for code in (0, 1, *cli.EXIT_CODES.values(), 130))


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate", "--seed", "-1"], ["generate", "--count", "0"],
                                       ["serve", "--port", "70000"], ["generate", "--set", "x"]])  # fmt: skip
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
