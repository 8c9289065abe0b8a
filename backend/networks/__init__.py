# SPDX-License-Identifier: GPL-3.0-or-later
"""Blocks that families share."""
