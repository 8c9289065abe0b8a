# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything that makes weights. Loaded only by `populace train`; needs the `train` extra and MakeHuman assets."""
