"""k-NN evaluation of backbones on one pair of datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dinov3_classify import KnnConfig
from dinov3_classify.knn import knn_classify
from dinov3_framework import (
    CorruptSampleError,
    DataError,
    Dataset,
    Evaluation,
    Features,
    ImagesConfig,
    Model,
    Problem,
    RecipeError,
    extract_features,
    raw_pixels,
)
from dinov3_framework.data.workers import memory_complaint
from dinov3_framework.runtime.processes import environment_world_size


class KnnEvaluation(Evaluation):
    """How well the nearest training images tell the classes of the test images."""

    train: Dataset
    test: Dataset

    def __init__(self, config: KnnConfig) -> None:
        self.config = config
        self.skipped = {"train": 0, "test": 0}

    def prepare(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        self.train = build(self.config.train, channels=images.channels)
        self.test = build(self.config.test, channels=images.channels)
        if problems := list(self._misfits()):
            raise RecipeError(problems)

    def problems(self, model: Model) -> list[Problem]:
        batch = self.config.batch_size * model.images.channels * (self._size(model) or 0) ** 2
        processes = environment_world_size() or 1
        if lack := memory_complaint(batch, workers=self.config.workers, processes=processes):
            raise DataError(lack)
        size, patch = self.config.size, model.backbone.patch_size
        if size is None or size % patch == 0:
            return []
        lower = max(size // patch, 1) * patch
        message = f"{size} px are no multiple of the backbone's patch size {patch}"
        return [Problem("size", message, f"take {lower} or {lower + patch}")]

    def run(self, model: Model) -> Mapping[str, float]:
        train, test = (
            extract_features(model.backbone, dataset, **self._shown(model))
            for dataset in (self.train, self.test)
        )
        self.skipped = {"train": train.skipped, "test": test.skipped}
        device = next((parameter.device for parameter in model.backbone.parameters()), None)
        return self._classify(train, test, device)

    def baselines(self, model: Model) -> Mapping[str, Mapping[str, float]]:
        """Raw pixels, if they are within the limit."""
        per_image = 4 * model.images.channels * self._pixels(self._size(model))
        if per_image * (len(self.train) + len(self.test)) > self.config.raw_pixels_limit * 2**20:
            return {}
        train, test = (
            raw_pixels(dataset, **self._shown(model)) for dataset in (self.train, self.test)
        )
        return {"raw pixels": self._classify(train, test, None)}

    def protocol(self, model: Model) -> Mapping[str, Any]:
        size = self._size(model)
        return {
            "similarity": "cosine",
            "size": "as they are" if size is None else size,
            "temperature": self.config.temperature,
            **{f"unreadable in {name}": count for name, count in self.skipped.items() if count},
        }

    def data(self) -> str:
        return f"{self.train.describe()}; classified: {self.test.describe()}"

    # ------------------------------------------------------------------ parts
    def _size(self, model: Model) -> int | None:
        return self.config.size or model.size

    def _shown(self, model: Model) -> dict[str, Any]:
        """How images are shown to a backbone."""
        return {
            "images": model.images,
            "size": self._size(model),
            "batch_size": self.config.batch_size,
            "workers": self.config.workers,
        }

    def _classify(
        self, train: Features, test: Features, device: torch.device | None
    ) -> dict[str, float]:
        accuracy = knn_classify(
            train,
            test,
            k=self.config.k,
            temperature=self.config.temperature,
            n_classes=max(self.train.n_classes or 0, self.test.n_classes or 0),
            device=device,
        )
        return {f"knn@{k}": round(100 * value, 4) for k, value in accuracy.items()}

    def _pixels(self, size: int | None) -> int:
        """Pixels of one evaluation image."""
        if size is not None:
            return size**2
        for index in range(len(self.train)):
            try:
                return int(self.train[index].image[0].numel())
            except CorruptSampleError:
                continue
        return 0  # nothing is readable, which the evaluation itself will report

    def _misfits(self) -> Iterator[Problem]:
        """What makes an evaluation of these datasets impossible or meaningless."""
        train, test, k = self.train, self.test, max(self.config.k)
        for where, dataset in (("train", train), ("test", test)):
            if dataset.n_classes is None:
                yield Problem(where, f"k-NN needs labels; {dataset.describe()}")
        if k > len(train):
            message = f"{k} neighbors are asked for, the training set has {len(train):,} images"
            yield Problem("k", f"{message}: {train.describe()}")
        ours, theirs = train.classes, test.classes
        if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
            odd = sorted(set(ours) ^ set(theirs))
            what = f"{', '.join(odd[:5])} in one of them only" if odd else "in another order"
            yield Problem(
                "test",
                f"its classes are not those of train: {what}",
                "list the same classes in both, so that a label means the same (image_folder: "
                "classes)",
            )
