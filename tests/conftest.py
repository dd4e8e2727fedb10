"""For all tests; what they import is in ``support``, which pyproject.toml puts on the path."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Tests run side by side, on networks so small that a second thread costs more than it brings. Set
# before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The same for a torch that was imported with other settings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
