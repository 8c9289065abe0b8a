# SPDX-License-Identifier: GPL-3.0-or-later
"""Model families. One folder each; `base.py` is the contract, `families()` lists the folders, `load(name)` makes a model."""
