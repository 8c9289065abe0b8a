# SPDX-License-Identifier: GPL-3.0-or-later
"""Cameras, rasterisation and shading; differentiable where training needs it, quick on a CPU everywhere."""
