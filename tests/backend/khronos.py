# SPDX-License-Identifier: GPL-3.0-or-later
"""The Khronos glTF validator, where node and the npm package gltf-validator are installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path


def find_validator() -> Path | None:
    """A node script next to an installed gltf-validator: in $GLTF_VALIDATOR_HOME or where npm puts global modules."""
    homes = [os.environ.get("GLTF_VALIDATOR_HOME", ""), "/usr/local/lib", "/usr/lib", "."]
    return next((Path(h).resolve() for h in homes if h and (Path(h) / "node_modules/gltf-validator").is_dir()), None)


def validate(glb: Path) -> dict:
    """The Khronos validator's report."""
    script = (
        "const v = require(process.argv[1] + '/node_modules/gltf-validator'), fs = require('fs');"
        "v.validateBytes(new Uint8Array(fs.readFileSync(process.argv[2]))).then(r => console.log(JSON.stringify(r)));"
    )
    command = ["node", "-e", script, str(find_validator()), str(glb)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
