"""Accuracy of any head that predicts classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dinov3_classify.configs_heads import ClassificationConfig
from dinov3_classify.findings import Findings
from dinov3_classify.metrics import Classification
from dinov3_classify.sets import ClassifiedSets
from dinov3_framework import (
    DataError,
    Dataset,
    Evaluation,
    ImagesConfig,
    Model,
    Problem,
    Sample,
    Transform,
    collectives,
    normalize,
)
from dinov3_framework.contracts.running import Build, Details
from dinov3_framework.data.images import ImageFit
from dinov3_framework.data.predictions import predictions


class ClassificationEvaluation(Evaluation):
    """How many images of each set a head classifies rightly."""

    sets: ClassifiedSets

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config
        self.found = Findings(None, config.seed)

    def prepare(self, build: Build, images: ImagesConfig) -> None:
        self.sets = ClassifiedSets(self.config, self.config.sets, build, images)

    def problems(self, model: Model) -> list[Problem]:
        target = None if model.head is None else model.head.targets.get(self.config.target)
        if target is None or target.kind != "class":
            what = "there is no head" if model.head is None else "the head predicts none"
            message = f"looks at classes {self.config.target!r}, and {what}"
            return [Problem("target", message, "give a head that was trained on them")]
        if (self.config.size or model.size) is None:
            message = "nothing says how large images are to be"
            return [Problem("size", message, "give size, in pixels")]
        return self.sets.problems(model, target, self.config.target)

    def run(self, model: Model) -> Mapping[str, float]:
        if model.head is None:
            raise TypeError("there is no head")
        target = model.head.targets[self.config.target]
        self.found = Findings(
            target.classes,
            self.config.seed,
            with_top5=self.config.top5,
            with_class_mean=self.config.class_mean,
        )
        for name, dataset in self.sets.datasets.items():
            self.found.add(
                name, "accuracy", self._classified(model, dataset, name, target.count or 0)
            )
        return self.found.metrics

    def details(self) -> Details:
        return self.found.details()

    def protocol(self, model: Model) -> Mapping[str, Any]:
        return {**self.sets.protocol(model), **self.found.notes}

    def data(self) -> str:
        return self.sets.describe()

    # ------------------------------------------------------------------ parts
    def _classified(
        self, model: Model, dataset: Dataset, name: str, classes: int
    ) -> Classification:
        """How the head does on a set; each process looks at its share, and all get the whole."""
        shown = ImageFit(model.images, 1, "crop", self._size(model), self.config.resize)
        found: list[Classification] = []
        seen = 0
        walked = predictions(
            model,
            dataset,
            _Labeled(shown, name, self.config.target, classes),
            batch_size=self.config.batch_size,
            workers=self.config.workers,
        )
        for predicted, targets in walked:
            scores = predicted[self.config.target].float().cpu()
            found.append(Classification.of_scores([scores], targets["truth"].cpu(), classes))
            seen += len(scores)
        shares = cast(
            "list[tuple[int, list[Classification]]]", collectives.all_gather_object((seen, found))
        )
        parts = [part for _, share in shares for part in share]
        whole = Classification(
            torch.cat([part.predicted for part in parts]),
            torch.cat([part.rank for part in parts]),
            torch.cat([part.truth for part in parts]),
            classes,
        )
        total = sum(count for count, _ in shares)
        self.sets.skipped[name] = len(dataset) - total
        self.sets.unlabeled[name] = total - len(whole)
        return whole

    def _size(self, model: Model) -> int:
        size = self.config.size or model.size
        if size is None:
            raise DataError("nothing says how large images are to be: give size, in pixels")
        return size


class _Labeled(Transform):
    """Images as evaluations see them, with the target ``truth``: a class, or marks of several."""

    def __init__(self, fit: ImageFit, name: str, target: str, classes: int) -> None:
        """``name`` is that of the set, for messages; ``target`` what the head predicts."""
        side = fit.size or 0
        self.fit, self.name, self.target, self.classes = fit, name, target, classes
        self.size = (side, side)

    def __call__(self, sample: Sample) -> Sample:
        image = normalize(self.fit(sample.image), self.fit.images)
        return Sample(image, {"truth": self._truth(sample)})

    def _truth(self, sample: Sample) -> Any:
        known = sample.targets
        given = known.get("labels") if self.target == "label" else None
        given = known.get(self.target) if given is None else given
        if given is None:
            raise DataError(f"{self.name}: has no {self.target}")
        several = isinstance(given, Tensor) and given.ndim == 1
        found = torch.as_tensor(given, dtype=torch.int64).reshape(-1)
        if len(found) and not (int(found.min()) >= 0 and int(found.max()) < self.classes):
            shown = ", ".join(map(str, found.tolist()))
            raise DataError(
                f"{self.name}: {self.target} {shown} where {self.classes} classes are expected"
            )
        if not several:
            return int(found[0])
        marks = torch.zeros(self.classes, dtype=torch.bool)
        marks[found] = True
        return marks
