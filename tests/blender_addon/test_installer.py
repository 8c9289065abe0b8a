# SPDX-License-Identifier: GPL-3.0-or-later
"""The installer: a new environment only counts when it works, the old one stays until then, nothing half is left."""

from __future__ import annotations

import argparse
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blender_addon import process, setup
from blender_addon.setup.installer import commands, computer, pip, telling
from blender_addon.setup.installer.home import LOG, POINTER, RECORD, Home
from blender_addon.setup.installer.telling import SetupError

PROGRAM = Path(setup.__file__).parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")


def make_wheel(folder: Path, name: str, version: str, module: str = "", requires: tuple[str, ...] = ()) -> Path:
    """A wheel with one module, as small as they come."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=3.11,<3.14\n"
                            + "".join(f"Requires-Dist: {requirement}\n" for requirement in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{module or name}/__init__.py": "",
    }  # fmt: skip
    if name == "populace":
        files["backend/__main__.py"] = 'import json, torch, tinydep\nprint(json.dumps({"ok": True, "problems": []}))\n'
    files[f"{info}/RECORD"] = "".join(f"{f},,\n" for f in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


# ------------------------------------------------------------------------------------------- the pointer and its rules

Install = Callable[..., dict[str, Any]]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pip.Job:
    """Everything but pip and venv: an environment is a script that answers `doctor`. Its problem is `args.problem`."""
    args = argparse.Namespace(wheel=tmp_path, python=sys.executable, build="cpu", wheels="", problem="", version="")
    made = pip.Job(Home(tmp_path / "backend"), telling.Teller(io.StringIO()), telling.Leash(), args)

    def fill(job: pip.Job, python: Path, wheel: Any, build: str) -> None:
        problems = [args.problem] if args.problem else []
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho '{json.dumps({'ok': not problems, 'problems': problems})}'\n")
        python.chmod(0o755)

    monkeypatch.setattr(commands, "run", lambda *_: None)
    monkeypatch.setattr(commands, "fill", fill)
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path))  # the installer moves them
    made.home.folder.mkdir()
    return made


def install(job: pip.Job, version: str, problem: str = "") -> dict[str, Any]:
    job.args.wheel = make_wheel(job.home.folder.parent / "wheels", "populace", version)
    job.args.problem = problem
    return commands.install(job)


def names(job: pip.Job) -> tuple[str, str]:
    """Versions of the current and the previous environment."""
    return tuple(name.split("-")[0] for name in (job.home.pointer().get(k, "") for k in ("current", "previous")))


def test_install_upgrade_roll_back_uninstall(job: pip.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPULACE_DATA_DIR", str(job.home.folder.parent))
    assert process.installed_python() is None
    assert not install(job, "1.0")["is_upgrade"]
    assert names(job) == ("1.0", "")
    python = process.installed_python()
    assert python is not None
    assert python.parent.parent.parent == job.home.envs
    (python.parent.parent / "lib/python3.11/site-packages/populace-1.0.dist-info").mkdir(parents=True)
    command = process.find_command()
    assert command is not None
    assert command.argv[0] == str(python)
    assert install(job, "2.0")["is_upgrade"]
    assert names(job) == ("2.0", "1.0")
    assert process.installed_python() != python
    install(job, "3.0")
    assert names(job) == ("3.0", "2.0")
    assert sorted(p.name.split("-")[0] for p in job.home.envs.iterdir()) == ["2.0", "3.0"]  # 1.0 made room
    assert commands.roll_back(job)["version"] == "2.0"
    assert names(job) == ("2.0", "3.0")
    size = computer.bytes_in(job.home.folder)
    (job.home.folder / "lock").touch()
    shown: list[float] = []
    monkeypatch.setattr(job.teller, "progress", lambda stage, fraction, text="": shown.append(fraction))
    assert commands.uninstall(job)["freed_bytes"] == size
    assert shown == sorted(shown)
    assert len(shown) >= 3, "files take minutes on a slow disk"
    assert 0.5 < shown[-1] <= 1
    assert [p.name for p in job.home.folder.iterdir()] == ["lock"]
    assert process.installed_python() is None


def test_an_upgrade_that_does_not_work_leaves_the_old_one_in_use(job: pip.Job) -> None:
    install(job, "1.0")
    before = job.home.pointer()
    with pytest.raises(SetupError, match=r"not well: The weights are damaged\.") as caught:
        install(job, "2.0", "The weights are damaged.")
    assert caught.value.code == "doctor_failed"
    assert job.home.pointer() == before
    assert [p.name for p in job.home.envs.iterdir()] == [before["current"]]
    with pytest.raises(SetupError, match="no earlier version"):
        commands.roll_back(job)


@pytest.mark.parametrize("said", ["", "no JSON", "[]", '{"ok": 1, "problems": []}', '{"ok": true}'])
def test_a_doctor_that_lies_is_not_believed(job: pip.Job, tmp_path: Path, said: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{said}'\n")
    python.chmod(0o755)
    with pytest.raises(SetupError) as caught:
        commands.doctor(job, python)
    assert caught.value.code == "doctor_failed"


@pytest.mark.parametrize("pointer", ["", "[]", '{"current": "../x"}', '{"current": "gone"}', '{"current": 3}'])
def test_a_damaged_pointer_points_nowhere(job: pip.Job, pointer: str) -> None:
    (job.home.folder.parent / "x").mkdir()
    (job.home.folder / POINTER).write_text(pointer)
    assert job.home.pointer() == {}


def test_leftovers_are_removed(job: pip.Job) -> None:
    install(job, "1.0")
    for name in ("half/bin", "other"):
        (job.home.envs / name).mkdir(parents=True)
    job.home.temporary.mkdir(exist_ok=True)
    (job.home.temporary / "pip-x").write_text("half a wheel")
    assert job.home.tidy() == 12
    assert len(list(job.home.envs.iterdir())) == 1


def test_a_full_disk_is_known_before_anything_is_made(job: pip.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "free_bytes", lambda folder: 10**9)
    with pytest.raises(SetupError, match=r"needs 2\.4 GB, 1\.0 GB are free") as caught:
        install(job, "1.0")
    assert caught.value.code == "out_of_disk"
    assert not job.home.envs.exists()


def test_one_installer_at_a_time(job: pip.Job) -> None:
    with job.home.locked(), pytest.raises(SetupError, match="Another Blender"), Home(job.home.folder).locked():
        pass
    with job.home.locked():
        pass


# ---------------------------------------------------------------------------------------------------- looking around


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ('[3, 14, "3.14.1", 8, ""]', "is Python 3.14"), ('[3, 10, "3.10.2", 8, ""]', "is Python 3.10"),
        ('[3, 12, "3.12.1", 4, ""]', "is a 32-bit Python"), ("boom", "does not run"),
        ('[3, 12, "3.12.1", 8, "ensurepip"]', "lacks its module ensurepip"),
    ],
)  # fmt: skip
def test_a_python_that_will_not_do_is_refused_with_the_reason(tmp_path: Path, said: str, why: str) -> None:
    wheel = computer.Wheel.read(make_wheel(tmp_path, "populace", "1.0", requires=("torch>=2", "numpy")))
    assert (wheel.version, wheel.oldest, wheel.newest, wheel.torch) == ("1.0", (3, 11), (3, 14), "torch>=2")
    python = script(tmp_path / "python", f"echo '{said}'")
    with pytest.raises(SetupError, match=why) as caught:
        computer.find_python(wheel, str(python), telling.Leash())
    assert "3.11 to 3.13" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "build", "remark"),
    [
        ("NVIDIA GeForce RTX 4090, 560.35.03, 8.9", "cuda", ""),
        ("Tesla V100-SXM2-16GB, 535.183.01, 7.0", "cuda_older", ""),
        ("NVIDIA GeForce GTX 1080, 470.42.01, 6.1", "cpu", "470.42.01 is too old"),
        ("No devices were found", "cpu", "does not answer"), (None, "cpu", ""),
    ],
)  # fmt: skip
def test_the_build_fits_the_graphics_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, build: str, remark: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    if said is not None:
        script(tmp_path / "nvidia-smi", f"echo '{said}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if said is not None else str(tmp_path))
    name, chosen, why = computer.find_gpu(telling.Leash())
    assert (chosen, bool(name)) == (build, said is not None and "," in said)
    assert remark in why


def test_a_damaged_wheel_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "populace-1.0-py3-none-any.whl").write_bytes(b"PK no zip")
    with pytest.raises(SetupError, match="missing or damaged"):
        computer.Wheel.read(tmp_path / "populace-1.0-py3-none-any.whl")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "out_of_disk"),
        ("WARNING: Retrying ... NewConnectionError: Temporary failure in name resolution", "no_network"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "no_trust"),
        ("ERROR: No matching distribution found for torch>=2.6", "no_package"), ("ERROR: odd", "pip_failed"),
    ],
)  # fmt: skip
def test_what_pip_says_becomes_one_sentence(job: pip.Job, line: str, code: str) -> None:
    error = pip._why_pip_failed(["Collecting torch", line], job)
    assert error.code == code
    assert error.message.endswith((".", "odd"))
    assert error.hint
    assert ("torch" in error.message) == (code == "no_package")


# -------------------------------------------------------------------------------------- with pip, from a package index


class _Index(http.server.BaseHTTPRequestHandler):
    """A package index of the wheels in `server.folder`; what is named in `server.held` never arrives whole."""

    server: Any

    def do_GET(self) -> None:
        name = self.path.strip("/").split("/")[-1]
        if (file := self.server.folder / name).suffix == ".whl" and file.is_file():
            data = file.read_bytes()
            self.server.sent.append(name)
            self.send_response(200)
            self.send_header("Cache-Control", "max-age=365000000, immutable, public")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            if name.startswith(self.server.held):
                self.server.reached.set()
                self.server.go_on.wait(60)
            self.wfile.write(data[half:])
            return
        page = "".join(f'<a href="/files/{f.name}">{f.name}</a>' for f in self.server.folder.glob(f"{name}-*.whl"))
        self.send_response(200 if page else 404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Index)
    server.folder, server.sent, server.held = tmp_path / "wheels", [], "nothing"
    server.reached, server.go_on = threading.Event(), threading.Event()
    server.handle_error = lambda *_: None  # a client that goes is what this is about
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_cancelled_and_resumed_with_pip(tmp_path: Path, index: Any) -> None:
    """A real environment from a package index: stopped in mid-download, nothing half is left, and the second attempt
    does not load again what the first one had."""
    wheel = make_wheel(tmp_path, "populace", "1.0", "backend", ("torch>=2", "tinydep"))
    make_wheel(index.folder, "torch", "2.9")
    make_wheel(index.folder, "tinydep", "0.1")
    home, address = Home(tmp_path / "home with ö and 中"), f"http://127.0.0.1:{index.server_port}/simple"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {
        "PIP_CONFIG_FILE": os.devnull, "PIP_TRUSTED_HOST": "127.0.0.1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-I", str(PROGRAM), "install", "--folder", str(home.folder), "--wheel", str(wheel),
               "--build", "cpu", "--torch-index", address, "--package-index", address]  # fmt: skip

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True)

    index.held = "tinydep"
    with start() as first:
        assert index.reached.wait(120)
        said, _ = first.communicate()  # closes stdin: the leash
    assert first.returncode == 3
    assert json.loads(said.splitlines()[-1]) == {"event": "cancelled"}
    assert list(home.envs.iterdir()) == []
    assert not home.temporary.exists()
    assert home.pointer() == {}
    with pytest.raises(ProcessLookupError):
        os.killpg(first.pid, 0)  # pip is gone as well
    index.go_on.set()
    with start() as second:
        events = [json.loads(line) for line in second.stdout or ()]
    assert second.returncode == 0, (home.folder / LOG).read_text()
    assert index.sent == ["torch-2.9-py3-none-any.whl", *["tinydep-0.1-py3-none-any.whl"] * 2]
    fractions = [e["fraction"] for e in events if e["event"] == "progress"]
    assert fractions == sorted(fractions)
    assert {"Making the environment", "Unpacking", "Checking that it works"} <= {e.get("stage") for e in events}
    record = events[-1]["result"]
    assert record["version"] == "1.0"
    assert record["bytes"] == computer.bytes_in(home.envs) - (home.envs / home.pointer()["current"] /
                                                              RECORD).stat().st_size  # fmt: skip
    assert not home.cache.exists()
