"""Errors of a head that predicts depth."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dinov3_depth.configs_evaluation import DepthConfig
from dinov3_depth.mean_predictor import mean_predictor_scores
from dinov3_depth.scoring import ImageScore, score, truth_of
from dinov3_depth.summary import Summary, image_rows, summarize
from dinov3_framework import DataError, Dataset, Evaluation, ImagesConfig, Model, Problem
from dinov3_framework.contracts.data import Target, target_complaints
from dinov3_framework.contracts.running import Build, Details
from dinov3_framework.data.dense import DensePrediction, dense_predictions, dense_problems
from dinov3_framework.data.samples import sample_complaints
from dinov3_framework.data.saved_predictions import SavedPredictions
from dinov3_framework.errors import printable
from dinov3_framework.parallel.state_dicts import weights_hash
from dinov3_framework.runtime import collectives

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.depth")

_STEP, _WIDE_STEP = 0.001, 0.01  # of 16 bits, in the unit of the depth: up to 65 and 655


class DepthEvaluation(Evaluation):
    """How far predicted depth is from what was measured, image by image."""

    dataset: Dataset

    def __init__(self, config: DepthConfig) -> None:
        self.config = config
        self.found = Details()
        self.counts: dict[str, int] = {}  # of images that were left out in the last run
        self.baseline: Summary | None = None

    def prepare(self, build: Build, images: ImagesConfig) -> None:
        self.dataset = build(self.config.data, channels=images.channels)

    def problems(self, model: Model) -> list[Problem]:
        found = [
            each if each.where == "target" else each._replace(where=f"inference.{each.where}")
            for each in dense_problems(model, self.config.inference, self.config.target)
        ]
        wanted = {self.config.target: Target("map")}
        found += [Problem("data", each) for each in target_complaints(wanted, self.dataset.targets)]
        if model.head is not None and not found:
            learned = model.head.targets[self.config.target]
            given = self.dataset.targets[self.config.target]
            if learned.kind != "map":
                found.append(Problem("target", f"is a {learned.kind} of the head, not a map"))
            elif given.unit and learned.unit and given.unit != learned.unit:
                message = f"are in {given.unit!r}, the head predicts {learned.unit!r}"
                found.append(Problem("data", message, "data in the same unit"))
        if not found:
            complaints = sample_complaints(self.dataset, {self.config.target}, same_size=False)
            found += [Problem("data", each) for each in complaints]
        return found

    def run(self, model: Model) -> Mapping[str, float]:
        scores = self._scores(model)
        known = [each for each in scores if each.pixels]
        self.counts = {
            "unreadable images": len(self.dataset) - len(scores),
            "images without known depth": len(scores) - len(known),
        }
        if not known:
            raise DataError(f"{self.dataset.describe()}: depth is known of no pixel that counts")
        summary = summarize(known, self.config.seed)
        intervals = {self._named(name): value for name, value in summary.intervals.items()}
        self.found = Details(intervals=intervals, tables={"images": image_rows(scores)})
        return self._metrics(summary)

    def details(self) -> Details:
        return self.found

    def protocol(self, model: Model) -> Mapping[str, Any]:
        config = self.config
        most = "" if config.most is None else f"{config.most:g}"
        protocol = {
            "align": config.align,
            "range": f"{config.least:g}..{most}",
            "crop": config.crop,
            **self._seen(model),
        }
        if self.config.target in self.dataset.targets:
            protocol["unit"] = self.dataset.targets[self.config.target].unit
        return protocol | {what: count for what, count in self.counts.items() if count}

    def data(self) -> str:
        return self.dataset.describe()

    def baselines(self, model: Model) -> Mapping[str, Mapping[str, float]]:
        if not self.config.mean_predictor:
            return {}
        if self.baseline is None:
            scores = mean_predictor_scores(self.config, self.dataset)
            self.baseline = summarize(scores, self.config.seed)
        return {"mean depth": self._metrics(self.baseline)}

    # ------------------------------------------------------------------ parts
    def _named(self, metric: str) -> str:
        return metric if self.config.align == "none" else f"{metric}@{self.config.align}"

    def _metrics(self, summary: Summary) -> dict[str, float]:
        return {self._named(name): value for name, value in summary.metrics.items()}

    def _seen(self, model: Model) -> dict[str, Any]:
        """How images are looked at."""
        config = self.config.inference
        resize = "none" if config.resize is None else f"{config.resize} px, {config.side} side"
        seen: dict[str, Any] = {"resize": resize, "interpolation": config.interpolation}
        if config.mode == "slide":
            window = config.window or model.size or 0
            seen["windows"] = f"{window} px, stride {config.stride or window * 2 // 3}"
        return seen | {"scales": list(config.scales), "flip": config.flip}

    def _scores(self, model: Model) -> list[ImageScore]:
        """Of all images that can be read, on every process."""
        saved = self._saved(model)
        resumable = saved is not None and "npy" in self.config.save
        scores: list[ImageScore] = []
        complaints: list[str] = []
        walked = dense_predictions(
            model,
            self.dataset,
            self.config.inference,
            self.config.target,
            workers=self.config.workers,
            skip=saved.has if saved is not None and resumable else None,
        )
        for each in walked:
            try:
                prediction = self._kept(each, saved)
                truth = truth_of(self.config, each.targets)
                scores.append(score(self.config, each.index, each.name, prediction, truth))
            except DataError as error:  # said at the end, when nobody waits for this process
                complaints.append(f"{printable(each.name, kept='')}: {error}")
        if saved is not None and saved.clipped:
            log.warning(
                "%d predictions hold values that 16-bit pictures cannot, in steps of %g: they are "
                "clipped there; npy keeps them as they are",
                saved.clipped,
                saved.scale,
            )
        shares = cast(
            "list[tuple[list[ImageScore], list[str]]]",
            collectives.all_gather_object((scores, complaints[:1])),
        )
        for _, told in shares:
            if told:
                raise DataError(told[0])
        found = [each for share, _ in shares for each in share]
        return sorted(found, key=lambda each: each.index)

    def _kept(self, each: DensePrediction, saved: SavedPredictions | None) -> Tensor:
        if each.prediction is not None:
            if saved is not None:
                saved.write(each.name, each.prediction, self.dataset.targets[self.config.target])
            return each.prediction
        if saved is None:
            raise TypeError("skipped, and nothing is saved")
        return saved.read(each.name).to(torch.float32)

    def _saved(self, model: Model) -> SavedPredictions | None:
        if self.folder is None or not self.config.save or model.head is None:
            return None
        key = {
            "weights": weights_hash(model.backbone, model.head),
            "target": self.config.target,
            "data": self.dataset.version() or self.dataset.digest(),
            **self._seen(model),
        }
        most = self.config.most
        return SavedPredictions(
            self.folder,
            key,
            self.config.save,
            names=map(self.dataset.name, range(len(self.dataset))),
            scale=_STEP if most is not None and most < _STEP * 2**16 else _WIDE_STEP,
        )
