"""A backbone's features of a dataset, part by part, by all processes.

Parts are dealt to the processes and computed in the same batches whoever computes them, so that
the files do not depend on the number of processes. A sharded backbone wants every process in each
of its passes: those that have no images left see blank ones until the others are done.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence

import torch
from attrs import Factory, define, frozen
from torch import Tensor

from dinov3_features.parts import PartStore, Row, Skipped, patch_offsets
from dinov3_features.reading import ReadBatch, batches
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.data.fit import ImageFit
from dinov3_framework.data.images import normalize
from dinov3_framework.data.tokens import TokenReader
from dinov3_framework.errors import DataError, ExitCode, StopRequested
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, from_main, together
from dinov3_framework.runtime.stopping import StopFlag

log = logging.getLogger("dinov3_framework.features")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SECONDS_BETWEEN_LINES = 10.0


@frozen
class Extraction:
    """What is computed, and how."""

    reader: TokenReader
    dataset: Dataset
    fit: ImageFit
    dtype: torch.dtype  # of the features
    batch_size: int
    workers: int
    device: torch.device
    sharded: bool


class _FailedElsewhere(Exception):
    """Another process cannot go on; it says itself why."""


@define
class _Collected:
    """What a part will hold."""

    tensors: list[dict[str, Tensor]] = Factory(list)  # by row
    rows: list[Row] = Factory(list)
    skipped: list[Skipped] = Factory(list)


def extract_parts(extraction: Extraction, store: PartStore) -> None:
    """Write every part that is missing; to be called by all processes.

    Raises ``DataError`` for images that the backbone cannot take and for features that are not
    finite, ``OutputError`` if a part cannot be written, ``StopRequested`` after a signal; what
    happens on one process ends all of them.
    """
    todo = from_main(store.missing)
    world, rank = collectives.world_size(), collectives.rank()
    mine = todo[rank::world]
    with StopFlag() as stop, torch.no_grad():
        maker = _PartMaker(extraction, store, stop, mine)
        # In turns, so that nobody waits in a collective for longer than a part takes.
        for turn in range(-(-len(todo) // world)):
            part = mine[turn] if turn < len(mine) else None
            try:
                together(maker.make, part)
            except RankFailure as failure:
                raise failure.for_process() from failure.own


class _PartMaker:
    """Makes this process's parts, in order."""

    def __init__(
        self, extraction: Extraction, store: PartStore, stop: StopFlag, parts: Sequence[int]
    ) -> None:
        self.extraction, self.store, self.stop = extraction, store, stop
        parameter = next(extraction.reader.parameters(), None)
        self.input_dtype = torch.float32 if parameter is None else parameter.dtype
        self.indices = {part: self._batches_of(part) for part in parts}
        flat = [indices for part in parts for indices in self.indices[part]]
        loader = batches(extraction.dataset, extraction.fit, flat, extraction.workers)
        self.loader = iter(loader)
        self.progress = _Progress(sum(map(len, flat)))

    def _batches_of(self, part: int) -> list[range]:
        indices, size = self.store.plan.indices(part), self.extraction.batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def make(self, part: int | None) -> None:
        """Make a part; None: take part in the others' passes."""
        error: Exception | None = None
        try:
            if part is not None:
                self._make(part)
        except _FailedElsewhere:
            return
        except Exception as raised:
            error = raised
        if self.extraction.sharded:
            while self._anybody(has_images=False, failed=error is not None):
                self._blank_pass()
        if error is not None:
            raise error

    def _make(self, part: int) -> None:
        collected = _Collected()
        for _ in self.indices[part]:
            batch = self._next_batch()
            if batch.misfit is not None:
                raise DataError(batch.misfit)
            self._add(collected, batch)
        self.store.write(part, self._stacked(collected), collected.rows, collected.skipped)
        self.progress.add(len(self.store.plan.indices(part)))

    def _next_batch(self) -> ReadBatch:
        try:
            batch: ReadBatch = next(self.loader)
        except RuntimeError as error:
            if not self.stop:  # a signal to the whole group ends loader workers first
                raise DataError(f"the images could not be read: {error}") from error
        if self.stop:
            raise self._stopped()
        return batch

    def _stopped(self) -> StopRequested:
        stopped = StopRequested(
            f"Stopped; {self.store.plan.parts - len(self.store.missing())} of "
            f"{self.store.plan.parts} parts are written, the same command goes on from there."
        )
        if self.stop.received == signal.SIGINT:
            stopped.exit_code = ExitCode.INTERRUPTED
        return stopped

    def _add(self, collected: _Collected, batch: ReadBatch) -> None:
        rows: list[dict[str, Tensor]] = [{} for _ in batch.rows]
        for places, images in batch.by_shape():
            if self.extraction.sharded:
                self._anybody(has_images=True, failed=False)
            for name, tensor in self._features(images, [batch.rows[i] for i in places]).items():
                for place, values in zip(places, tensor, strict=True):
                    rows[place][name] = values
        collected.tensors += rows
        collected.rows += batch.rows
        collected.skipped += batch.skipped

    def _features(self, images: Tensor, rows: Sequence[Row]) -> dict[str, Tensor]:
        features = {}
        for name, tensor in self._read(images).items():
            stored = tensor.to(self.extraction.dtype)
            if not stored.isfinite().all():
                raise DataError(_not_finite(name, tensor, rows))
            features[name] = stored.cpu()
        return features

    def _read(self, images: Tensor) -> dict[str, Tensor]:
        try:
            pixels = images.to(self.extraction.device, non_blocking=True)
            pixels = normalize(pixels, self.extraction.fit.images).to(self.input_dtype)
            named: dict[str, Tensor] = self.extraction.reader(pixels)
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{len(images)} images of {images.shape[2]} x {images.shape[3]} pixels are too "
                "much for the device's memory; lower batch_size, or give a (smaller) size"
            ) from error
        return named

    # ------------------------------------------------------------------ sharded
    def _anybody(self, *, has_images: bool, failed: bool) -> bool:
        """Before each pass of a sharded backbone: whether there is one.

        Raises ``_FailedElsewhere`` on those that could go on but for another process.
        """
        flags = torch.tensor([has_images, failed], dtype=torch.int64)
        anybody, trouble = collectives.all_reduce_max(flags).tolist()
        if trouble and not failed:
            raise _FailedElsewhere
        return bool(anybody) and not trouble

    def _blank_pass(self) -> None:
        fit = self.extraction.fit
        side = fit.patch_size if fit.ragged or fit.size is None else fit.size
        self._read(torch.zeros(1, fit.images.channels, side, side, dtype=torch.uint8))

    # ------------------------------------------------------------------ parts
    def _stacked(self, collected: _Collected) -> dict[str, Tensor]:
        """Tensors of a part; grids that differ become one sequence of patches."""
        if not collected.tensors:
            return {}
        stacked = {}
        for name in collected.tensors[0]:
            values = [row[name] for row in collected.tensors]
            if name.endswith("patches") and self.extraction.fit.ragged:
                grids = torch.tensor([value.shape[:2] for value in values])
                prefix = name.removesuffix("patches")
                stacked[name] = torch.cat([value.flatten(0, 1) for value in values])
                stacked[f"{prefix}grids"] = grids
                stacked[f"{prefix}offsets"] = patch_offsets(grids)
            else:
                stacked[name] = torch.stack(values)
        return stacked


class _Progress:
    """A line now and then, of the main process's own share."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total
        self.started = self.said = time.monotonic()

    def add(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        if now - self.said < _SECONDS_BETWEEN_LINES and self.done < self.total:
            return
        self.said = now
        rate = self.done / max(now - self.started, 1e-9)
        share = " of this process" if collectives.is_main() and collectives.world_size() > 1 else ""
        log.info("%d/%d images%s  %.1f images/s", self.done, self.total, share, rate)


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
