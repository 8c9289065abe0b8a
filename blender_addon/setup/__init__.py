# SPDX-License-Identifier: GPL-3.0-or-later
"""Setting up the generator: `installer` does the work in a process of its own, `operators` and `panel` are its buttons.

Only in the full zip: the slim one, which may install nothing, leaves this folder out.
"""
