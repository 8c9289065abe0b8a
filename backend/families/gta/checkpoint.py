# SPDX-License-Identifier: GPL-3.0-or-later
"""GTA's released files: see `backend.families.sifu.checkpoint`."""

from __future__ import annotations

from typing import Any

from backend.checkpoints import Converted
from backend.families.sifu import checkpoint


def convert(content: Any, file: str, own: bool = False) -> Converted:
    """As for SIFU."""
    return checkpoint.convert(content, file, own, "gta")
