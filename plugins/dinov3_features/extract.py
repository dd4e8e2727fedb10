"""A backbone's features of a dataset, part by part, by all processes.

Parts are dealt to the processes and computed in the same batches whoever computes them, so that
the files do not depend on the number of processes. A sharded backbone wants every process in each
of its forward passes: those that have no images left see blank ones until the others are done.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch
from attrs import define
from torch import Tensor

from dinov3_features.parts import PartStore, Row, Skipped, patch_offsets
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.data.images import ImageFit, normalize
from dinov3_framework.data.inference import (
    FitSamples,
    FittedImages,
    InferenceBatch,
    InferenceLoader,
    ProgressLines,
)
from dinov3_framework.data.tokens import TokenReader
from dinov3_framework.errors import DataError
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, broadcast_from_rank0, run_on_all_ranks
from dinov3_framework.runtime.stopping import StopFlag

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.features")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _FailedElsewhere(Exception):
    """Another process cannot go on; it reports itself why."""


@define(eq=False)
class Extraction:
    """Makes the parts that are missing; the same on every process."""

    reader: TokenReader
    dataset: Dataset
    fit: ImageFit
    store: PartStore
    dtype: torch.dtype  # of the features
    batch_size: int
    workers: int
    device: torch.device
    sharded: bool

    def run(self) -> None:
        """Write every part that is missing; to be called by all processes.

        Raises ``DataError`` for images that the backbone cannot take and for features that are not
        finite, ``OutputError`` if a part cannot be written, ``StopRequested`` after a signal; what
        happens on one process ends all of them.
        """
        todo = broadcast_from_rank0(self.store.missing)
        world, rank = collectives.world_size(), collectives.rank()
        mine = {part: self._split(part) for part in todo[rank::world]}
        loader = InferenceLoader(
            self.dataset,
            FitSamples(self.fit),
            [indices for batches in mine.values() for indices in batches],
            collate=FittedImages.collate,
            workers=self.workers,
        )
        progress = ProgressLines(
            sum(len(indices) for batches in mine.values() for indices in batches), log
        )
        turns: list[int | None] = [*mine, None]
        with StopFlag() as stop, torch.no_grad(), closing(iter(loader)) as batches:

            def make(part: int | None) -> None:
                """Make a part; None: take part in the others' forward passes."""
                error: Exception | None = None
                try:
                    if part is not None:
                        self._make(part, len(mine[part]), batches, stop)
                        progress.add(len(self.store.partition.indices(part)))
                except _FailedElsewhere:
                    return
                except Exception as raised:
                    error = raised
                if self.sharded:
                    while self._anybody(has_images=False, failed=error is not None):
                        self._blank_pass()
                if error is not None:
                    raise error

            # In turns, so that nobody waits in a collective for longer than a part takes.
            for turn in range(-(-len(todo) // world)):
                with OwnErrors():
                    run_on_all_ranks(make, turns[turn])

    def _split(self, part: int) -> list[range]:
        indices, size = self.store.partition.indices(part), self.batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _make(
        self,
        part: int,
        count: int,
        batches: Iterator[InferenceBatch[FittedImages]],
        stop: StopFlag,
    ) -> None:
        """Make a part of the next ``count`` batches."""
        name, features = self.dataset.name, []
        rows: list[Row] = []
        skipped: list[Skipped] = []
        read = itertools.islice(batches, count)
        while (batch := stop.limited(next, read, None)) is not None:
            if stop:
                parts = self.store.partition.parts
                raise stop.stopped(f"{parts - len(self.store.missing())} of {parts} parts")
            for index, error in batch.refused.items():
                raise DataError(f"{name(index)}: {error}")
            skipped += [Skipped(i, name(i), each.reason) for i, each in batch.corrupt.items()]
            if batch.data is not None:
                seen = self._rows(batch, batch.data)
                features += self._features(batch.data, seen)
                rows += seen
        self.store.write(part, self._stacked(features), rows, skipped)

    def _rows(self, batch: InferenceBatch[FittedImages], images: FittedImages) -> list[Row]:
        dataset, patch = self.dataset, self.fit.patch_size
        rows = []
        for place, size, (_, height, width), targets in zip(
            batch.places, images.sizes, images.shapes, images.targets, strict=True
        ):
            index, label = batch.indices[place], targets.get("label")
            label = None if label is None else int(label)
            rows.append(
                Row(index, dataset.name(index), label, *size, height // patch, width // patch)
            )
        return rows

    def _features(self, images: FittedImages, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        """Of each image, by name; images of one shape pass the backbone together."""
        found: list[dict[str, Tensor]] = [{} for _ in rows]
        for places, pixels in images.by_shape():
            if self.sharded:
                self._anybody(has_images=True, failed=False)
            for name, tensor in self._read(pixels).items():
                stored = tensor.to(self.dtype)
                if not stored.isfinite().all():
                    raise DataError(_not_finite(name, tensor, [rows[place] for place in places]))
                for place, values in zip(places, stored.cpu(), strict=True):
                    found[place][name] = values
        return found

    def _read(self, images: Tensor) -> dict[str, Tensor]:
        try:
            pixels = normalize(images.to(self.device, non_blocking=True), self.fit.images)
            first = next(self.reader.parameters(), pixels)
            named: dict[str, Tensor] = self.reader(pixels.to(first.dtype))
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{len(images)} images of {images.shape[2]} x {images.shape[3]} pixels are too "
                "much for the device's memory; lower batch_size, or give a (smaller) size"
            ) from error
        return named

    # ------------------------------------------------------------------ sharded
    def _anybody(self, *, has_images: bool, failed: bool) -> bool:
        """Before each forward pass of a sharded backbone: whether there is one.

        Raises ``_FailedElsewhere`` on those that could go on but for another process.
        """
        flags = torch.tensor([has_images, failed], dtype=torch.int64)
        anybody, trouble = collectives.all_reduce_max(flags).tolist()
        if trouble and not failed:
            raise _FailedElsewhere
        return bool(anybody) and not trouble

    def _blank_pass(self) -> None:
        fit = self.fit
        side = fit.patch_size if fit.ragged or fit.size is None else fit.size
        self._read(torch.zeros(1, fit.images.channels, side, side, dtype=torch.uint8))

    # ------------------------------------------------------------------ parts
    def _stacked(self, features: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of a part; grids that differ become one sequence of patches."""
        stacked = {}
        for name in features[0] if features else ():
            values = [each[name] for each in features]
            if name.endswith("patches") and self.fit.ragged:
                grids = torch.tensor([value.shape[:2] for value in values])
                prefix = name.removesuffix("patches")
                stacked[name] = torch.cat([value.flatten(0, 1) for value in values])
                stacked[f"{prefix}grids"] = grids
                stacked[f"{prefix}offsets"] = patch_offsets(grids)
            else:
                stacked[name] = torch.stack(values)
        return stacked


def _not_finite(name: str, tensor: Tensor, rows: Sequence[Row]) -> str:
    if tensor.isfinite().all():
        largest = tensor.abs().max().item()
        return (
            f"{name} of {rows[0].name} or an image near it reaches {largest:.3g}, which is beyond "
            'fp16; take dtype = "bf16" or "fp32"'
        )
    bad = next(
        row.name for row, values in zip(rows, tensor, strict=True) if not values.isfinite().all()
    )
    return f"{name} of {bad} is not finite; weights or parallel.param_dtype may be the cause"
