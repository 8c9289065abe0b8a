# SPDX-License-Identifier: GPL-3.0-or-later
"""Populace's generator backend: from latents to a textured human mesh."""

__version__ = "0.1.0"
