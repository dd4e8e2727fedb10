"""The recipe of a chain of stages; light to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dinov3_framework.configs import config, not_negative, option, replace
from dinov3_framework.kinds import InnerRun, TaskConfig
from dinov3_framework.parallel import ParallelConfig
from dinov3_pipeline.references import Reference, references, replaced


@config
class StageConfig:
    """A run of its own, in the folder of its name."""

    recipe: TaskConfig = option(
        "what the stage runs: a whole recipe, which may say extends and drop. A string "
        '"stage:NAME" in it is the folder of an earlier stage\'s run, "stage:NAME/..." something '
        "in there"
    )


@config
class PipelineConfig(TaskConfig):
    """Runs one after the other in the same processes, each starting from those before it."""

    seed: int = option(
        "seed of all stages; left out or 0, each has that of its own recipe",
        default=0,
        check=not_negative,
    )
    stages: dict[str, StageConfig] = option("the stages, by names of your choice, in their order")

    @property
    def parallel(self) -> ParallelConfig:
        """What the processes need such that every stage can run in them."""
        each = [getattr(s.recipe, "parallel", ParallelConfig()) for s in self.stages.values()]
        # A group that serves CUDA serves the CPU too.
        widest = max(each, key=lambda parallel: ("cpu", "auto", "cuda").index(parallel.device))
        return replace(widest, timeout=max(parallel.timeout for parallel in each))

    def recipe_of(
        self, name: str, output_dir: Path, place: Callable[[Reference], Path]
    ) -> TaskConfig:
        """A stage's recipe as a run of its own; ``place`` says where its references lead."""
        recipe = self.stages[name].recipe
        return replace(
            replaced(recipe, lambda _, reference: str(place(reference))),
            output_dir=str(output_dir / name),
            seed=self.seed or recipe.seed,
            launcher=None,
        )

    def inner_runs(self, output_dir: Path) -> Sequence[InnerRun]:
        return [
            InnerRun(
                name,
                self.recipe_of(name, output_dir, lambda reference: reference.path(output_dir)),
                {path: each.stage for path, each in references(stage.recipe).items()},
            )
            for name, stage in self.stages.items()
        ]
