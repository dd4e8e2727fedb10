"""Predict every pixel of images of any size: in windows, at several scales, mirrored.

The scores of all classes at the size of the truth are more than the network's own memory, and as
many again for each window that is added to them are most of the time. Here they are made for a
strip of rows after the other, from what the head gave for the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Dataset, Sample
from dinov3_framework.contracts.networks import Head
from dinov3_framework.contracts.running import Model
from dinov3_framework.data.bilinear import row_weights, weighted_rows
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.dense_views import Windows, coverage, resized_views
from dinov3_framework.data.features import agree_on_skipped
from dinov3_framework.data.inference import InferenceLoader, evaluating, rank_batches
from dinov3_framework.data.tokens import head_features
from dinov3_framework.errors import DataError, Problem
from dinov3_framework.runtime import collectives

_STRIP = 2**22  # scores of a strip, 16 MiB


class DensePredictor:
    """Predicts the pixels of one target of a model's head.

    Scores of windows are averaged, then resized (bilinear) to the truth. Over several views of an
    image, the scores of a ``mask`` become probabilities (softmax) before they are averaged; values
    of a ``map`` are averaged as they are. Sides that are no multiple of the patch size are padded
    with the mean color, and predictions cropped.
    """

    def __init__(self, model: Model, config: DenseInferenceConfig, target: str) -> None:
        """Raises ``DataError`` where they do not fit together: see :func:`dense_problems`."""
        for problem in dense_problems(model, config, target):
            raise DataError(f"{problem.where} {problem.message}\n    {problem.hint}")
        if model.head is None:
            raise TypeError("there is no head")
        self.model, self.config, self.target = model, config, target
        self.head: Head = model.head
        self.window = (config.window or model.size) if config.mode == "slide" else None
        self.stride = config.stride or (self.window or 1) * 2 // 3

    # ------------------------------------------------------------------ views
    def views(self, image: Tensor) -> list[Tensor]:
        """A raw image [C, H, W] as the model looks at it, float32 [C, h, w] for each scale.

        To be called in a loader worker. Raises ``DataError`` for another number of channels, and
        for images so thin that they would be resized to millions of pixels.
        """
        return resized_views(image, self.model.images, self.config)

    def windows(self, view: Tensor) -> Windows:
        """The windows on a view."""
        height, width = view.shape[-2:]
        return Windows.on(height, width, self.window, self.stride)

    def calls(self, views: Sequence[Tensor]) -> int:
        """How often the model is called for the views of an image."""
        turns = 2 if self.config.flip else 1
        return turns * sum(
            len(windows.tops) * -(-len(windows.lefts) // self.config.batch_size)
            for windows in map(self.windows, views)
        )

    def spend(self, calls: int) -> None:
        """Call the model on blank images, as others do it whose images take more calls."""
        side = 2 * self.model.backbone.patch_size
        blank = torch.zeros(1, self.model.images.channels, side, side)
        with torch.no_grad(), evaluating(self.model.backbone), evaluating(self.head):
            for _ in range(calls):
                self._outputs(blank)

    # ------------------------------------------------------------------ predictions
    def labels(self, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The class of each pixel, int64 [H, W] of ``size``, on the model's device."""
        # On the CPU max is twice as fast as argmax along the first axis.
        return torch.cat([strip.max(0).indices for strip in self.strips(views, size)])

    def values(self, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The value of each pixel, float32 [H, W] of ``size``, on the model's device."""
        return torch.cat([strip[0] for strip in self.strips(views, size)])

    def predict(self, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """``labels`` or ``values``, as the target's kind has it."""
        mask = self.head.targets[self.target].kind == "mask"
        return self.labels(views, size) if mask else self.values(views, size)

    @torch.no_grad()
    def strips(self, views: Sequence[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Scores [classes, rows, W] of strips of rows, from the top to the bottom."""
        turns = (False, True) if self.config.flip else (False,)
        target = self.head.targets[self.target]
        channels = 1 if target.kind == "map" else target.count or 1
        softmax = target.kind == "mask" and len(views) * len(turns) > 1
        with evaluating(self.model.backbone), evaluating(self.head):
            seen = [
                _View(self, view.flip(-1) if turn else view) for turn in turns for view in views
            ]
            widest = max(size[1], *(view.shape[-1] for view in views))
            rows = max(_STRIP // (channels * widest), 1)
            if self.head.predicts_rows:
                for each in seen:
                    each.keep()
            else:
                rows = size[0]
            for start in range(0, size[0], rows):
                stop = min(start + rows, size[0])
                total: Tensor | None = None
                for place, each in enumerate(seen):
                    scores = each.rows(size, start, stop)
                    if place >= len(views):
                        scores = scores.flip(-1)
                    if softmax:
                        scores = scores.softmax(0)
                    total = scores if total is None else total.add_(scores)
                if total is not None:
                    yield total.div_(len(seen)) if len(seen) > 1 else total

    def _outputs(self, pixels: Tensor) -> tuple[Any, tuple[int, int]]:
        """What the head puts out for normalized pixels, and the size that they were padded to."""
        first = next(self.model.backbone.parameters())
        patch = self.model.backbone.patch_size
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % patch, 0, -height % patch))  # 0 is the mean color
        pixels = pixels.to(first.device, first.dtype)
        features = head_features(self.model.backbone, pixels, self.head.needs)
        return self.head(features), features.image_size


@frozen
class _Batch:
    """What the head put out for some windows side by side."""

    top: int
    lefts: Sequence[int]
    outputs: Any
    padded: tuple[int, int]  # the size of the windows that the network saw


class _View:
    """One view of an image [C, h, w], and what the head says of its windows."""

    def __init__(self, predictor: DensePredictor, view: Tensor) -> None:
        self.predictor, self.view = predictor, view
        self.windows = predictor.windows(view)
        self.height, self.width = view.shape[-2:]
        device = next(predictor.model.backbone.parameters()).device
        self.down = coverage(self.height, self.windows.height, self.windows.tops).to(device)
        self.across = coverage(self.width, self.windows.width, self.windows.lefts).to(device)
        self.kept: list[_Batch] | None = None

    def keep(self) -> None:
        """Call the model, and keep what it gives."""
        self.kept = list(self._batches())

    def _batches(self) -> Iterator[_Batch]:
        windows, count = self.windows, self.predictor.config.batch_size
        for top in windows.tops:
            for first in range(0, len(windows.lefts), count):
                lefts = windows.lefts[first : first + count]
                rows = self.view[:, top : top + windows.height]
                pixels = torch.stack([rows[..., left : left + windows.width] for left in lefts])
                outputs, padded = self.predictor._outputs(pixels)
                yield _Batch(top, lefts, outputs, padded)

    def rows(self, size: tuple[int, int], start: int, stop: int) -> Tensor:
        """Scores [channels, stop - start, W] of some rows of the view resized to ``size``."""
        part = row_weights(self.height, size[0], start, stop)
        return weighted_rows(self._averaged(part.start, part.stop), part.weights, size[1])

    def _averaged(self, start: int, stop: int) -> Tensor:
        """Scores [channels, stop - start, w] of rows of the view, averaged over windows."""
        windows, band = self.windows, None
        for batch in self._batches() if self.kept is None else self.kept:
            first, last = max(start, batch.top), min(stop, batch.top + windows.height)
            if first >= last:
                continue
            scores = self._scores(batch, first - batch.top, last - batch.top)
            if windows.count == 1:
                return scores[0]
            if band is None:
                shape = (scores.shape[1], stop - start, self.width)
                band = scores.new_zeros(shape)
            for left, each in zip(batch.lefts, scores, strict=True):
                band[:, first - start : last - start, left : left + windows.width] += each
        if band is None:
            raise AssertionError("windows leave gaps")
        return band.mul_(1 / (self.down[start:stop, None] * self.across))

    def _scores(self, batch: _Batch, start: int, stop: int) -> Tensor:
        """float32 [windows, channels, stop - start, w] of rows of windows."""
        head, name = self.predictor.head, self.predictor.target
        if head.predicts_rows:
            scores = head.predict_rows(batch.outputs, batch.padded, start, stop)[name]
        else:
            scores = head.predict(batch.outputs, batch.padded)[name][..., start:stop, :]
        if head.targets[name].kind == "map":
            scores = scores[:, None]
        return scores[..., : self.windows.width].float()


def dense_problems(model: Model, config: DenseInferenceConfig, target: str) -> list[Problem]:
    """Why the pixels of ``target`` cannot be predicted so; keys are those of the config."""
    found = None if model.head is None else model.head.targets.get(target)
    if found is None or found.kind not in ("mask", "map"):
        what = "there is no head" if model.head is None else "the head predicts no such pixels"
        message = f"is {target!r}, and {what}"
        return [Problem("target", message, "give a head that was trained on it")]
    if config.mode == "whole":
        return []
    window, patch = config.window or model.size, model.backbone.patch_size
    if window is None:
        message = "nothing says how large windows are to be"
        return [Problem("window", message, "give window, in pixels")]
    if window % patch:
        message = f"{window} px are no multiple of the backbone's patch size {patch}"
        below = window // patch * patch
        return [Problem("window", message, f"take {below or patch} or {below + patch}")]
    if config.stride is not None and config.stride > window:
        message = f"leaves gaps between windows: {config.stride} is above {window}"
        return [Problem("stride", message, "take less")]
    return []


# --------------------------------------------------------------------------- whole datasets
@frozen
class DensePrediction:
    """What was predicted of one sample; on the CPU."""

    index: int
    name: str  # as the dataset calls it
    prediction: Tensor | None  # int64 [H, W] of a mask, float32 of a map; None where skipped
    targets: Mapping[str, Any]  # of the sample, as they are stored
    image_size: tuple[int, int]  # height and width of the image as it was read


def dense_predictions(
    model: Model,
    dataset: Dataset,
    config: DenseInferenceConfig,
    target: str,
    *,
    workers: int = 0,
    skip: Callable[[str], bool] | None = None,
) -> Iterator[DensePrediction]:
    """Predictions of a dataset's samples, at the size of the truth, or else of the image.

    To be iterated to its end by every process: each gets every sample of its share once, and all
    call the model equally often, as sharded networks want it. Samples whose names ``skip`` says
    yes to are read and not predicted. Samples that cannot be decoded are left out, and at the end
    reported as a warning. Raises ``DataError`` on every process where a sample does not fit.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset.describe()}: holds no images to evaluate")
    predictor = DensePredictor(model, config, target)
    loader = InferenceLoader(
        dataset,
        _Views(model.images, config, dataset, skip),
        rank_batches(len(dataset), 1),
        collate=_first,
        workers=workers,
    )
    corrupt: list[str] = []
    refused: list[str] = []
    for batch in loader:
        corrupt += map(str, batch.corrupt.values())
        refused += [f"sample {index}: {error}" for index, error in batch.refused.items()]
        seen, prediction, calls = batch.data, None, 0
        if seen is not None and seen.views is not None:
            calls = predictor.calls(seen.views)
            prediction = predictor.predict(seen.views, _size(seen, target)).cpu()
        if collectives.is_distributed():
            most = collectives.all_reduce_max(torch.tensor(calls))
            predictor.spend(int(most) - calls)
        if seen is not None:
            index = batch.indices[0]
            name = dataset.name(index)
            yield DensePrediction(index, name, prediction, seen.targets, seen.image_size)
    agree_on_skipped(corrupt, refused, len(dataset))


@frozen
class _Seen:
    views: list[Tensor] | None
    targets: Mapping[str, Any]
    image_size: tuple[int, int]


@frozen
class _Views:
    """Makes the views of a sample, in a loader worker."""

    images: ImagesConfig
    config: DenseInferenceConfig
    dataset: Dataset
    skip: Callable[[str], bool] | None

    def __call__(self, sample: Sample, index: int) -> _Seen:
        height, width = sample.image.shape[-2:]
        views = None
        if self.skip is None or not self.skip(self.dataset.name(index)):
            views = resized_views(sample.image, self.images, self.config)
        return _Seen(views, sample.targets, (height, width))


def _first(items: Sequence[_Seen]) -> _Seen:
    return items[0]


def _size(seen: _Seen, target: str) -> tuple[int, int]:
    """The size of the truth, where there is one."""
    truth = seen.targets.get(target)
    if not isinstance(truth, Tensor):
        return seen.image_size
    return truth.shape[-2], truth.shape[-1]
