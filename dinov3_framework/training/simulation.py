"""What an estimate of a step needs of trainings: batches without values, and what cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import frozen
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from dinov3_framework.contracts.data import Sample, Target
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


def made_up_sample(
    targets: Mapping[str, Target], size: tuple[int, int], channels: int = 3, seed: int = 0
) -> Sample:
    """A uint8 image of noise with targets of every sort that a schema has, a few objects each."""
    from torchvision import tv_tensors

    generator = torch.Generator().manual_seed(seed)
    objects, (height, width) = 4, size

    def numbers(high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * high

    def made(target: Target) -> Any:
        ids = target.count or 2
        if target.kind == "boxes":
            corners = numbers(0.5, objects, 2), numbers(0.5, objects, 2) + 0.5
            boxes = torch.cat(corners, 1) * torch.tensor([width, height, width, height])
            return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        if target.kind == "instances":
            return tv_tensors.Mask(numbers(1, objects, *size) > 0.5)
        if target.kind in ("mask", "map"):
            values = numbers(ids if target.kind == "mask" else 1, *size)
            return tv_tensors.Mask(values.long() if target.kind == "mask" else values)
        if target.kind == "text":
            return ["text"] * objects if target.per_object else "text"
        values = numbers(ids, objects)
        values = values.long() if target.kind == "class" else values
        return values if target.per_object else values[0].item()

    image = numbers(256, channels, *size).to(torch.uint8)
    return Sample(image, {name: made(target) for name, target in targets.items()})
