# SPDX-License-Identifier: GPL-3.0-or-later
"""Several test processes share the processors: each computes on one thread, and so does what it starts."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
