"""Promises of a dataset."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from attrs import evolve
from torch import Tensor
from torchvision import tv_tensors

from dinov3_framework.contracts.data import Dataset, Sample, StreamDataset, Target
from dinov3_framework.errors import CorruptSampleError
from dinov3_framework.testing.suite import Suite


class _DataSuite(Suite):
    """Promises of datasets with and without an index."""

    kind = "dataset"
    channels: int = 3
    samples: int = 16

    def arguments(self) -> dict[str, Any]:
        return {"channels": self.channels}

    @cached_property
    def dataset(self) -> Any:
        return self.build()

    def readable(self) -> dict[int, Sample]:
        """Samples by index or place, those that can be decoded."""
        raise NotImplementedError

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
            expect_targets(f"sample {index}", sample, self.dataset.targets)


class DatasetSuite(_DataSuite):
    """Promises of a dataset, tried on ``samples`` images spread over it.

    Samples that raise ``CorruptSampleError`` are passed over, as long as there are others.
    """

    contract = Dataset

    def readable(self) -> dict[int, Sample]:
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

    def test_digest(self) -> None:
        """The digest is a line, and alike for the same data; notes are lines."""
        digest, notes = self.dataset.digest(), list(self.dataset.notes())
        lines = [digest, *notes]
        assert all(isinstance(line, str) and line and "\n" not in line for line in lines), (
            f"digest() and notes() must give lines of text, gave {lines!r}"
        )
        again = self.build().digest()
        assert again == digest, f"digest() gives {again!r} after {digest!r} for the same data"

    def test_labels(self) -> None:
        """The label that is told without the image is that of the sample."""
        for index, sample in self.readable().items():
            told = self.dataset.label(index)
            assert told == sample.label, (
                f"label({index}) is {told!r}, the sample has {sample.label!r}"
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
                assert _same_sample(other[index], evolve(sample, image=kept)), (
                    f"sample {index} {complaint}"
                )


class StreamDatasetSuite(_DataSuite):
    """Promises of a dataset without an index, tried on the first ``samples`` of two parts."""

    contract = StreamDataset

    def first(self, part: int = 0, count: int = 0, state: Any = None) -> list[tuple[Any, Any]]:
        """(sample or error, state) of the first of a part, or of those after a state."""
        stream = self.dataset.open(part=part, parts=2, seed=5, state=state)
        return list(itertools.islice(stream, count or self.samples))

    def readable(self) -> dict[int, Sample]:
        found = {i: each for i, (each, _) in enumerate(self.first()) if isinstance(each, Sample)}
        assert found, f"not one of {self.samples} samples can be decoded"
        return found

    def test_parts(self) -> None:
        """Parts have other samples, and each has as many as are asked for."""
        one, other = ([each for each, _ in self.first(part)] for part in (0, 1))
        assert len(one) == len(other) == self.samples, "a stream ended, and must not"
        for each in (*one, *other):
            assert isinstance(each, Sample | CorruptSampleError), (
                f"a stream gives samples and CorruptSampleErrors, gave {each!r}"
            )
        same = all(_same_sample(a, b) for a, b in zip(one, other, strict=True))
        assert not same, "two parts have the same samples"

    def test_resume(self) -> None:
        """From a state that went through JSON the same samples follow, in another process too."""
        whole, copied = self.first(), pickle.loads(pickle.dumps(self.dataset))
        half = self.samples // 2
        state = json.loads(json.dumps(whole[half - 1][1]))
        for dataset in (self.dataset, copied):
            stream = dataset.open(part=0, parts=2, seed=5, state=state)
            for (expected, _), (found, _) in zip(whole[half:], stream, strict=False):
                assert _same_sample(expected, found), "other samples follow upon a state"


def expect_targets(what: str, sample: Sample, schema: Mapping[str, Target]) -> None:
    """Assert that the targets of a sample are what a schema says."""
    size, objects = list(sample.image.shape[1:]), {}
    for name, value in sample.targets.items():
        assert name in schema, f"{what} has a target {name!r}, targets has not"
        shown = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        assert fits(schema[name], value, size), (
            f"the target {name!r} of {what} is {shown}, no {schema[name]}"
        )
        if schema[name].per_object:
            objects[name] = len(value)
    assert len(set(objects.values())) < 2, f"{what} has several numbers of objects: {objects}"


def fits(target: Target, value: Any, size: list[int]) -> bool:
    """Whether a value is what a target says, for an image of ``size`` [H, W]."""
    if target.kind == "text" and target.per_object:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if target.kind in ("class", "number") and target.per_object:
        dtype = torch.int64 if target.kind == "class" else torch.float32
        typed = isinstance(value, Tensor) and (value.dtype, value.ndim) == (dtype, 1)
        return typed and (target.kind != "class" or _are_ids(target, value))
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


def _same_sample(one: Any, other: Any) -> bool:
    if not (isinstance(one, Sample) and isinstance(other, Sample)):
        return str(one) == str(other)
    return (
        torch.equal(one.image, other.image)
        and one.targets.keys() == other.targets.keys()
        and all(_same(one.targets[name], value) for name, value in other.targets.items())
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other)
