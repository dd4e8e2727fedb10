"""What an estimate of a step needs of trainings: batches without values, and what cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from dinov3_framework.contracts.running import Rows

# Raised where tensors without values are asked for them.
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


def reason(error: Exception) -> str:
    """Which operation asked for values."""
    return f"{getattr(error, 'func', None) or error} needs the values of tensors"


@frozen
class SimulatedBatch:
    """A micro-batch of one sort of steps, to be made where tensors have no values."""

    make: Callable[[], Any]
    name: str = ""  # what tells it from others, such as the crops' sizes
    share: float = 1.0  # of the steps that are of this sort
    iteration: int = 0  # in which everything takes part that ever does
    rows: Rows = ()  # what a report says of it
