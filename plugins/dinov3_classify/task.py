"""k-NN on its own: an exported or a randomly initialised backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinov3_classify.configs import KnnTaskConfig
from dinov3_classify.evaluation import KnnEvaluation
from dinov3_classify.results import print_table, write_results
from dinov3_framework import (
    DataError,
    LoadedBackbone,
    Plan,
    Problem,
    RecipeError,
    Registry,
    Task,
    describe_recipe_backbone,
    load_recipe_backbone,
)
from dinov3_framework.runtime import collectives


class KnnTask(Task):
    """Evaluates one backbone, beside raw pixels, and writes results.json and results.csv."""

    def __init__(self, config: KnnTaskConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        config = self.config
        subject = describe_recipe_backbone(config, self.registry)
        _raise(_size_problems(config, subject))
        parameters = sum(parameter.numel() for parameter in subject.backbone.parameters())
        data: list[tuple[str, str]] = []
        missing: list[str] = []
        try:
            evaluation = self._evaluation(subject)
        except DataError as error:
            missing.append(str(error))
        else:
            data = [("train", evaluation.train.describe()), ("test", evaluation.test.describe())]
        size = config.size or subject.size
        return Plan(
            {
                "backbone": [*subject.origin, ("parameters", f"{parameters:,}")],
                "data": [*data, ("images", f"{size} px" if size else "as they are")],
                "evaluation": [
                    ("k", ", ".join(map(str, config.k))),
                    ("temperature", f"{config.temperature:g}"),
                    ("processes", str(world_size)),
                ],
            },
            missing,
        )

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        subject = load_recipe_backbone(self.config, self.registry)
        evaluation = self._evaluation(subject)
        pixels = evaluation.raw_pixels()
        rows = [] if pixels is None else [pixels.row("raw pixels")]
        result = evaluation.backbone(subject.backbone, device="auto")
        rows.append(result.row(subject.name))
        if not collectives.is_main():
            return
        results: dict[str, Any] = {
            "task": "knn",
            "backbone": dict(subject.origin),
            "train": evaluation.train.describe(),
            "test": evaluation.test.describe(),
            "size": evaluation.size,
            "temperature": self.config.temperature,
            "skipped": {"train": result.train_skipped, "test": result.test_skipped},
            "knn": rows,
        }
        write_results(output_dir, results, rows)
        print_table("k-NN accuracy in percent", rows)

    def _evaluation(self, subject: LoadedBackbone) -> KnnEvaluation:
        size = self.config.size or subject.size
        return KnnEvaluation.build(self.config, self.registry.build, subject.images, size)


def _raise(problems: list[Problem]) -> None:
    if problems:
        raise RecipeError(problems)


def _size_problems(config: KnnTaskConfig, subject: LoadedBackbone) -> list[Problem]:
    patch = subject.backbone.patch_size
    if config.size is None or config.size % patch == 0:
        return []
    lower = max(config.size // patch, 1) * patch
    message = f"{config.size} px are no multiple of the backbone's patch size {patch}"
    return [Problem("size", message, f"take {lower} or {lower + patch}")]
