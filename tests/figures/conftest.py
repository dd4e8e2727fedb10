"""Fixtures of the figures' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from figures_support import FakeRun


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)
