# SPDX-License-Identifier: GPL-3.0-or-later
"""`python -m backend.training` is `populace train`; torchrun wants a module: `torchrun -m backend.training ...`."""

from __future__ import annotations

import sys

from backend.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
