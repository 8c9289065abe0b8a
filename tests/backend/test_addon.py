# SPDX-License-Identifier: GPL-3.0-or-later
"""The zips that Blender installs, and the index of a repository that serves them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from backend import __main__, addon
from backend.protocol import PopulaceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole tree, weights included: seconds, so once."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs a checkout")
    return addon.build(tmp_path_factory.mktemp("full"), full=True)


def names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_slim_installs_nothing_and_full_carries_all(full: Path, tmp_path: Path) -> None:
    slim = addon.build(tmp_path)
    wheel = next(name for name in names(full) if name.endswith(".whl"))
    beyond = names(full) - names(slim)
    assert {wheel, "setup/__main__.py", "setup/operators.py"} < beyond
    assert all(name.startswith(addon.FULL_ONLY) for name in beyond - {wheel})
    assert names(slim) < names(full)
    with zipfile.ZipFile(slim) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))
    for word in (b"ensurepip", b'"pip"', b"import urllib", b"import requests", b"sys.path", b"eval("):
        assert word not in code
    assert addon.validate(slim) == addon.validate(full)  # both pass where Blender's tool is
    with zipfile.ZipFile(full) as archive:
        permissions = tomllib.loads(archive.read("blender_manifest.toml").decode())["permissions"]
        inner = archive.read(wheel)
    assert "installs" in permissions["files"]
    assert "downloads" in permissions["network"]
    with zipfile.ZipFile(io.BytesIO(inner)) as archive:
        packed = set(archive.namelist())
        about = archive.read(next(name for name in packed if name.endswith("METADATA"))).decode()
    assert {"backend/doctor.py", "weights_manifest/people.toml", "weights_manifest/embedded/people.safetensors",
            "backend/poses.json"} <= packed  # fmt: skip
    assert not [name for name in packed if "pycache" in name or name.startswith("tests")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert about.count("Requires-Dist: ") >= len(project["dependencies"])
    assert "Requires-Dist: huggingface-hub" in about


INSTALL = """
import sys, bpy, addon_utils
name, path = "bl_ext.user_default.populace", sys.argv[1]
done = bpy.ops.extensions.package_install_files(filepath=path, repo="user_default", enable_on_install=True)
assert done == {"FINISHED"} and addon_utils.check(name)[1], done
assert all(sys.modules[name].__file__.startswith(sys.argv[2]) for m in (name,)), sys.modules[name].__file__
print(" ".join(dir(bpy.ops.populace)))
addon_utils.disable(name, default_set=True)
assert dir(bpy.ops.populace) == []
"""


@pytest.mark.skipif(addon.blender_tool() is None, reason="needs the bpy module")
@pytest.mark.parametrize("kind", ["slim", "full"])
def test_blender_installs_and_enables_the_built_zip(full: Path, tmp_path: Path, kind: str) -> None:
    """In a fresh profile, in a folder that is not this checkout: a file that is missing in the zip shows here."""
    path = full if kind == "full" else addon.build(tmp_path)
    profile = tmp_path / "profile ö"
    profile.mkdir()
    environment = {**os.environ, "BLENDER_USER_RESOURCES": str(profile)}
    done = subprocess.run([sys.executable, "-I", "-c", INSTALL, str(path), str(profile)], env=environment, text=True,
                          capture_output=True, timeout=120, cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    operators = set(done.stdout.split())
    assert {"generate", "make_crowd", "start_backend", "import_weights"} <= operators
    assert ("setup_backend" in operators) == (kind == "full")


def test_full_zip_is_the_same_for_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small tree, built at two places and times."""
    made = []
    for name in ("one", "two"):
        project = tmp_path / name
        for package, files in {
            "backend": ["__init__.py", "doctor.py"],
            "weights_manifest": ["__init__.py"],
            "blender_addon": ["__init__.py", "blender_manifest.toml", "setup/__main__.py"],
        }.items():
            for file in files:
                (project / package / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / package / file, project / package / file)
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / file, project / file)
        (project / "build/lib/backend").mkdir(parents=True)
        (project / "build/lib/backend" / f"left_over_{name}.py").touch()
        monkeypatch.setattr(addon, "SOURCE", project / "blender_addon")
        made.append(addon.build(tmp_path / f"out-{name}", full=True).read_bytes())
    assert made[0] == made[1]


def test_without_a_checkout_there_is_no_full_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addon, "SOURCE", shutil.copytree(ROOT / "blender_addon", tmp_path / "blender_addon"))
    shutil.copyfile(ROOT / "LICENSE", tmp_path / "LICENSE")
    with pytest.raises(PopulaceError, match="needs Populace's source"):
        addon.build(tmp_path / "out", full=True)
    assert not (tmp_path / "out").exists()


def test_index_is_what_blender_itself_would_write(full: Path, tmp_path: Path) -> None:
    for folder, build in (("slim", False), ("full", True)):
        place = tmp_path / folder
        place.mkdir()
        if build:
            shutil.copy(full, place)
        else:
            addon.build(place)
        assert __main__.main(["addon", "index", str(place), "--html"]) == 0
        ours = json.loads((place / "index.json").read_text())
        page = (place / "index.html").read_text()
        assert f'href="./{next(place.glob("*.zip")).name}?repository=.%2Findex.json&amp;' in page
        tool = addon.blender_tool()
        if tool is None:
            continue
        subprocess.run([sys.executable, str(tool), "server-generate", "--repo-dir", str(place)], check=True,
                       capture_output=True, timeout=120)  # fmt: skip
        assert json.loads((place / "index.json").read_text()) == ours


def test_an_index_that_blender_would_refuse_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PopulaceError, match="no zips"):
        addon.write_index(tmp_path)
    made = addon.build(tmp_path)
    shutil.copy(made, tmp_path / "populace-full-0.1.0.zip")
    with pytest.raises(PopulaceError, match="folders of their own") as caught:
        addon.write_index(tmp_path)
    assert "same extension" in caught.value.message
    (tmp_path / "populace-full-0.1.0.zip").write_bytes(b"no zip")
    with pytest.raises(PopulaceError, match="no Blender extension"):
        addon.write_index(tmp_path)
    assert not (tmp_path / "index.json").exists()
