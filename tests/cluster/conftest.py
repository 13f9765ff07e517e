"""Two machines with a Ray of one core each, for tests that leave them as they were; skipped where none can be made."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cluster import hindrance, machines
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.support.cluster import Machine


@pytest.fixture(autouse=True, scope="session")
def _needs_machines() -> None:
    if reason := hindrance():
        pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def disk() -> Generator[Path]:
    """A directory that every machine sees, as on a shared disk; their /tmp they have each for themselves."""
    directory = Path(tempfile.mkdtemp(prefix="flowrl-cluster-", dir="/var/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def model() -> Generator[Path]:
    """The tiny model on such a disk."""
    directory = Path(tempfile.mkdtemp(prefix="flowrl-cluster-", dir="/var/tmp"))
    yield tiny_model(directory / "model")
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def pair() -> Generator[list[Machine]]:
    """The head, where commands are given, and a second machine."""
    with machines(2) as made:
        made[0].start_ray()
        made[1].start_ray(made[0])
        yield made
