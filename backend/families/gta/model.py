# SPDX-License-Identifier: GPL-3.0-or-later
"""See `backend.families.sifu.model`; the weights say which of the two a model is."""

from __future__ import annotations

from backend.families.sifu.model import load

__all__ = ["load"]
