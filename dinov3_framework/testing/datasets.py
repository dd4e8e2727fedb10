"""Promises of a dataset."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

from dinov3_framework.contracts.data import Dataset, Sample
from dinov3_framework.errors import CorruptSampleError
from dinov3_framework.kinds import DatasetConfig
from dinov3_framework.registry import Registry
from dinov3_framework.testing.subject import Subject


def check_dataset(
    config: DatasetConfig,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    channels: int = 3,
    samples: int = 16,
) -> None:
    """Check that a dataset keeps its contract, on ``samples`` images spread over it.

    Promises: it is not empty; samples are uint8 [channels, H, W] with a label below ``n_classes``
    or none; an index means the same image each time, whoever wrote into the tensor before, and in
    a loader worker (the object is pickled); ``describe()`` is one line. Samples that raise
    ``CorruptSampleError`` are passed over, as long as there are others.
    """
    subject = Subject.of("dataset", config, registry, factory, channels=channels)
    dataset: Dataset = subject.built(Dataset)
    with subject.doing("len()"):
        size = len(dataset)
    subject.require(size > 0, "holds no image")
    classes = dataset.n_classes
    subject.require(
        classes is None or (type(classes) is int and classes > 0),
        f"n_classes must be None or an integer above 0, is {classes!r}",
    )
    with subject.doing("describe()"):
        subject.one_line("describe()", dataset.describe())
    with subject.doing("pickling"):
        copied: Dataset = pickle.loads(pickle.dumps(dataset))
    subject.require(len(copied) == size, "has another length once pickled")
    indices = sorted({round(i * (size - 1) / max(samples - 1, 1)) for i in range(samples)})
    readable = [_check_sample(subject, dataset, copied, index, channels) for index in indices]
    subject.require(any(readable), f"not one of {len(indices)} samples can be decoded")


def _check_sample(
    subject: Subject, dataset: Dataset, copied: Dataset, index: int, channels: int
) -> bool:
    """Check one sample; False where it is corrupt."""
    sample = _read(subject, dataset, index)
    if sample is None:
        return False
    require, image, label = subject.require, sample.image, sample.label
    require(
        image.dtype == torch.uint8
        and image.ndim == 3
        and image.shape[0] == channels
        and image.numel() > 0,
        f"sample {index} is {image.dtype} {list(image.shape)}, not torch.uint8 [{channels}, H, W]",
    )
    require(
        label is None or type(label) is int,
        f"the label of sample {index} must be an int or None, is {label!r}",
    )
    classes = dataset.n_classes
    require(
        label is None or (label >= 0 and (classes is None or label < classes)),
        f"the label of sample {index} is {label}, n_classes is {classes}",
    )
    kept = image.clone()
    image.fill_(0)
    image[..., 0] = 255
    for other, complaint in (
        (dataset, "changes between two reads, or when somebody writes into what it gave"),
        (copied, "is another once the dataset is pickled"),
    ):
        again = _read(subject, other, index)
        require(
            again is not None and torch.equal(again.image, kept) and again.label == label,
            f"sample {index} {complaint}",
        )
    return True


def _read(subject: Subject, dataset: Dataset, index: int) -> Sample | None:
    with subject.doing(f"reading sample {index}"):
        try:
            sample = dataset[index]
        except CorruptSampleError:
            return None
    subject.require(
        isinstance(sample, Sample), f"sample {index} must be a Sample, is {type(sample).__name__}"
    )
    return sample
