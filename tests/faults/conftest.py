# SPDX-License-Identifier: GPL-3.0-or-later
"""One backend for all tests that leave it running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Backend


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """F25: in a folder with spaces, umlauts and Chinese in its long name."""
    home = tmp_path_factory.mktemp("backend") / "Jürgen 中文 of a family" / ("long " * 20).strip() / "populace"
    made = Backend(home, environment={"POPULACE_WORKER_RESTARTS": "100"}).wait_ready()
    yield made
    errors = made.stop()
    assert made.process.returncode == 0
    assert "Traceback" not in errors, errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Backend]]:
    """Start a backend of one's own, by default in a fresh folder; ended with the test."""
    made: list[Backend] = []

    def new(home: Path | None = None, wait: bool = True, **how: Any) -> Backend:
        made.append(Backend(home or tmp_path / "home", **how))
        return made[-1].wait_ready() if wait else made[-1]

    yield new
    for one in made:
        one.stop()
