"""k-NN evaluation of a backbone's features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov3_classify.configs import KnnConfig
from dinov3_classify.data import ClassifyData, vectors
from dinov3_classify.findings import Findings
from dinov3_classify.knn import LabeledShare, knn_classify
from dinov3_classify.metrics import check_classes, check_labels
from dinov3_classify.subsets import few_shot_draws
from dinov3_framework import (
    DataError,
    Evaluation,
    Features,
    ImagesConfig,
    Model,
    Problem,
    RecipeError,
)
from dinov3_framework.contracts.running import Build, Details


class KnnEvaluation(Evaluation):
    """How well the nearest training images tell the classes of the test images.

    Each process searches its own share of the training features.
    """

    data_sets: ClassifyData

    def __init__(self, config: KnnConfig) -> None:
        self.config = config
        self.found = Findings(None, config.seed)

    def prepare(self, build: Build, images: ImagesConfig) -> None:
        config = self.config
        self.data_sets = ClassifyData(config, build, images, size=config.size, resize=config.resize)
        if problems := list(self._too_few()):
            raise RecipeError(problems)

    def problems(self, model: Model) -> list[Problem]:
        return self.data_sets.problems(model)

    def run(self, model: Model) -> Mapping[str, float]:
        data = self.data_sets
        train = data.extract(model, data.train, "train", gather=False)
        tests = {
            name: data.extract(model, each, name or "test") for name, each in data.tests.items()
        }
        device = next((parameter.device for parameter in model.backbone.parameters()), None)
        self.found = self._classify(train, tests, device)
        return self.found.metrics

    def details(self) -> Details:
        return self.found.details()

    def baselines(self, model: Model) -> Mapping[str, Mapping[str, float]]:
        """Raw pixels, if they are within the limit."""
        data = self.data_sets
        if data.raw_bytes(model) > self.config.raw_pixels_limit * 2**20:
            return {}
        train = data.raw(model, data.train, gather=False)
        tests = {name: data.raw(model, each) for name, each in data.tests.items()}
        return {"raw pixels": self._classify(train, tests, None).metrics}

    def protocol(self, model: Model) -> Mapping[str, Any]:
        config, data = self.config, self.data_sets
        few = config.n_per_class or config.percent
        return {
            "similarity": "cosine",
            **data.protocol(model),
            "vote": config.vote,
            **({"temperature": config.temperature} if config.vote == "softmax" else {}),
            **({"tries": config.tries, "seed": config.seed} if few else {}),
            **self.found.notes,
        }

    def data(self) -> str:
        return self.data_sets.describe()

    # ------------------------------------------------------------------ parts
    def _classify(
        self, train: Features, tests: Mapping[str, Features], device: torch.device | None
    ) -> Findings:
        config, data = self.config, self.data_sets
        names = data.train.classes
        found = Findings(names, config.seed, config.class_mean, config.top5)
        labels = check_labels("training", train.labels, data.n_classes)
        share = LabeledShare.of_indices(vectors(train), labels, train.indices)
        for test, features in tests.items():
            truth = check_labels(test or "test", features.labels, data.n_classes)
            check_classes(share.labels, truth, data.n_classes, names)
            queries = vectors(features)
            for k, result in self._vote(share, queries, truth, config.k, device).items():
                found.add(test, f"knn@{k}", result)
            draws = few_shot_draws(
                share.labels, config.n_per_class, config.percent, config.tries, config.seed
            )
            for shots, tries in draws.items():
                fewest = min(map(len, tries))
                within = [count for count in config.k if count <= fewest]
                if not within:
                    raise DataError(
                        f"{shots} are {fewest} training images, fewer than the {min(config.k)} "
                        f"neighbors asked for"
                    )
                results = [
                    self._vote(share.subset(each), queries, truth, within, device) for each in tries
                ]
                for count in within:
                    found.add_tries(
                        test, f"knn@{count}/{shots}", [result[count] for result in results]
                    )
        return found

    def _vote(
        self,
        share: LabeledShare,
        queries: Tensor,
        truth: Tensor,
        k: Sequence[int],
        device: torch.device | None,
    ) -> dict[int, Any]:
        return knn_classify(
            share,
            queries,
            truth,
            k=k,
            temperature=self.config.temperature,
            weighted=self.config.vote == "softmax",
            n_classes=self.data_sets.n_classes,
            device=device,
        )

    def _too_few(self) -> Iterator[Problem]:
        """Numbers of neighbors beyond those of images."""
        train, config = self.data_sets.train, self.config
        if max(config.k) > len(train):
            message = (
                f"{max(config.k)} neighbors are asked for, the training set has {len(train):,}"
            )
            yield Problem("k", f"{message} images: {train.describe()}")
        classes = train.n_classes or 1
        for count in config.n_per_class:
            if min(config.k) > count * classes:
                yield Problem(
                    "n_per_class",
                    f"{count} images of each of {classes} classes are fewer than the "
                    f"{min(config.k)} neighbors asked for",
                    f"add a k of at most {count * classes}",
                )
