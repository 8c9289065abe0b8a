# SPDX-License-Identifier: GPL-3.0-or-later
"""`python -I FOLDER COMMAND ...` runs the installer: Python then finds this folder's packages, nothing of Blender."""

import sys

from installer.commands import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    sys.exit(main())
