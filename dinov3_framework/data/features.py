"""Features of a whole dataset, each process its share of them or gathered to every process.

The dataset is walked in global batches: process r takes the r-th slice of each, so that every
process calls the backbone equally often, which a sharded backbone needs. Whatever one process alone
finds out (a corrupt sample, an image of the wrong shape) is agreed on at the end; nobody leaves
early and lets the others wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Dataset, Target
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.contracts.running import FeatureStore
from dinov3_framework.data.images import ImageFit, normalize
from dinov3_framework.data.inference import (
    FitSamples,
    FittedImages,
    InferenceBatch,
    InferenceLoader,
    evaluating,
    rank_batches,
)
from dinov3_framework.data.tokens import TokenReader
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.processes import pick_device

log = logging.getLogger(__name__)

_SHOWN = 5  # corrupt samples that the warning names
_VECTORS = ("class", "mean_patch")  # outputs that have one shape whatever the image's
_GATHERED = 4096  # rows that each process sends at once


@frozen(eq=False)
class Features:
    """Vectors of a dataset's readable samples, in the dataset's order, on the CPU."""

    tokens: Mapping[str, Tensor]  # [n, D] float32 by output, such as "class", "layer3.mean_patch"
    # int64 [n] of the target "label"; or bool [n, classes] of the target "labels", where each
    # sample has any number of them. None where there are none.
    labels: Tensor | None
    skipped: int = 0  # samples of the whole dataset that could not be decoded
    indices: Tensor = field()  # int64 [n]: which samples these are, increasing
    total: int = field()  # readable samples of the whole dataset, of which these may be a share

    @indices.default
    def _all(self) -> Tensor:
        return torch.arange(len(self))

    @total.default
    def _whole(self) -> int:
        return len(self)

    @property
    def cls(self) -> Tensor:
        """Class tokens [n, D]."""
        return self.tokens["class"]

    def __len__(self) -> int:
        return len(next(iter(self.tokens.values())))


def extract_features(
    backbone: Backbone,
    dataset: Dataset,
    *,
    images: ImagesConfig,
    size: int | None,
    resize: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str | None = None,
    outputs: Sequence[str] = ("class",),
    layers: Sequence[int] = (-1,),
    norm: bool = True,
    gather: bool = True,
    cache: FeatureStore | None = None,
) -> Features:
    """Vectors of every image, without gradient and in eval mode (restored afterwards).

    Call it on every process; all get everything, or with ``gather`` off each a share of its own.
    ``size`` is the side of the evaluation image in pixels, cut out of the middle once the shorter
    side is ``resize`` pixels (None: ``round(size * 256 / 224)``); None takes images as they are,
    which must then share one shape. ``batch_size`` images go through the backbone at a time in each
    process, read by ``workers`` loader processes of its own. ``device`` is the backbone's own if
    left out; given ("auto": this process's accelerator if there is one), the backbone is moved
    there. ``outputs``, ``layers`` and ``norm`` are as ``TokenReader`` takes them, of ``class`` and
    ``mean_patch``. What ``cache`` has is not extracted again.

    Raises ``DataError`` on every process if the dataset is empty, no sample can be decoded, shapes
    differ, or only some samples have a label.
    """
    if odd := sorted(set(outputs) - set(_VECTORS)):
        raise DataError(f"features are of {' and '.join(_VECTORS)}, not of {', '.join(odd)}")
    layers = TokenReader(backbone, outputs, layers, norm).layers
    parameter = next(backbone.parameters(), None)
    if device is not None:
        device = pick_device(device) if isinstance(device, str) else device
        backbone.to(device)
    elif parameter is not None:
        device = parameter.device
    dtype = parameter.dtype if parameter is not None else torch.float32

    also = [] if cache is None else [each for each in cache.also if each not in outputs]
    reader = TokenReader(backbone, [*outputs, *also], layers, norm)

    def embed(batch: Tensor) -> Mapping[str, Tensor]:
        pixels = normalize(batch.to(device, non_blocking=True), images)
        found: dict[str, Tensor] = reader(pixels.to(dtype))
        return {_full_name(reader, name): each for name, each in found.items()}

    def extract() -> Features:
        # Not inference_mode: what a backbone or its sharding caches could not be trained with.
        with evaluating(backbone), torch.no_grad():
            return _extract(embed, dataset, images, size, resize, batch_size, workers)

    names = {f"layer{n}.{each}": f"{reader.prefix(n)}{each}" for n in layers for each in outputs}
    if cache is None:
        share = extract()
    else:
        seen = {"images": images, "size": size, "resize": resize, "norm": norm, "dtype": dtype}
        share = cast(Features, cache.features(backbone, dataset, seen, list(names), extract))
    tokens = {short: share.tokens[name] for name, short in names.items()}
    share = evolve(share, tokens=tokens)
    return _gathered(share, device) if gather else share


def _full_name(reader: TokenReader, name: str) -> str:
    """``layer11.class``, where the reader of a single layer says ``class``."""
    return name if len(reader.layers) > 1 else f"layer{reader.layers[0]}.{name}"


def raw_pixels(
    dataset: Dataset,
    images: ImagesConfig,
    size: int | None,
    *,
    resize: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    gather: bool = True,
) -> Features:
    """The normalized pixels themselves as ``class``, [n, C * H * W]: what any network must beat.

    Arguments and errors as in :func:`extract_features`.
    """

    def embed(batch: Tensor) -> Mapping[str, Tensor]:
        return {"class": normalize(batch, images).flatten(1)}

    share = _extract(embed, dataset, images, size, resize, batch_size, workers)
    return _gathered(share, None) if gather else share


def _extract(
    embed: Callable[[Tensor], Mapping[str, Tensor]],
    dataset: Dataset,
    images: ImagesConfig,
    size: int | None,
    resize: int | None,
    batch_size: int,
    workers: int,
) -> Features:
    """This process's share."""
    total = len(dataset)
    shape = _shape(dataset, images, size)
    batches = rank_batches(total, batch_size)
    loader = InferenceLoader(
        dataset,
        FitSamples(ImageFit(images, 1, "native" if size is None else "crop", size, resize)),
        batches,
        collate=FittedImages.collate,
        workers=workers,
    )
    places = sum(map(len, batches))
    tokens: dict[str, Tensor] = {}
    indices: list[int] = []
    labels: list[object] = []
    several = _has_several_labels(dataset)
    corrupt: list[str] = []
    misfits: list[str] = []
    for batch in loader:
        misfits += [f"sample {index}: {error}" for index, error in batch.refused.items()]
        corrupt += [str(error) for error in batch.corrupt.values()]
        embedded = embed(_pixels(batch, shape, misfits))
        if not tokens:  # once: they may be most of the memory
            tokens = {name: torch.empty(places, each.shape[1]) for name, each in embedded.items()}
        if batch.data is None:
            continue
        start, stop = len(indices), len(indices) + len(batch.places)
        for name, each in embedded.items():
            tokens[name][start:stop] = each[list(batch.places)].float()
        indices += [batch.indices[place] for place in batch.places]
        labels += [each.get("labels" if several else "label") for each in batch.data.targets]
    skipped = agree_on_skipped(corrupt, misfits, total)
    found = len(indices)
    return Features(
        {name: each if found == places else each[:found].clone() for name, each in tokens.items()},
        _marks(labels, dataset.targets["labels"]) if several else _labels(labels),
        skipped,
        torch.tensor(indices, dtype=torch.int64),
        total - skipped,
    )


def _gathered(share: Features, device: torch.device | None) -> Features:
    """All that the processes have, on each of them, in the dataset's order."""
    if not collectives.is_distributed():
        return share
    counts = cast("list[int]", collectives.all_gather_object(len(share)))
    parts = {f"tokens.{name}": each for name, each in share.tokens.items()}
    parts["indices"] = share.indices
    if share.labels is not None:
        parts["labels"] = share.labels
    whole = {
        name: torch.empty(share.total, *part.shape[1:], dtype=part.dtype)
        for name, part in parts.items()
    }
    done = 0
    for start in range(0, max(counts), _GATHERED):
        sizes = [min(max(count - start, 0), _GATHERED) for count in counts]
        rows = sum(sizes)
        for name, part in parts.items():
            own = part[start : start + _GATHERED]
            padded = own.new_zeros(max(sizes), *part.shape[1:])
            padded[: len(own)] = own
            sent = padded.to(device) if device is not None else padded
            chunks = collectives.all_gather(sent).cpu().split(max(sizes))
            received = [chunk[:size] for chunk, size in zip(chunks, sizes, strict=True)]
            whole[name][done : done + rows] = torch.cat(received)
        done += rows
    order = whole["indices"].argsort()
    return evolve(
        share,
        tokens={name: whole[f"tokens.{name}"][order] for name in share.tokens},
        labels=whole["labels"][order] if share.labels is not None else None,
        indices=whole["indices"][order],
    )


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


def agree_on_skipped(corrupt: list[str], misfits: list[str], total: int) -> int:
    """Tell every process what each found: how many samples could not be decoded.

    Raises ``DataError`` on all of them or on none.
    """
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
    return skipped


def _has_several_labels(dataset: Dataset) -> bool:
    labels = dataset.targets.get("labels")
    return labels is not None and labels.kind == "class" and labels.per_object


def _marks(labels: Sequence[object], target: Target) -> Tensor:
    """bool [n, classes]: which classes each sample has."""
    marks = torch.zeros(len(labels), target.count or 0, dtype=torch.bool)
    for row, each in zip(marks, labels, strict=True):
        row[cast(Tensor, each)] = True
    return marks


def _labels(labels: Sequence[object]) -> Tensor | None:
    """int64 [n]; ``DataError`` on every process where only some samples have one."""
    counts = collectives.all_gather_object((labels.count(None), len(labels)))
    missing, total = (
        sum(each) for each in zip(*cast("list[tuple[int, int]]", counts), strict=True)
    )
    if missing == total:
        return None
    if missing:
        raise DataError(f"{missing:,} of {total:,} samples have no label, the others do")
    return torch.tensor(labels, dtype=torch.int64)
