"""Promises of a dataset."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from dinov3_framework.contracts.data import Dataset, Sample, Target
from dinov3_framework.errors import CorruptSampleError
from dinov3_framework.testing.suite import Suite


class DatasetSuite(Suite):
    """Promises of a dataset, tried on ``samples`` images spread over it.

    Samples that raise ``CorruptSampleError`` are passed over, as long as there are others.
    """

    kind = "dataset"
    contract = Dataset
    channels: int = 3
    samples: int = 16

    def arguments(self) -> dict[str, Any]:
        return {"channels": self.channels}

    @cached_property
    def dataset(self) -> Dataset:
        dataset: Dataset = self.build()
        return dataset

    def readable(self) -> dict[int, Sample]:
        """Samples by index, those that can be decoded."""
        size, count = len(self.dataset), self.samples
        assert size > 0, "holds no image"
        found = {}
        for i in range(count):
            index = round(i * (size - 1) / max(count - 1, 1))
            try:
                found[index] = sample = self.dataset[index]
            except CorruptSampleError:
                continue
            name = type(sample).__name__
            assert isinstance(sample, Sample), f"sample {index} must be a Sample, is {name}"
        assert found, f"not one of {count} samples can be decoded"
        return found

    # ------------------------------------------------------------------ promises
    def test_description(self) -> None:
        """It says in one line what it is, and of its targets what each is."""
        text, targets = self.dataset.describe(), self.dataset.targets
        is_line = isinstance(text, str) and bool(text.strip()) and "\n" not in text
        assert is_line, f"describe() must give one line of text, gave {text!r}"
        known = isinstance(targets, Mapping) and all(
            isinstance(target, Target) for target in targets.values()
        )
        assert known, f"targets must map names to Target(...), is {targets!r}"

    def test_samples(self) -> None:
        """Images have the channels asked for; targets are what ``targets`` says."""
        schema = self.dataset.targets
        for index, sample in self.readable().items():
            image = sample.image
            shape, dtype = list(image.shape), image.dtype
            assert len(shape) == 3 and shape[0] == self.channels and image.numel() > 0, (
                f"sample {index} is {shape}, not [{self.channels}, H, W]"
            )
            in_range = dtype.is_floating_point and bool(((image >= 0) & (image <= 1)).all())
            assert dtype in (torch.uint8, torch.uint16) or in_range, (
                f"sample {index} is {dtype}, neither uint8 nor uint16 nor floats in 0..1"
            )
            for name, value in sample.targets.items():
                assert name in schema, f"sample {index} has a target {name!r}, targets has not"
                shown = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
                assert fits(schema[name], value, shape[1:]), (
                    f"the target {name!r} of sample {index} is {shown}, no {schema[name]}"
                )

    def test_repeatable(self) -> None:
        """An index means the same sample each time, in loader workers too."""
        copied: Dataset = pickle.loads(pickle.dumps(self.dataset))
        assert len(copied) == len(self.dataset), "has another length once pickled"
        for index, sample in self.readable().items():
            kept = sample.image.clone()
            sample.image.fill_(0)
            sample.image[..., 0] = 1
            for other, complaint in (
                (self.dataset, "changes between two reads, or when its image is written to"),
                (copied, "is another once the dataset is pickled"),
            ):
                again = other[index]
                same = again.targets.keys() == sample.targets.keys() and all(
                    _same(again.targets[name], value) for name, value in sample.targets.items()
                )
                assert same and torch.equal(again.image, kept), f"sample {index} {complaint}"


def fits(target: Target, value: Any, size: list[int]) -> bool:
    """Whether a value is what a target says, for an image of ``size`` [H, W]."""
    if target.kind in ("class", "number", "text"):
        types: Any = {"class": int, "number": (int, float), "text": str}[target.kind]
        if not isinstance(value, types) or isinstance(value, bool):
            return False
        return target.kind != "class" or _are_ids(target, value)
    if target.kind == "boxes":
        return (
            isinstance(value, tv_tensors.BoundingBoxes)
            and value.format is tv_tensors.BoundingBoxFormat.XYXY
            and (value.dtype, value.shape[1:]) == (torch.float32, (4,))
            and list(value.canvas_size) == size
        )
    if not isinstance(value, tv_tensors.Mask) or list(value.shape[-2:]) != size:
        return False
    if target.kind == "instances":
        return (value.dtype, value.ndim) == (torch.bool, 3)
    if target.kind == "map":
        return (value.dtype, value.ndim) == (torch.float32, 2)
    whole = not value.is_floating_point() and value.dtype != torch.bool
    return whole and value.ndim == 2 and _are_ids(target, value)


def _are_ids(target: Target, ids: Any) -> bool:
    """Whether all are classes that there are, or what is to be ignored."""
    ids = torch.as_tensor(ids).as_subclass(Tensor).long()
    count = math.inf if target.count is None else target.count
    return bool((((ids >= 0) & (ids < count)) | (ids == target.ignore_index)).all())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other)
