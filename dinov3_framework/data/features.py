"""Features of a whole dataset, gathered to every process.

The dataset is walked in global batches: process r takes the r-th slice of each, so that gathered
slices stand in the dataset's order and every process calls the backbone equally often, which a
sharded backbone needs. Whatever one process alone finds out (a corrupt sample, an image of the
wrong shape) is agreed on at the end; nobody leaves early and lets the others wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.images import ImageFit, normalize
from dinov3_framework.data.inference import (
    FitSamples,
    FittedImages,
    InferenceBatch,
    InferenceLoader,
    evaluating,
    rank_batches,
)
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.processes import pick_device

log = logging.getLogger(__name__)

_SHOWN = 5  # corrupt samples that the warning names

# In place of a label: of a sample that has none, and of a place whose sample was not read.
_UNLABELED = torch.iinfo(torch.int64).min
_UNREAD = _UNLABELED + 1


@frozen
class Features:
    """Class tokens of a dataset's readable samples, in the dataset's order, on the CPU."""

    cls: Tensor  # [N, D] float32
    labels: Tensor | None  # [N] int64
    skipped: int  # samples that could not be decoded

    def __len__(self) -> int:
        return len(self.cls)


def extract_features(
    backbone: Backbone,
    dataset: Dataset,
    *,
    images: ImagesConfig,
    size: int | None,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str | None = None,
) -> Features:
    """Class tokens of every image, without gradient and in eval mode (restored afterwards).

    Call it on every process; all get everything. ``size`` is the side of the evaluation image in
    pixels; None takes images as they are, which must then share one shape. ``batch_size`` images
    go through the backbone at a time in each process, read by ``workers`` loader processes of its
    own. ``device`` is the backbone's own if left out; given ("auto": this process's accelerator
    if there is one), the backbone is moved there.

    Raises ``DataError`` on every process if the dataset is empty, no sample can be decoded, shapes
    differ, or only some samples have a label.
    """
    parameter = next(backbone.parameters(), None)
    if device is not None:
        device = pick_device(device) if isinstance(device, str) else device
        backbone.to(device)
    elif parameter is not None:
        device = parameter.device
    dtype = parameter.dtype if parameter is not None else torch.float32

    def embed(batch: Tensor) -> Tensor:
        pixels = normalize(batch.to(device, non_blocking=True), images)
        return cast(Tensor, backbone(pixels.to(dtype)))

    # Not inference_mode: what a backbone or its sharding caches in it could not be trained with.
    with evaluating(backbone), torch.no_grad():
        return _extract(embed, dataset, images, size, batch_size, workers)


def raw_pixels(
    dataset: Dataset,
    images: ImagesConfig,
    size: int | None,
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> Features:
    """The normalized pixels themselves as features, [N, C * H * W]: what any network must beat.

    Arguments and errors as in :func:`extract_features`.
    """

    def embed(batch: Tensor) -> Tensor:
        return normalize(batch, images).flatten(1)

    return _extract(embed, dataset, images, size, batch_size, workers)


def _extract(
    embed: Callable[[Tensor], Tensor],
    dataset: Dataset,
    images: ImagesConfig,
    size: int | None,
    batch_size: int,
    workers: int,
) -> Features:
    total = len(dataset)
    shape = _shape(dataset, images, size)
    loader = InferenceLoader(
        dataset,
        FitSamples(ImageFit(images, 1, "native" if size is None else "crop", size)),
        rank_batches(total, batch_size),
        collate=FittedImages.collate,
        workers=workers,
    )
    cls = torch.empty(0)
    labels = torch.empty(total, dtype=torch.int64)
    corrupt: list[str] = []
    misfits: list[str] = []
    start = 0
    for batch in loader:
        misfits += [f"sample {index}: {error}" for index, error in batch.refused.items()]
        corrupt += [str(error) for error in batch.corrupt.values()]
        pixels = _pixels(batch, shape, misfits)
        embedded = collectives.all_gather(embed(pixels).float()).cpu()
        if start == 0:
            cls = torch.empty(total, embedded.shape[1])  # once: it may be most of the memory
        stop = min(start + len(embedded), total)
        cls[start:stop] = embedded[: stop - start]
        labels[start:stop] = collectives.all_gather(_batch_labels(batch))[: stop - start]
        start = stop
    agree_on_skipped(corrupt, misfits, total)
    read = labels != _UNREAD
    if not read.all():
        cls, labels = cls[read], labels[read]
    return Features(cls, _known(labels), total - len(cls))


def _shape(dataset: Dataset, images: ImagesConfig, size: int | None) -> tuple[int, int, int]:
    """[C, H, W] of every evaluation image; found alike by every process."""
    if len(dataset) == 0:
        raise DataError(f"{dataset.describe()}: holds no images to evaluate")
    if size is not None:
        return (images.channels, size, size)
    for index in range(len(dataset)):
        try:
            height, width = dataset[index].image.shape[1:]
        except CorruptSampleError:
            continue
        return (images.channels, height, width)
    raise DataError(f"{dataset.describe()}: not one sample can be decoded")


def _pixels(
    batch: InferenceBatch[FittedImages], shape: tuple[int, int, int], misfits: list[str]
) -> Tensor:
    """uint8 [places of the batch, C, H, W], zeros where no image of this shape was read."""
    padded = torch.zeros(len(batch.indices), *shape, dtype=torch.uint8)
    for places, pixels in [] if batch.data is None else batch.data.by_shape():
        at = [batch.places[place] for place in places]
        if pixels.shape[1:] != shape:
            misfits.append(
                f"sample {batch.indices[at[0]]} has shape {list(pixels.shape[1:])} where "
                f"{list(shape)} is expected; give a size to resize to"
            )
        elif len(pixels) == len(padded):
            return pixels
        else:
            padded[at] = pixels
    return padded


def _batch_labels(batch: InferenceBatch[FittedImages]) -> Tensor:
    """int64 [places of the batch]."""
    labels = torch.full((len(batch.indices),), _UNREAD, dtype=torch.int64)
    if batch.data is not None:
        known = [targets.get("label") for targets in batch.data.targets]
        found = [_UNLABELED if label is None else int(label) for label in known]
        labels[list(batch.places)] = torch.tensor(found)
    return labels


def agree_on_skipped(corrupt: list[str], misfits: list[str], total: int) -> None:
    """Tell every process what each found; raise on all of them or on none."""
    mine = (corrupt[:_SHOWN], len(corrupt), misfits[:1])
    found = cast("list[tuple[list[str], int, list[str]]]", collectives.all_gather_object(mine))
    names = [name for names, _, _ in found for name in names]
    skipped = sum(count for _, count, _ in found)
    for _, _, first in found:
        if first:
            raise DataError(first[0])
    if skipped == total:
        raise DataError(f"none of {total:,} samples can be decoded, the first: {names[0]}")
    if skipped and collectives.is_main():
        shown = "; ".join(names[:_SHOWN])
        log.warning("%d of %d samples left out, undecodable: %s", skipped, total, shown)


def _known(labels: Tensor) -> Tensor | None:
    missing = int((labels == _UNLABELED).sum())
    if missing == len(labels):
        return None
    if missing:
        raise DataError(f"{missing:,} of {len(labels):,} samples have no label, the others do")
    return labels
