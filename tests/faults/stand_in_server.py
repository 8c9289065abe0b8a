# SPDX-License-Identifier: GPL-3.0-or-later
"""The real server over the stand-in worker. `python stand_in_server.py REPOSITORY '{"module.NAME": value}' [--stay]`
sets constants, so that tests need not wait for time limits that are made for people."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    repository, constants, *flags = sys.argv[1:]
    sys.path.insert(0, repository)
    from backend import server
    from backend.settings import Settings

    for name, value in json.loads(constants).items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        setattr(importlib.import_module(module), constant, value)
    command = [sys.executable, str(Path(__file__).with_name("stand_in_worker.py")), repository]
    code = server.serve(Settings.load(stay="--stay" in flags), json_line=True, worker=command)
    assert "torch" not in sys.modules
    sys.exit(code)
