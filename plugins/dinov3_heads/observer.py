"""Evaluations while training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from dinov3_framework import DataError, ImagesConfig, Model, Observer, Run, StepRecord
from dinov3_framework.contracts.running import Rows
from dinov3_heads import EvaluateWhileTrainingConfig
from dinov3_heads.details import write_details
from dinov3_heads.evaluations import Evaluations, Measured, label_of

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.evaluations")


class EvaluateWhileTraining(Observer):
    """Measures what is trained; at the end sets it against what it has to beat."""

    def __init__(self, config: EvaluateWhileTrainingConfig) -> None:
        self.config = config
        self._evaluations: Evaluations | None = None
        self._latest: tuple[int, Measured] | None = None

    def check(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        self._prepare(build, images)

    def check_model(self, model: Model) -> None:
        if self._evaluations is not None:
            self._evaluations.check(model)

    def rows(self, model: Model) -> Rows:
        return [] if self._evaluations is None else self._evaluations.described(model)

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        # The data are built whether or not they are used now: what is wrong with them should not
        # come up after the first thousand steps.
        evaluations = self._prepare(run.build, run.images)
        return evaluations.flat(self._evaluate(run, iteration).metrics) if iteration == 0 else None

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float]:
        evaluations = self._prepare(run.build, run.images)
        return evaluations.flat(self._evaluate(run, step.iteration).metrics)

    def on_end(self, run: Run) -> Mapping[str, Any]:
        evaluations = self._prepare(run.build, run.images)
        log.info("Evaluating at the end: %s", ", ".join(self.config.evaluations))
        trained = self._evaluate(run, run.total_iterations)
        model, initial, seed = run.model(), run.initial_model(), run.config.seed
        baselines, untrained = evaluations.baselines(model), evaluations.run(initial)
        records = []
        for name, metrics in baselines.items():
            records += evaluations.records(model, name, metrics, seed)
        records += evaluations.records(initial, initial.name, untrained, seed)
        records += evaluations.records(model, model.name, trained, seed)
        write_details(run.output_dir, trained.details, model, writes=run.is_main)
        measured = {
            **baselines,
            initial.name: untrained.metrics,
            model.name: trained.metrics,
        }
        tables = evaluations.rows(measured, label_of(model))
        return {
            **tables,
            "records": {name: [r for r in records if r.evaluation == name] for name in tables},
        }

    def _prepare(self, build: Callable[..., Any], images: ImagesConfig) -> Evaluations:
        if self._evaluations is None:
            evaluations = Evaluations(self.config.evaluations, build)
            missing = evaluations.prepare(images)
            if missing:
                raise DataError("\n".join(missing))
            self._evaluations = evaluations
        return self._evaluations

    def _evaluate(self, run: Run, iteration: int) -> Measured:
        """The model after ``iteration`` steps; not twice if nothing happened in between."""
        if self._latest is None or self._latest[0] != iteration:
            evaluations = self._prepare(run.build, run.images)
            self._latest = (iteration, evaluations.run(run.model()))
        return self._latest[1]
