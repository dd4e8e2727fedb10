"""Batches of features that were extracted once, and their extraction.

All is extracted before the first step, in chunks of the dataset's order: the features of a sample
depend on its chunk alone, whatever the processes, workers, batches and the step that a run goes on
from. Filled on the way instead, with what the first pass over the data comes by, a run that was
killed would see other bits after it, since a matrix product of another batch rounds otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from attrs import evolve, frozen
from torch import Tensor

from dinov3_framework import Backbone, DataError, Dataset, FeatureNeeds, HeadFeatures, Sample
from dinov3_framework import Transform as JointTransform
from dinov3_framework.data.inference import InferenceBatch, InferenceLoader, ProgressLines
from dinov3_framework.data.loader import BatchMaker, TransformedBatches, changed_tensors
from dinov3_framework.data.tokens import head_features
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, broadcast_from_rank0, run_on_all_ranks
from dinov3_heads.feature_chunks import PARTS, Chunk, ChunkStore, StoredSample

log = logging.getLogger(__name__)


@frozen
class FeatureBatch:
    """Features and targets of a batch; a ``contracts.training.Batch``.

    ``dtype`` is the one that the features were computed in.
    """

    features: HeadFeatures
    dtype: torch.dtype
    targets: Mapping[str, Any]
    corrupt: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.features.maps[0])

    def to(self, device: torch.device) -> FeatureBatch:
        return self.changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> FeatureBatch:
        return self.changed(Tensor.pin_memory)

    def as_computed(self) -> HeadFeatures:
        """The features in the dtype that the backbone gives."""
        return changed_features(self.features, lambda tensor: tensor.to(self.dtype))

    def changed(self, change: Callable[[Tensor], Tensor]) -> FeatureBatch:
        """The same with every tensor changed."""
        features = changed_features(self.features, change)
        return evolve(self, features=features, targets=changed_tensors(self.targets, change))


def changed_features(features: HeadFeatures, change: Callable[[Tensor], Tensor]) -> HeadFeatures:
    """The same with every tensor changed, without an image."""
    parts = {part: [change(each) for each in getattr(features, part)] for part in PARTS}
    return HeadFeatures(**parts, image_size=features.image_size)


class ReusedBatches(BatchMaker[StoredSample, FeatureBatch]):
    """Batches of what a store has, of the same samples in the same order as ``transformed``."""

    store: ChunkStore  # given before the first batch is asked for

    def __init__(self, transformed: TransformedBatches, workers: int) -> None:
        super().__init__(transformed.dataset, transformed.layout, transformed.seed, workers)
        self.transformed = transformed

    def read(self, index: int) -> StoredSample:
        return self.store[index]

    def prepare(self, sample: Any, place: int, step: int) -> StoredSample:
        return cast(StoredSample, sample)

    def collate(
        self, items: Sequence[StoredSample], step: int, micro: int, corrupt: tuple[str, ...]
    ) -> FeatureBatch:
        no_image = torch.empty(0)
        samples = [Sample(no_image, item.targets) for item in items]
        parts = {
            part: [_stacked(each) for each in zip(*(getattr(i, part) for i in items), strict=True)]
            for part in PARTS
        }
        features = HeadFeatures(**parts, image_size=items[0].image_size)
        targets = self.transformed.transform.collate(samples).targets
        return FeatureBatch(features, items[0].dtype, targets, corrupt)

    def first_samples(self, count: int) -> Mapping[str, Tensor]:
        return self.transformed.first_samples(count)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """A batch of features; maps whose channels lie together lie so in [B, D, h, w], too."""
    if rows[0].ndim == 3 and rows[0].stride(0) == 1:
        return torch.stack([each.permute(1, 2, 0) for each in rows]).permute(0, 3, 1, 2)
    return torch.stack(list(rows))


def blank_batch(
    one: HeadFeatures, targets: Mapping[str, Any], count: int, dtype: torch.dtype | None
) -> FeatureBatch:
    """A batch of ``count`` times the shapes of features of one image, for an estimate."""

    def empty(each: Tensor) -> Tensor:
        return torch.empty(count, *each.shape[1:], dtype=dtype or each.dtype)

    return FeatureBatch(changed_features(one, empty), one.maps[0].dtype, targets)


# --------------------------------------------------------------------------- extraction
@frozen
class _Transformed:
    """What a transform that draws nothing makes of a sample."""

    transform: JointTransform

    def __call__(self, sample: Sample, index: int) -> tuple[int, Sample]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return index, self.transform(sample)


def fill(
    store: ChunkStore,
    backbone: Backbone,
    needs: FeatureNeeds,
    batches: TransformedBatches,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype | None,
    device: torch.device,
    workers: int,
) -> None:
    """Extract what a store lacks, each process its share of the chunks.

    To be called by every process; all call the backbone equally often. ``shape`` is that of the
    images, [C, H, W]; ``dtype`` the one that features are kept in, None for that of the backbone.
    Raises ``DataError`` on all processes where a sample cannot be used.
    """
    dataset = cast(Dataset, batches.dataset)
    missing = broadcast_from_rank0(store.missing)
    if not missing:
        return
    world, rank = collectives.world_size(), collectives.rank()
    mine = [*missing[rank::world]]
    rounds = -(-len(missing) // world)
    nothing = range(len(dataset), len(dataset) + store.size)  # of a process that has no chunk left
    asked: list[Sequence[int]] = [store.indices(number) for number in mine]
    asked += [nothing] * (rounds - len(mine))
    loader: InferenceLoader[tuple[int, Sample], Mapping[int, Sample]] = InferenceLoader(
        dataset, _Transformed(batches.transform), asked, collate=dict, workers=workers
    )
    progress = ProgressLines(sum(len(store.indices(number)) for number in mine), log)
    for turn, batch in enumerate(loader):
        images = torch.zeros(store.size, *shape)  # of one size always, with what that rounds to
        with OwnErrors():
            run_on_all_ranks(_put, images, batch, dataset)
        with torch.no_grad():
            features = head_features(backbone, images.to(device), needs)
        number = mine[turn] if turn < len(mine) else None
        with OwnErrors():
            chunk = run_on_all_ranks(_chunk, number, features, batch, dtype)
            _share(store, number, chunk)
        progress.add(len(batch.indices) if number is not None else 0)
    if store.shared:
        with OwnErrors():
            run_on_all_ranks(_find_all, store)


def _put(images: Tensor, batch: InferenceBatch[Mapping[int, Sample]], dataset: Dataset) -> None:
    """Put a batch's images in their places."""
    for index, error in batch.refused.items():
        raise DataError(f"sample {index} ({dataset.name(index)}): {error}")
    for row, (index, sample) in enumerate((batch.data or {}).items()):
        if sample.image.shape != images.shape[1:]:
            raise DataError(
                f"sample {index} ({dataset.name(index)}): an image of {list(sample.image.shape)} "
                f"where the transform promises {list(images.shape[1:])}"
            )
        images[row] = sample.image


def _chunk(
    number: int | None,
    features: HeadFeatures,
    batch: InferenceBatch[Mapping[int, Sample]],
    dtype: torch.dtype | None,
) -> Chunk | None:
    if number is None:
        return None
    samples = dict(batch.data or {})
    return Chunk.of(features if samples else None, samples, batch.corrupt, dtype)


def _share(store: ChunkStore, number: int | None, chunk: Chunk | None) -> None:
    """Put a chunk into the store of every process."""
    if store.shared or not collectives.is_distributed():
        if chunk is not None and number is not None:
            run_on_all_ranks(store.add, number, chunk)
        else:
            run_on_all_ranks(lambda: None)
        return
    sent = None if chunk is None else (number, chunk.to_bytes())
    for each in cast("list[tuple[int, bytes] | None]", collectives.all_gather_object(sent)):
        if each is not None:
            store.add(each[0], Chunk.from_bytes(each[1]))


def _find_all(store: ChunkStore) -> None:
    """Raise where a file that another process has written is not seen here."""
    for number in store.missing():
        store.chunk(number)
