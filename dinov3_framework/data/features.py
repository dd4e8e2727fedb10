"""Features of a whole dataset, by all processes together.

The dataset is walked in global batches: process r takes the r-th slice of each, so that gathered
slices stand in the dataset's order and every process calls the backbone equally often, which a
sharded backbone needs. Whatever one process alone finds out (a corrupt sample, an image of the
wrong shape) is agreed on at the end; nobody leaves early and lets the others wait.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.images import evaluation_image, normalize
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.processes import pick_device

log = logging.getLogger(__name__)

_TIMEOUT = 600.0  # seconds that a loader worker may take for one batch
_SHOWN = 5  # corrupt samples that the warning names

# What became of a place in a batch.
_READ, _CORRUPT, _PADDING = 0, 1, 2
_UNLABELLED = torch.iinfo(torch.int64).min


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
    """The normalised pixels themselves as features, [N, C * H * W]: what any network must beat.

    Arguments and errors as in :func:`extract_features`.
    """

    def embed(batch: Tensor) -> Tensor:
        return normalize(batch, images).flatten(1)

    return _extract(embed, dataset, images, size, batch_size, workers)


@frozen
class _Place:
    """What was read for one place of a batch."""

    image: Tensor  # zeros unless read
    label: int
    state: int
    complaint: str = ""


@frozen
class _Slice:
    """One process's part of a global batch."""

    images: Tensor  # uint8 [n, C, H, W]
    notes: Tensor  # int64 [n, 2]: label and state
    corrupt: list[str]
    misfits: list[str]


class _Reader(TorchDataset[_Place]):
    """Evaluation images of one shape by index; what cannot be read is said, not raised."""

    def __init__(self, dataset: Dataset, size: int | None, shape: tuple[int, ...]) -> None:
        self.dataset, self.size, self.shape = dataset, size, shape

    def __getitem__(self, index: int) -> _Place:
        if index >= len(self.dataset):
            return _Place(self._blank(), _UNLABELLED, _PADDING)
        try:
            sample = self.dataset[index]
        except CorruptSampleError as error:
            return _Place(self._blank(), _UNLABELLED, _CORRUPT, str(error))
        label = _UNLABELLED if sample.label is None else int(sample.label)
        image = sample.image if self.size is None else evaluation_image(sample.image, self.size)
        if image.shape == self.shape:
            return _Place(image, label, _READ)
        complaint = (
            f"sample {index} has shape {list(image.shape)} where {list(self.shape)} is expected; "
            "give a size to resize to, and one number of channels"
        )
        return _Place(self._blank(), label, _READ, complaint)

    def _blank(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.uint8)


def _collate(places: list[_Place]) -> _Slice:
    return _Slice(
        images=torch.stack([place.image for place in places]),
        notes=torch.tensor([(place.label, place.state) for place in places]),
        corrupt=[place.complaint for place in places if place.state == _CORRUPT],
        misfits=[p.complaint for p in places if p.complaint and p.state == _READ],
    )


def _extract(
    embed: Callable[[Tensor], Tensor],
    dataset: Dataset,
    images: ImagesConfig,
    size: int | None,
    batch_size: int,
    workers: int,
) -> Features:
    total, world = len(dataset), collectives.world_size()
    loader = DataLoader(
        _Reader(dataset, size, _shape(dataset, images, size)),
        batch_sampler=_slices(total, batch_size, world, collectives.rank()),
        num_workers=workers,
        collate_fn=_collate,
        timeout=_TIMEOUT if workers else 0,
    )
    cls = torch.empty(0)
    notes = torch.empty(total, 2, dtype=torch.int64)
    corrupt: list[str] = []
    misfits: list[str] = []
    start = 0
    for part in loader:
        embedded = collectives.all_gather(embed(part.images).float()).cpu()
        if start == 0:
            cls = torch.empty(total, embedded.shape[1])  # once: it may be most of the memory
        stop = min(start + len(embedded), total)
        cls[start:stop] = embedded[: stop - start]
        notes[start:stop] = collectives.all_gather(part.notes)[: stop - start]
        corrupt += part.corrupt
        misfits += part.misfits
        start = stop
    _agree(corrupt, misfits, total)
    labels, states = notes.T
    read = states == _READ
    if not read.all():
        cls, labels = cls[read], labels[read]
    return Features(cls, _labels(labels.contiguous()), total - len(cls))


def _slices(total: int, batch_size: int, world: int, rank: int) -> list[list[int]]:
    """This process's indices in each global batch; those from ``total`` on are padding."""
    slices = []
    for start in range(0, total, batch_size * world):
        length = min(batch_size, math.ceil((total - start) / world))
        first = start + rank * length
        slices.append(list(range(first, first + length)))
    return slices


def _shape(dataset: Dataset, images: ImagesConfig, size: int | None) -> tuple[int, ...]:
    """[C, H, W] of every evaluation image; found alike by every process."""
    if len(dataset) == 0:
        raise DataError(f"{dataset.describe()}: holds no images to evaluate")
    if size is not None:
        return (images.channels, size, size)
    for index in range(len(dataset)):
        try:
            return (images.channels, *dataset[index].image.shape[1:])
        except CorruptSampleError:
            continue
    raise DataError(f"{dataset.describe()}: not one sample can be decoded")


def _agree(corrupt: list[str], misfits: list[str], total: int) -> None:
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


def _labels(labels: Tensor) -> Tensor | None:
    missing = int((labels == _UNLABELLED).sum())
    if missing == len(labels):
        return None
    if missing:
        raise DataError(f"{missing:,} of {len(labels):,} samples have no label, the others do")
    return labels


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration of a ``with``; parts that were in it before stay in it after."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
