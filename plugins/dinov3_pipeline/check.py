"""The check of a chain of stages: all of them, before the first one runs.

A stage that starts from an earlier one is checked against what that one will leave: its folder if
it is complete, else a stand-in with all names and shapes (``Task.stand_in``) in a temporary folder.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import define, field

from dinov3_framework.configs import replace
from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.errors import Problem, RecipeError, UserError, suggest
from dinov3_framework.kinds import TaskConfig
from dinov3_framework.recipes.toml_text import KeyPath, dotted
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.inner_runs import stage_problems
from dinov3_framework.runtime.output import RESULTS
from dinov3_pipeline.configs import PipelineConfig
from dinov3_pipeline.references import PREFIX, Reference, references, replaced

_NAME = re.compile(r"\w[\w-]*")


def check_pipeline(
    config: PipelineConfig, registry: Registry, output_dir: Path, world_size: int
) -> Plan:
    """What the stages say of themselves; raises ``RecipeError`` with the mistakes of all of them.

    Nothing is written into ``output_dir``.
    """
    with tempfile.TemporaryDirectory(prefix="dinov3-check-") as folder:
        check = _Check(config, registry, output_dir, world_size, Path(folder))
        check.problems += _pipeline_problems(config)
        for name in config.stages:
            check.stage(name)
        if check.problems:
            raise RecipeError(check.problems)
        return Plan({"stages": check.rows} | check.sections, check.missing)


# ---------------------------------------------------------------------- the chain as such
def _pipeline_problems(config: PipelineConfig) -> Iterator[Problem]:
    if not config.stages:
        yield Problem("stages", "no stage: nothing would run")
    earlier: list[str] = []
    for name, stage in config.stages.items():
        if not _NAME.fullmatch(name):
            message = "a stage's name, which names its folder, is made of letters, digits, - and _"
            yield Problem(dotted(("stages", name)), message)
        yield from stage_problems(name, list(_recipe_problems(name, stage.recipe, config.seed)))
        found = references(stage.recipe)
        yield from stage_problems(name, list(_reference_problems(config, found, earlier)))
        earlier.append(name)


def _recipe_problems(name: str, recipe: TaskConfig, seed: int) -> Iterator[Problem]:
    """Keys that belong to the whole chain."""
    if isinstance(recipe, PipelineConfig):
        yield Problem("task", "a stage cannot be a pipeline", "write its stages one by one")
    if recipe.launcher is not None:
        yield Problem(
            "launcher",
            "all stages run in the same processes",
            f'set launcher at the top, and here drop = ["launcher"] in [stages.{name}.recipe]',
        )
    if recipe.output_dir is not None:
        message = f"a stage writes into the folder {name} of the chain's output_dir"
        hint = f'leave it out; if it is inherited: drop = ["output_dir"] in [stages.{name}.recipe]'
        yield Problem("output_dir", message, hint)
    if seed and recipe.seed not in (0, seed):
        message = f"is {recipe.seed}, and the seed of all stages is {seed}"
        yield Problem("seed", message, "set one of them")


def _reference_problems(
    config: PipelineConfig, found: Mapping[KeyPath, Reference], earlier: list[str]
) -> Iterator[Problem]:
    for path, reference in found.items():
        where = dotted(path)
        if reference.stage not in earlier:
            known = reference.stage in config.stages
            what = "does not come before this one" if known else "does not exist"
            hint = suggest(reference.stage, earlier, "stages before this one")
            yield Problem(where, f"stage {reference.stage!r} {what}", hint)
        elif not reference.is_sound:
            message = f"{reference} does not lie in the stage's folder"
            yield Problem(where, message, f"write {PREFIX}{reference.stage}/path/inside")


# ---------------------------------------------------------------------- stage after stage
@define
class _Check:
    config: PipelineConfig
    registry: Registry
    output_dir: Path
    world_size: int
    temporary: Path
    problems: list[Problem] = field(factory=list)
    rows: list[tuple[str, str]] = field(factory=list)
    sections: dict[str, list[tuple[str, str]]] = field(factory=dict)
    missing: list[str] = field(factory=list)
    _folders: dict[str, Path] = field(factory=dict)  # of what stages leave, or a stand-in

    def stage(self, name: str) -> None:
        recipe = self.config.stages[name].recipe
        task_name = self.registry.of_config(recipe).component.name
        sources = list(dict.fromkeys(str(each) for each in references(recipe).values()))
        row = ", ".join([task_name, *(f"from {source}" for source in sources)])
        if (self.output_dir / name / RESULTS).is_file():
            self._folders[name] = self.output_dir
            self.rows.append((name, f"{row}: complete"))
            return
        open_keys = [path for path, each in references(recipe).items() if not self._is_there(each)]
        later = "; to be checked when its turn has come" if open_keys else ""
        self.rows.append((name, f"{row}{later}"))
        if not isinstance(recipe, PipelineConfig):
            task = self._task(name, recipe)
            self._check(name, task, open_keys)
            self._stand_in(name, task)

    def _is_there(self, reference: Reference) -> bool:
        """Whether the folder that it leads into can be looked at."""
        return reference.stage in self._folders and reference.is_sound

    def _place(self, reference: Reference) -> Path:
        return reference.path(self._folders.get(reference.stage, self.output_dir))

    def _task(self, name: str, recipe: TaskConfig) -> Task:
        filled = replace(
            replaced(recipe, lambda _, reference: str(self._place(reference))),
            output_dir=str(self.output_dir / name),
            seed=self.config.seed or recipe.seed,
            launcher=None,
        )
        task: Task = self.registry.build(filled, registry=self.registry)
        return task

    def _check(self, name: str, task: Task, open_keys: list[KeyPath]) -> None:
        absent = list(self._absent(name))
        open_texts = [dotted(path) for path in open_keys] + [problem.where for problem in absent]
        problems, missing, sections = absent, [], {}
        try:
            report = task.check(self.world_size)
        except RecipeError as error:
            found = [each for each in error.problems if each.where not in open_texts]
            problems += found
        except UserError as error:
            if not open_texts:
                problems.append(Problem("", str(error)))
        else:
            missing, sections = list(report.missing), dict(report.sections)
        self.problems += [
            each._replace(message=self._shown(each.message), hint=self._shown(each.hint))
            for each in stage_problems(name, problems)
        ]
        self.missing += [f"stages.{name}: {self._shown(line)}" for line in missing]
        for title, rows in sections.items():
            shown = [(label, self._shown(value)) for label, value in rows]
            self.sections[f"{name}: {title}"] = shown

    def _absent(self, name: str) -> Iterator[Problem]:
        """References to what is not in the folder of the stage, or will not be."""
        for path, reference in references(self.config.stages[name].recipe).items():
            if not self._is_there(reference) or self._place(reference).exists():
                continue
            folder = self._folders[reference.stage] / reference.stage
            above = folder / reference.inside.rpartition("/")[0]
            siblings = sorted(each.name for each in above.iterdir()) if above.is_dir() else []
            complete = self._folders[reference.stage] == self.output_dir
            what = "has not left" if complete else "will not leave"
            hints = [f"beside it: {', '.join(siblings)}"] if siblings else []
            source = self.config.stages[reference.stage].recipe
            if reference.inside.startswith("checkpoints/") and hasattr(source, "checkpoint"):
                keys = dotted(("stages", reference.stage, "recipe", "checkpoint"))
                hints.append(f"{keys} says by every, keep and keep_every which there are")
            hint = "\n    ".join(hints)
            message = f"stage {reference.stage} {what} {reference.inside}"
            yield Problem(dotted(path), message, hint)

    def _stand_in(self, name: str, task: Task) -> None:
        later = list(self.config.stages)[list(self.config.stages).index(name) + 1 :]
        wanted = {
            each.stage for other in later for each in references(self.config.stages[other]).values()
        }
        if name not in wanted:
            return
        folder = self.temporary / name
        folder.mkdir()
        try:
            made = task.write_expected_artifacts(folder)
        except UserError:  # of a recipe whose mistakes have just been told
            made = False
        if made:
            self._folders[name] = self.temporary

    def _shown(self, text: str) -> str:
        """A text without the temporary folder, which will be gone."""
        return text.replace(str(self.temporary), str(self.output_dir))
