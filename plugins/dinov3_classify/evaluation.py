"""k-NN evaluation of backbones on one pair of datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from attrs import frozen

from dinov3_classify.configs import KnnSettings
from dinov3_classify.knn import knn_classify
from dinov3_framework import (
    Backbone,
    CorruptSampleError,
    Dataset,
    Features,
    ImagesConfig,
    Problem,
    RecipeError,
    extract_features,
    raw_pixels,
)


@frozen
class KnnEvaluation:
    """The datasets of an evaluation, and how images are shown to a backbone."""

    settings: KnnSettings
    train: Dataset
    test: Dataset
    n_classes: int
    images: ImagesConfig
    size: int | None

    @classmethod
    def build(
        cls,
        settings: KnnSettings,
        build: Callable[..., Any],
        images: ImagesConfig,
        size: int | None,
    ) -> KnnEvaluation:
        """Build the datasets with ``build(config, **runtime)``.

        ``images`` and ``size`` are those of ``extract_features``. Raises ``DataError`` for a
        dataset that is not there and ``RecipeError`` for two that do not fit.
        """
        train = build(settings.train, channels=images.channels)
        test = build(settings.test, channels=images.channels)
        problems = list(_misfits(settings, train, test))
        if problems:
            raise RecipeError(problems)
        n_classes = max(train.n_classes, test.n_classes)
        return cls(settings, train, test, n_classes, images, size)

    def backbone(self, backbone: Backbone, device: torch.device | str | None = None) -> KnnResult:
        """How well class tokens do. Call it on every process; see ``extract_features``."""
        shared: dict[str, Any] = {
            "images": self.images,
            "size": self.size,
            "batch_size": self.settings.batch_size,
            "workers": self.settings.workers,
            "device": device,
        }
        return self._classify(
            extract_features(backbone, self.train, **shared),
            extract_features(backbone, self.test, **shared),
            next((parameter.device for parameter in backbone.parameters()), None),
        )

    def raw_pixels(self) -> KnnResult | None:
        """How well the pixels themselves do, or None if they are over the limit."""
        per_image = 4 * self.images.channels * self._pixels()
        if per_image * (len(self.train) + len(self.test)) > self.settings.raw_pixels_limit * 2**20:
            return None
        batch_size, workers = self.settings.batch_size, self.settings.workers
        train, test = (
            raw_pixels(dataset, self.images, self.size, batch_size=batch_size, workers=workers)
            for dataset in (self.train, self.test)
        )
        return self._classify(train, test, None)

    def _classify(self, train: Features, test: Features, device: torch.device | None) -> KnnResult:
        accuracy = knn_classify(
            train,
            test,
            k=self.settings.k,
            temperature=self.settings.temperature,
            n_classes=self.n_classes,
            device=device,
        )
        metrics = {f"knn@{k}": round(100 * value, 4) for k, value in accuracy.items()}
        return KnnResult(metrics, train.skipped, test.skipped)

    def _pixels(self) -> int:
        """Pixels of one evaluation image."""
        if self.size is not None:
            return self.size**2
        for index in range(len(self.train)):
            try:
                return int(self.train[index].image[0].numel())
            except CorruptSampleError:
                continue
        return 0  # nothing is readable, which the evaluation itself will say


@frozen
class KnnResult:
    """Accuracies in percent by ``knn@<k>``, and how many images could not be read."""

    metrics: Mapping[str, float]
    train_skipped: int
    test_skipped: int

    def row(self, features: str) -> dict[str, Any]:
        """A row of the table of results: what the features are, and rounded accuracies."""
        return {"features": features, **{k: round(v, 1) for k, v in self.metrics.items()}}


def _misfits(settings: KnnSettings, train: Dataset, test: Dataset) -> Iterator[Problem]:
    """What makes an evaluation of these datasets impossible or meaningless."""
    for where, dataset in (("train", train), ("test", test)):
        if dataset.n_classes is None:
            yield Problem(where, f"k-NN needs labels; {dataset.describe()}")
    if max(settings.k) > len(train):
        yield Problem(
            "k",
            f"{max(settings.k)} neighbours are asked for, the training set has {len(train):,} "
            f"images: {train.describe()}",
        )
    ours, theirs = (getattr(dataset, "classes", None) for dataset in (train, test))
    if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        what = f"{', '.join(odd[:5])} in one of them only" if odd else "in another order"
        yield Problem(
            "test",
            f"its classes are not those of train: {what}",
            "list the same classes in both, so that a label means the same (image_folder: classes)",
        )
