"""k-NN while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dinov3_classify.configs import KnnConfig
from dinov3_classify.evaluation import KnnEvaluation, KnnResult
from dinov3_framework import ImagesConfig, Observer, Run, StepRecord


class KnnObserver(Observer):
    """Evaluates the momentum teacher; at the end sets it against what it has to beat."""

    def __init__(self, config: KnnConfig) -> None:
        self.config = config
        self._evaluation: KnnEvaluation | None = None
        self._latest: tuple[int, KnnResult] | None = None

    def check(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        KnnEvaluation.build(self.config, build, images, self.config.size)

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        # The datasets are built whether or not they are used now: what is wrong with them should
        # not come up after the first thousand steps.
        self._get_evaluation(run)
        return self._evaluate(run, iteration).metrics if iteration == 0 else None

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float]:
        return self._evaluate(run, step.iteration).metrics

    def on_end(self, run: Run) -> Mapping[str, Any]:
        evaluation = self._get_evaluation(run)
        trained = self._evaluate(run, run.total_iterations)
        pixels = evaluation.raw_pixels()
        rows = [] if pixels is None else [pixels.row("raw pixels")]
        untrained = evaluation.backbone(run.initial_model().backbone)
        rows += [untrained.row("backbone before training"), trained.row("trained teacher")]
        return {"knn": rows}

    def _get_evaluation(self, run: Run) -> KnnEvaluation:
        if self._evaluation is None:
            size = self.config.size
            self._evaluation = KnnEvaluation.build(self.config, run.build, run.images, size)
        return self._evaluation

    def _evaluate(self, run: Run, iteration: int) -> KnnResult:
        """The teacher after ``iteration`` steps; not twice if nothing happened in between."""
        if self._latest is None or self._latest[0] != iteration:
            result = self._get_evaluation(run).backbone(run.model().backbone)
            self._latest = (iteration, result)
        return self._latest[1]
