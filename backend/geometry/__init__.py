# SPDX-License-Identifier: GPL-3.0-or-later
"""From a field to a clean, unwrapped, textured mesh. Arrays in, arrays out."""
