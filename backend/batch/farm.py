# SPDX-License-Identifier: GPL-3.0-or-later
"""Job files for render farms. They ship as they are: plan, folder and number of shards are given when a job is sent."""

from __future__ import annotations

from importlib import resources
from typing import Final

TEMPLATES: Final = {"openjd": "openjd.yaml", "flamenco": "flamenco.js", "opencue": "submit_opencue.py"}


def template(farm: str) -> str:
    """The text of a farm's job file; all of them call `populace batch --shard I/N --resume`, then `--merge`."""
    return resources.files("backend.batch").joinpath("templates", TEMPLATES[farm]).read_text("utf-8")
