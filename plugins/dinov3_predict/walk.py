"""What a head predicts of each image of a dataset, by the kind of its target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from attrs import evolve, frozen
from torch import Tensor

from dinov3_framework import DataError, Dataset, Model, Sample, Transform, collectives, normalize
from dinov3_framework.data.dense import dense_predictions
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.images import ImageFit
from dinov3_framework.data.predictions import predictions
from dinov3_framework.data.saved_predictions import SavedPredictions

_IMAGE, _INDEX, _HEIGHT, _WIDTH = "predict.image", "predict.index", "predict.h", "predict.w"


@frozen
class Predicted:
    """What was predicted of one image; on the CPU."""

    index: int
    prediction: Tensor  # int64 [H, W] of a mask, float32 [H, W] of a map, [classes] of a class
    size: tuple[int, int]  # height and width of the image
    seconds: float | None  # None where the prediction was there from before
    image: Tensor | None = None  # as it was read, if it was asked for


@frozen
class Walk:
    """Walks a dataset with a model; of each process its share, every image once."""

    model: Model
    dataset: Dataset
    target: str
    inference: DenseInferenceConfig
    batch_size: int = 32
    workers: int = 0

    def __call__(
        self, saved: SavedPredictions | None = None, wanted: Callable[[int], bool] | None = None
    ) -> Iterator[Predicted]:
        """Predictions in any order, to be iterated to their end by every process.

        Those of masks and maps that ``saved`` holds are read, all others written there. With them
        come the images whose index is ``wanted``. What cannot be decoded is left out; if that is
        all, ``DataError`` is raised on every process.
        """
        head: Any = self.model.head
        kind = head.targets[self.target].kind
        return self._classes(wanted) if kind == "class" else self._pixels(saved, wanted)

    def _pixels(
        self, saved: SavedPredictions | None, wanted: Callable[[int], bool] | None
    ) -> Iterator[Predicted]:
        head: Any = self.model.head
        target = head.targets[self.target]
        walked = dense_predictions(
            self.model,
            _Unlabeled(self.dataset, wanted),
            self.inference,
            self.target,
            workers=self.workers,
            skip=None if saved is None else saved.has,
        )
        damaged: list[str] = []
        for each, seconds in _timed(walked):
            prediction, took = each.prediction, None
            if prediction is not None:
                took = seconds
                if saved is not None:
                    saved.write(each.name, prediction, target)
            elif saved is not None:
                try:
                    prediction = saved.read(each.name)
                except DataError as error:
                    damaged.append(str(error))
                    continue
            else:
                raise TypeError("skipped, and nothing is saved")
            image = each.targets.get(_IMAGE)
            yield Predicted(each.index, prediction, each.image_size, took, image)
        # Not before all are through: the others would wait for this process.
        for found in cast("list[list[str]]", collectives.all_gather_object(damaged[:1])):
            if found:
                raise DataError(found[0])

    def _classes(self, wanted: Callable[[int], bool] | None) -> Iterator[Predicted]:
        if self.model.size is None:
            raise DataError("nothing says how large the images of the head's training were")
        walked = predictions(
            self.model,
            _Numbered(self.dataset),
            _Cropped(self.model),
            batch_size=self.batch_size,
            workers=self.workers,
        )
        for (predicted, targets), seconds in _timed(walked):
            scores = predicted[self.target].float().softmax(-1).cpu()
            places = [targets[name].tolist() for name in (_INDEX, _HEIGHT, _WIDTH)]
            for prediction, index, *size in zip(scores, *places, strict=True):
                image = self.dataset[index].image if wanted is not None and wanted(index) else None
                took = seconds / len(scores)
                yield Predicted(index, prediction, (size[0], size[1]), took, image)


def _timed(items: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Each of them, with the seconds that were waited for it."""
    while True:
        started = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, time.perf_counter() - started


class _Unlabeled(Dataset):
    """Whatever a dataset knows, predictions have the size of the image."""

    def __init__(self, dataset: Dataset, wanted: Callable[[int], bool] | None = None) -> None:
        self.dataset, self.wanted = dataset, wanted

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        is_wanted = self.wanted is not None and self.wanted(index)
        return evolve(sample, targets={_IMAGE: sample.image} if is_wanted else {})

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def describe(self) -> str:
        return self.dataset.describe()


class _Numbered(_Unlabeled):
    """Samples say which they are, and how large."""

    def __getitem__(self, index: int) -> Sample:
        image = self.dataset[index].image
        height, width = image.shape[-2:]
        return Sample(image, {_INDEX: index, _HEIGHT: height, _WIDTH: width})


class _Cropped(Transform):
    """The middle of an image, as evaluations look at it."""

    def __init__(self, model: Model) -> None:
        self.fit = ImageFit(model.images, model.backbone.patch_size, "crop", model.size)
        self.size = (model.size or 0, model.size or 0)

    def __call__(self, sample: Sample) -> Sample:
        return evolve(sample, image=normalize(self.fit(sample.image), self.fit.images))
