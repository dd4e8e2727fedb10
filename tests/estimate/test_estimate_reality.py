"""The estimate's peak of memory against that of real processes.

What is measured, and how, is in benchmarks/rehearsal.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import rehearsal as bench  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it"
    ),
]
CASES = ("fp32", "bf16, 2 micro-batches")


@pytest.fixture(scope="module")
def found() -> dict[str, bench.Compared]:
    """Of two processes that talk by gloo."""
    return dict(zip(CASES, bench.compare([bench.CASES[name] for name in CASES], 2), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_tensors_take_what_was_predicted(name: str, found: dict[str, bench.Compared]) -> None:
    """The same ledger, kept over a real step."""
    case = found[name]
    assert case.predicted > 100 * bench.MIB
    # Of two micro-batches: both are given as many masked patches as the fuller one has.
    assert case.predicted == pytest.approx(case.counted, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_processes_take_what_was_predicted(name: str, found: dict[str, bench.Compared]) -> None:
    """Anonymous memory, as the kernel counts it."""
    assert found[name].predicted == pytest.approx(found[name].measured, rel=0.1)
