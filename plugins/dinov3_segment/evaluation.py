"""Semantic segmentation of a dataset by any head that predicts masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dinov3_framework import (
    DataError,
    Dataset,
    Evaluation,
    ImagesConfig,
    Model,
    Problem,
    RecipeError,
    Target,
    UserError,
)
from dinov3_framework.contracts.data import target_complaints
from dinov3_framework.contracts.running import Build, Details
from dinov3_framework.data.dense import DensePrediction, dense_predictions, dense_problems
from dinov3_framework.data.samples import sample_complaints
from dinov3_framework.data.saved_predictions import SavedPredictions
from dinov3_framework.errors import problems_at
from dinov3_framework.parallel.state_dicts import weights_hash
from dinov3_framework.runtime import collectives
from dinov3_segment.areas import Areas, Counts, ImageAreas, confusion_of, miou_interval
from dinov3_segment.configs_evaluation import SegmentationConfig


class SegmentationEvaluation(Evaluation):
    """Compares the class of every pixel with the truth."""

    dataset: Dataset

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config
        self.unreadable = 0
        self.found = Details()

    def prepare(self, build: Build, images: ImagesConfig) -> None:
        self.dataset = build(self.config.data, channels=images.channels)

    def problems(self, model: Model) -> list[Problem]:
        config, name = self.config, self.config.target
        if model.head is None or name not in model.head.targets:
            what = "there is no head" if model.head is None else "the head does not predict it"
            return [Problem("target", f"is {name!r}, and {what}", "give a head trained on it")]
        if model.head.targets[name].kind != "mask":
            message = f"the head predicts {model.head.targets[name]} of {name!r}, and no mask"
            return [Problem("target", message, "give a head of masks")]
        found = problems_at("inference", RecipeError(dense_problems(model, config.inference, name)))
        wanted = {name: model.head.targets[name]}
        complaints = list(target_complaints(wanted, self.dataset.targets))
        found += [
            Problem("data", each, "the same classes in the same order") for each in complaints
        ]
        if not complaints:
            found += [
                Problem("data", each)
                for each in sample_complaints(self.dataset, {name}, same_size=False)
            ]
        return found

    # ------------------------------------------------------------------ measuring
    def run(self, model: Model) -> Mapping[str, float]:
        config, target = self.config, self.dataset.targets[self.config.target]
        count, ignored = target.count or 0, target.ignore_index
        saved = self._saved(model)
        confusion = np.zeros((count, count), dtype=np.int64)
        images: list[ImageAreas] = []
        wrong: list[str] = []
        for seen in dense_predictions(
            model,
            self.dataset,
            config.inference,
            config.target,
            workers=config.workers,
            skip=None if saved is None else saved.has,
        ):
            try:
                predicted = _prediction(seen, saved, target)
                cells = confusion_of(predicted, seen.targets[config.target], count, ignored)
            except UserError as error:
                wrong.append(f"sample {seen.index} ({seen.name}): {error}")
                continue
            confusion += cells
            images.append(ImageAreas.of(seen.index, cells))
        _raise_everywhere(wrong)
        collectives.all_reduce_sum(torch.from_numpy(confusion))
        shares = cast("list[list[ImageAreas]]", collectives.all_gather_object(images))
        images = [each for share in shares for each in share]
        self.unreadable = len(self.dataset) - len(images)
        return self._findings(confusion, images, target)

    def _saved(self, model: Model) -> SavedPredictions | None:
        """Where predictions are left, if they are to be."""
        if not self.config.save or self.folder is None:
            return None
        modules = [model.backbone] if model.head is None else [model.backbone, model.head]
        key = {"weights": weights_hash(*modules), "data": self.data(), **self._switches(model)}
        names = (self.dataset.name(index) for index in range(len(self.dataset)))
        return SavedPredictions(self.folder, key, self.config.save, names=names)

    def _findings(
        self, confusion: Counts, images: list[ImageAreas], target: Target
    ) -> Mapping[str, float]:
        areas = Areas.of(confusion)
        if not areas.true.sum():
            raise DataError(f"{self.dataset.describe()}: not one pixel has a class")
        names = target.classes
        interval = miou_interval(images, len(confusion), self.config.seed)
        self.found = Details(
            intervals={"mIoU": interval},
            tables={"classes": areas.rows(names)},
            arrays={"confusion": confusion},
        )
        return areas.metrics()

    def details(self) -> Details:
        return self.found

    # ------------------------------------------------------------------ what it means
    def _switches(self, model: Model) -> dict[str, Any]:
        config = self.config.inference
        resized = "their own size"
        if config.resize is not None:
            resized = f"{config.side} side {config.resize} px, {config.interpolation}"
        found: dict[str, Any] = {"target": self.config.target, "images": resized}
        found["mode"] = config.mode
        if config.mode == "slide":
            window = config.window or model.size or 0
            found |= {"window": window, "stride": config.stride or window * 2 // 3}
        found |= {"scales": list(config.scales), "flip": config.flip}
        return found

    def protocol(self, model: Model) -> Mapping[str, Any]:
        truth = self.dataset.targets[self.config.target]
        ignored = "nothing" if truth.ignore_index is None else truth.ignore_index
        found = self._switches(model) | {
            "classes": truth.count,
            "ignored": ignored,
            "truth": "at its own size",
            "areas": "summed over the set; classes in neither left out of means",
        }
        return found | ({"unreadable": self.unreadable} if self.unreadable else {})

    def data(self) -> str:
        return self.dataset.describe()


def _prediction(seen: DensePrediction, saved: SavedPredictions | None, target: Target) -> Tensor:
    """What was predicted, now or in a run before; kept where predictions are to be."""
    if seen.prediction is None:
        if saved is None:
            raise DataError("was not predicted")
        return saved.read(seen.name)
    if saved is not None:
        saved.write(seen.name, seen.prediction, target)
    return seen.prediction


def _raise_everywhere(wrong: list[str]) -> None:
    """Raise ``DataError`` on every process, or on none."""
    for first in cast("list[list[str]]", collectives.all_gather_object(wrong[:1])):
        if first:
            raise DataError(first[0])
