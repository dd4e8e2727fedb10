"""Several evaluations of one recipe: their mistakes, their metrics, their records and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import define, evolve, field, frozen

from dinov3_framework import (
    DataError,
    Evaluation,
    EvaluationConfig,
    ImagesConfig,
    Model,
    Problem,
    RecipeError,
    UserError,
)
from dinov3_framework.contracts.running import Details
from dinov3_framework.data.feature_cache import FeatureCache
from dinov3_framework.errors import problems_at
from dinov3_framework.parallel.state_dicts import weights_hash
from dinov3_framework.runtime.results import Record

Metrics = Mapping[str, Mapping[str, float]]  # by evaluation and name


@frozen
class Measured:
    """What evaluations found of a model, by their names."""

    metrics: dict[str, Mapping[str, float]]
    details: dict[str, Details]
    protocols: dict[str, Mapping[str, Any]]


@define
class Evaluations:
    """The evaluations of a recipe, by their names there."""

    configs: Mapping[str, EvaluationConfig]
    build: Callable[..., Any]  # Registry.build
    prepared: dict[str, Evaluation] = field(factory=dict, init=False)

    def prepare(self, images: ImagesConfig) -> list[str]:
        """Build the data; what this machine lacks of them. Raises ``RecipeError``."""
        missing: list[str] = []
        problems: list[Problem] = []
        if not self.configs:
            problems.append(Problem("evaluations", "there is nothing to measure"))
        for name, config in self.configs.items():
            evaluation = self.build(config)
            try:
                evaluation.prepare(self.build, images)
            except DataError as error:
                missing.append(f"evaluations.{name}: {error}")
            except UserError as error:
                problems += problems_at(f"evaluations.{name}", error)
            else:
                self.prepared[name] = evaluation
        if problems:
            raise RecipeError(problems)
        return missing

    def check(self, model: Model) -> None:
        """Raise ``RecipeError`` where the model, perhaps on the meta device, does not fit.

        What this machine lacks is a ``DataError``.
        """
        problems: list[Problem] = []
        for name, evaluation in self.prepared.items():
            try:
                found = list(evaluation.problems(model))
            except DataError as error:
                raise DataError(f"evaluations.{name}: {error}") from error
            if found:
                problems += problems_at(f"evaluations.{name}", RecipeError(found))
        if problems:
            raise RecipeError(problems)

    def described(self, model: Model) -> list[tuple[str, str]]:
        """What a check shows: the data of each, and how they are measured."""
        found = []
        for name, each in self.prepared.items():
            found.append((name, each.data()))
            protocol = ", ".join(f"{key} {value}" for key, value in each.protocol(model).items())
            found.append(("protocol", protocol))
        return found

    def run(self, model: Model, folder: Path | None = None) -> Measured:
        """Metrics of all; what one of them extracted is not extracted again for another.

        Each may leave files in a folder of its name in ``folder``.
        """
        if model.cache is None:
            model = evolve(model, cache=FeatureCache())
        found = Measured({}, {}, {})
        for name, evaluation in self.prepared.items():
            evaluation.folder = None if folder is None else folder / name
            found.metrics[name] = dict(evaluation.run(model))
            found.details[name] = evaluation.details()
            found.protocols[name] = evaluation.protocol(model)
        return found

    def baselines(self, model: Model) -> dict[str, Metrics]:
        """Metrics of what any model has to beat, by its name."""
        found: dict[str, dict[str, Mapping[str, float]]] = {}
        for name, evaluation in self.prepared.items():
            for what, metrics in evaluation.baselines(model).items():
                found.setdefault(what, {})[name] = metrics
        return dict(found)

    def flat(self, metrics: Metrics) -> dict[str, float]:
        """Metrics as they are logged."""
        if len(metrics) == 1:
            return dict(*metrics.values())
        return {f"{n}/{key}": value for n, each in metrics.items() for key, value in each.items()}

    def rows(self, measured: Mapping[str, Metrics], label: str) -> dict[str, list[dict[str, Any]]]:
        """A table for each evaluation, of models by their names; ``label`` is what these are."""
        return {
            name: [
                {label: model, **{key: _rounded(value) for key, value in metrics[name].items()}}
                for model, metrics in measured.items()
                if name in metrics
            ]
            for name in self.prepared
        }

    def records(
        self, model: Model, name: str, measured: Metrics | Measured, seed: int
    ) -> list[Record]:
        """What was measured of a model, or of a baseline beside it, which has no weights.

        To be called by every process.
        """
        modules = [model.backbone] if model.head is None else [model.backbone, model.head]
        weights = weights_hash(*modules) if name == model.name else ""
        if not isinstance(measured, Measured):
            protocols = {key: each.protocol(model) for key, each in self.prepared.items()}
            measured = Measured(dict(measured), {}, protocols)
        details = measured.details
        return [
            Record(
                evaluation=evaluation,
                model=name,
                metric=metric,
                value=value,
                protocol=measured.protocols[evaluation],
                data=self.prepared[evaluation].data(),
                weights=weights,
                seed=seed,
                interval=details[evaluation].intervals.get(metric) if details else None,
            )
            for evaluation, values in measured.metrics.items()
            for metric, value in values.items()
        ]


def label_of(model: Model) -> str:
    """What stands in the rows of a table."""
    return "features" if model.head is None else "model"


def _rounded(value: float) -> float:
    return round(value, 1) if abs(value) >= 10 else float(f"{value:.3g}")
