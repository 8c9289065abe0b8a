# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D and Get3DHuman with made-up tiny weights on every entry of the main road: panel, HTTP, batch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from backend import packet
from backend.__main__ import main
from backend.families.get3d.model import metadata_of
from tests.backend.test_get3d_family import generator
from tests.backend.test_get3dhuman_road import official_files
from tests.blender_addon.test_blender import people
from tests.blender_addon.test_end_to_end import real  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

SIZES: dict[str, Any] = {"grid_resolution": 32, "faces": 1000}
CHOICES = {"get3d": {"surface": "flexicubes", "style_seed": 8, "style_shape_row": 5}, "get3dhuman": {"look": "field"}}


@pytest.fixture
def both(real: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:  # noqa: F811
    """The add-on, and a home in which weights of both families were imported."""
    files = tmp_path / "files"
    files.mkdir()
    net = generator()
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, files / "objects.safetensors", metadata=metadata_of(net.config))
    assert main(["weights", "import", str(files / "objects.safetensors"), "--name", "objects"]) == 0
    assert main(["weights", "use", "objects", "--for", "get3d"]) == 0
    for file in official_files(files):
        assert main(["weights", "import", "get3dhuman", str(file), "--own"]) == 0
    return real


def test_panel_http_and_batch_of_both_families(both: SimpleNamespace, tmp_path: Path) -> None:
    bpy = both.bpy
    for family, chosen in CHOICES.items():
        before = len(people(bpy))
        words = {"family": family, "seed": 3, "texture_size": "512", **SIZES}
        assert bpy.ops.populace.generate(**words, parameters=json.dumps(chosen)) == {"FINISHED"}
        (root,) = people(bpy)[before:] if family == "get3d" else [r for r in people(bpy) if r.populace.family == family]
        assert root.populace.family == family
        assert json.loads(root.populace.recipe)["parameters"] == chosen
        meshes = [o for o in (root, *root.children) if o.type == "MESH"]
        assert sum(len(mesh.data.polygons) for mesh in meshes) > 100

        client = both.client.Client(sys.executable)  # another program, over HTTP
        request = {"family": family, "seed": 3, "texture_size": 512, **SIZES}
        first = client.generate(**request, parameters=chosen)
        other = client.generate(**request)
        assert first.recipe["parameters"] == chosen
        assert [p.name for p in first.parts] == [p.name for p in other.parts]
        assert first.parts[0].base_color_png != other.parts[0].base_color_png  # the choice was heard

        plan = tmp_path / f"{family}.jsonl"
        plan.write_text("\n".join(json.dumps({**request, "seed": 3 + i, "parameters": chosen}) for i in range(2)))
        out = tmp_path / f"{family}_batch"
        assert main(["batch", str(plan), "--out", str(out), "--format", "packet", "--device", "cpu"]) == 0
        made = [packet.loads(path.read_bytes()) for path in sorted(out.rglob("*.safetensors"))]
        assert [asset.meta["recipe"]["seed"] for asset in made] == [3, 4]
        assert made[0].parts[0].base_color_png == bytes(first.parts[0].base_color_png)  # the same on every road
    with pytest.raises(RuntimeError, match="out of its range"):
        bpy.ops.populace.generate(family="get3dhuman", parameters='{"look": "best"}')
    with pytest.raises(RuntimeError, match="no parameter"):
        bpy.ops.populace.generate(family="get3dhuman", parameters='{"surface": "dmtet"}')
