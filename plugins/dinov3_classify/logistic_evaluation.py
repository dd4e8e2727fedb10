"""Evaluation of a backbone's features by logistic regression."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_classify.configs import LogisticRegressionConfig
from dinov3_classify.data import ClassifyData, vectors
from dinov3_classify.findings import Findings
from dinov3_classify.fitting import Fitted, Labeled, fit, fitting_device
from dinov3_classify.metrics import Classification, check_classes, check_labels
from dinov3_classify.subsets import few_shot_draws, hold_out
from dinov3_framework import (
    DataError,
    Evaluation,
    Features,
    ImagesConfig,
    Model,
    Problem,
    RecipeError,
    collectives,
)
from dinov3_framework.contracts.running import Build, Details
from dinov3_framework.runtime.agreement import broadcast_from_rank0

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.classify")

_ROWS = 8192  # images that are scored at once
_METRIC = "logistic_regression"


class LogisticRegressionEvaluation(Evaluation):
    """How well a linear classifier, fitted to rounding, tells the classes of the test images.

    C is chosen on images that are held out; the classifier is then fitted to those, too.
    """

    data_sets: ClassifyData

    def __init__(self, config: LogisticRegressionConfig) -> None:
        self.config = config
        self.found = Findings(None, config.seed)

    def prepare(self, build: Build, images: ImagesConfig) -> None:
        config = self.config
        self.data_sets = ClassifyData(
            config,
            build,
            images,
            size=config.size or None,
            resize=config.resize,
            val=config.val,
            uncropped=True,
        )
        if config.val is None and len(config.c) > 1 and 1 in config.n_per_class:
            message = "of one image of each class none can be held out to choose C on"
            hint = "give val, or a single value for c"
            raise RecipeError([Problem("n_per_class", message, hint)])

    def problems(self, model: Model) -> list[Problem]:
        return self.data_sets.problems(model)

    def run(self, model: Model) -> Mapping[str, float]:
        config, data = self.config, self.data_sets
        names = data.train.classes
        found = Findings(names, config.seed, config.class_mean, config.top5)
        device = fitting_device(model)
        train = self._labeled(data.extract(model, data.train, "train"), "training")
        val = None
        if data.val is not None:
            val = self._labeled(data.extract(model, data.val, "val"), "validation")
        tests = {}
        for name, each in data.tests.items():
            features = data.extract(model, each, name or "test")
            truth = check_labels(name or "test", features.labels, data.n_classes)
            check_classes(train.labels, truth, data.n_classes, names)
            tests[name] = (vectors(features), truth)
        fitted = self._fit(train, val, config.held_out, 0, device)
        self._note(found, "", [fitted])
        for name, (queries, truth) in tests.items():
            found.add(name, _METRIC, self._classify(fitted, queries, truth))
        for shots, draws in few_shot_draws(
            train.labels,
            config.n_per_class,
            config.percent,
            config.tries,
            config.seed,
        ).items():
            few = [
                self._fit(train.at(draw), val, config.held_out_few_shot, each, device)
                for each, draw in enumerate(draws)
            ]
            self._note(found, f" of {shots}", few)
            for name, (queries, truth) in tests.items():
                results = [self._classify(each, queries, truth) for each in few]
                found.add_tries(name, f"{_METRIC}/{shots}", results)
        self.found = found
        return found.metrics

    def details(self) -> Details:
        return self.found.details()

    def protocol(self, model: Model) -> Mapping[str, Any]:
        config = self.config
        chosen_on = "nothing, it is given"
        if len(config.c) > 1:
            chosen_on = "val" if config.val is not None else f"{config.held_out:.3g} of train"
        few: dict[str, Any] = {}
        if config.n_per_class or config.percent:
            few = {"tries": config.tries}
            if config.val is None and len(config.c) > 1:
                few["held out of few shots"] = config.held_out_few_shot
        return {
            **self.data_sets.protocol(model),
            "values of C": f"{len(config.c)} in {min(config.c):.3g}..{max(config.c):.3g}",
            "C chosen on": chosen_on,
            "tolerance": config.tolerance,
            "iterations at most": config.max_iterations,
            "precision": "float64",
            "seed": config.seed,
            **few,
            **self.found.notes,
        }

    def data(self) -> str:
        return self.data_sets.describe()

    # ------------------------------------------------------------------ parts
    def _labeled(self, features: Features, what: str) -> Labeled:
        labels = check_labels(what, features.labels, self.data_sets.n_classes)
        found = vectors(features)
        if not bool(found.isfinite().all()):
            raise DataError(f"features of the {what} set are not finite (NaN or infinity)")
        return Labeled(found, labels)

    def _fit(
        self, train: Labeled, val: Labeled | None, share: float, each: int, device: torch.device
    ) -> Fitted:
        """The same on every process: the main one's."""
        config, whole = self.config, train if val is None else train + val
        if val is None and len(config.c) > 1:
            kept, held = hold_out(train.labels, share, config.seed, each)
            if len(held) == 0:
                raise DataError(
                    "every class has one training image: none can be held out to choose C on; "
                    "give val, or a single value for c"
                )
            train, val = train.at(kept), train.at(held)
        # By every process, so that none waits for another longer than a collective may take.
        fitted = fit(
            train,
            val,
            whole,
            self.data_sets.n_classes,
            config.c,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
            device=device,
        )
        return broadcast_from_rank0(lambda: fitted)

    def _classify(self, fitted: Fitted, queries: Tensor, truth: Tensor) -> Classification:
        scores = (fitted.solution.scores(part) for part in queries.split(_ROWS))
        return Classification.of_scores(scores, truth, self.data_sets.n_classes)

    def _note(self, found: Findings, which: str, fits: list[Fitted]) -> None:
        """What became of the fits, for the protocol, the tables and the log."""
        found.notes[f"C{which}"] = ", ".join(f"{each.solution.c:.4g}" for each in fits)
        unfinished = sum(not each.converged for each in fits)
        found.notes[f"converged{which}"] = "yes" if not unfinished else f"not {unfinished} fits"
        for each, one in enumerate(fits):
            rows = [
                {"fit": f"{which.removeprefix(' of ') or 'all'} {each}", **row} for row in one.rows
            ]
            found.tables.setdefault("sweep", []).extend(rows)
        at_end = sum(each.solution.c == max(self.config.c) for each in fits)
        if at_end and len(self.config.c) > 1 and collectives.is_main():
            log.warning(
                "logistic regression%s: the chosen C is the largest of those tried, in %d of %d "
                "fits; features of a small scale may need larger ones",
                which,
                at_end,
                len(fits),
            )
        if unfinished and collectives.is_main():
            worst = max(row["gradient"] for each in fits for row in each.rows)
            log.warning(
                "logistic regression%s: not converged within %d iterations for every C; the "
                "largest gradient is %.1e",
                which,
                self.config.max_iterations,
                worst,
            )
