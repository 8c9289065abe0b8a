# SPDX-License-Identifier: GPL-3.0-or-later
"""From a photo to one person in it: `header` measures files, `read` decodes them, `matting` finds the people."""
