# SPDX-License-Identifier: GPL-3.0-or-later
"""Which weight files exist, what they are and where they come from: one TOML per model, see README.md. Data only."""
