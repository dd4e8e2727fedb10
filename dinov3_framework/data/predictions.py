"""What a head predicts of a whole dataset, each process its share of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.contracts.data import Dataset, Sample, SampleBatch, Transform
from dinov3_framework.contracts.running import Model
from dinov3_framework.data.features import agree_on_skipped
from dinov3_framework.data.inference import InferenceLoader, evaluating, rank_batches
from dinov3_framework.data.loader import LabeledBatch
from dinov3_framework.data.tokens import head_features
from dinov3_framework.errors import DataError


def predictions(
    model: Model,
    dataset: Dataset,
    transform: Transform,
    *,
    batch_size: int = 32,
    workers: int = 0,
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(predictions, targets) of batches of at most ``batch_size`` samples.

    To be iterated to its end by every process: each gets every sample of its share once, and all
    call the model equally often, as sharded networks want it. Images of several sizes come one by
    one. Targets are on the model's device. Samples that cannot be decoded are left out, and at the
    end reported as a warning. Raises ``DataError`` on every process where a sample does not fit.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset.describe()}: holds no images to evaluate")
    loader = InferenceLoader(
        dataset,
        _Transformed(transform),
        rank_batches(len(dataset), batch_size),
        collate=transform.collate,
        workers=workers,
    )
    corrupt: list[str] = []
    refused: list[str] = []
    device = next(model.backbone.parameters()).device
    height, width = transform.size or (2 * model.backbone.patch_size,) * 2
    blank = torch.zeros(1, model.images.channels, height, width)  # where no image is left
    for batch in loader:
        corrupt += map(str, batch.corrupt.values())
        refused += [f"sample {index}: {error}" for index, error in batch.refused.items()]
        parts = [] if batch.data is None else _parts(batch.data, transform.size is None)
        for part in parts:
            moved = LabeledBatch(part).to(device).samples
            yield predict(model, moved.images), moved.targets
        calls = 1 if transform.size is not None else len(batch.indices)
        for _ in range(calls - len(parts)):
            predict(model, blank)
    agree_on_skipped(corrupt, refused, len(dataset))


def predict(model: Model, images: Tensor | list[Tensor]) -> Mapping[str, Any]:
    """Predictions for a batch of normalized images of one size; without gradient, in eval mode."""
    if model.head is None:
        raise TypeError("there is no head")
    if not isinstance(images, Tensor):
        images = torch.stack(images)
    first = next(model.backbone.parameters())
    with torch.no_grad(), evaluating(model.backbone), evaluating(model.head):
        pixels = images.to(first.device, first.dtype)
        features = head_features(model.backbone, pixels, model.head.needs)
        return model.head.predict(model.head(features), features.image_size)


@frozen
class _Transformed:
    transform: Transform

    def __call__(self, sample: Sample, index: int) -> Sample:
        return self.transform(sample)


def _parts(batch: SampleBatch, one_by_one: bool) -> Sequence[SampleBatch]:
    if not one_by_one:
        return [batch]
    return [
        SampleBatch(
            batch.images[place : place + 1],
            {name: values[place : place + 1] for name, values in batch.targets.items()},
        )
        for place in range(len(batch))
    ]
