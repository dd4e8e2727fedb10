"""The check of a chain of stages: all of them, before the first one runs.

A stage that starts from an earlier one is checked against what that one will leave: its folder if
it is complete, else the names and shapes of it all (``Task.write_expected_artifacts``) in a
temporary folder.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from attrs import define, field

from dinov3_framework.contracts.running import Plan, Rows, Task
from dinov3_framework.errors import Problem, RecipeError, UserError, suggest
from dinov3_framework.kinds import TaskConfig
from dinov3_framework.recipes.toml_text import KeyPath, dotted
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.inner_runs import stage_problems
from dinov3_framework.runtime.output import is_complete
from dinov3_pipeline.configs import PipelineConfig
from dinov3_pipeline.references import PREFIX, Reference, references

_NAME = re.compile(r"\w[\w-]*")


def check_pipeline(
    config: PipelineConfig, registry: Registry, output_dir: Path, world_size: int
) -> Plan:
    """Check all stages; raises ``RecipeError`` with the mistakes of all of them.

    The plan keeps those of stages that inherit nothing, by name. Nothing is written into
    ``output_dir``.
    """
    with tempfile.TemporaryDirectory(prefix="dinov3-check-") as folder:
        check = _Check(config, registry, output_dir, world_size, Path(folder))
        check.problems += _pipeline_problems(config)
        for name in config.stages:
            check.stage(name)
        if check.problems:
            raise RecipeError(check.problems)
        return Plan({"stages": check.rows} | check.sections, check.missing, check.plans)


# ---------------------------------------------------------------------- the chain as such
def _pipeline_problems(config: PipelineConfig) -> Iterator[Problem]:
    if not config.stages:
        yield Problem("stages", "no stage: nothing would run")
    earlier: list[str] = []
    for name, stage in config.stages.items():
        if not _NAME.fullmatch(name):
            message = "a stage's name, which names its folder, is made of letters, digits, - and _"
            yield Problem(dotted(("stages", name)), message)
        own = [
            *_recipe_problems(name, stage.recipe, config.seed),
            *_reference_problems(config, references(stage.recipe), earlier),
        ]
        yield from stage_problems(name, own)
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
    sections: dict[str, Rows] = field(factory=dict)
    missing: list[str] = field(factory=list)
    plans: dict[str, Plan] = field(factory=dict)
    _folders: dict[str, Path] = field(factory=dict)  # where what stages leave, or will, can be read

    def stage(self, name: str) -> None:
        recipe = self.config.stages[name].recipe
        inherited = references(recipe)
        task_name = self.registry.of_config(recipe).component.name
        sources = dict.fromkeys(f"from {each}" for each in inherited.values())
        row = ", ".join([task_name, *sources])
        if is_complete(self.output_dir / name):
            self._folders[name] = self.output_dir
            self.rows.append((name, f"{row}: complete"))
            return
        open_keys = [path for path, each in inherited.items() if not self._is_readable(each)]
        later = "; to be checked when its turn has come" if open_keys else ""
        self.rows.append((name, f"{row}{later}"))
        if isinstance(recipe, PipelineConfig):
            return
        filled = self.config.recipe_of(name, self.output_dir, self._place)
        task: Task = self.registry.build(filled, registry=self.registry)
        self._check(name, task, open_keys)
        self._expect(name, task)

    def _is_readable(self, reference: Reference) -> bool:
        """Whether the folder that it leads into can be looked at."""
        return reference.stage in self._folders and reference.is_sound

    def _place(self, reference: Reference) -> Path:
        return reference.path(self._folders.get(reference.stage, self.output_dir))

    def _check(self, name: str, task: Task, open_keys: list[KeyPath]) -> None:
        """Check one stage; nothing that follows from open keys or absent files is reported."""
        inherited = references(self.config.stages[name].recipe)
        problems = [
            self._absent(path, reference)
            for path, reference in inherited.items()
            if self._is_readable(reference) and not self._place(reference).exists()
        ]
        excused = [*map(dotted, open_keys), *(problem.where for problem in problems)]
        try:
            plan = task.check(self.world_size)
        except RecipeError as error:
            problems += [each for each in error.problems if each.where not in excused]
        except UserError as error:
            if not excused:
                problems.append(Problem("", str(error)))
        else:
            later = [str(self._place(inherited[path])) for path in open_keys]
            self.missing += [
                f"stages.{name}: {self._shown(line)}"
                for line in plan.missing
                if not any(place in line for place in later)
            ]
            for title, rows in plan.sections.items():
                shown = [(label, self._shown(value)) for label, value in rows]
                self.sections[f"{name}: {title}"] = shown
            if not inherited:
                self.plans[name] = plan
        self.problems += [
            each._replace(message=self._shown(each.message), hint=self._shown(each.hint))
            for each in stage_problems(name, problems)
        ]

    def _absent(self, path: KeyPath, reference: Reference) -> Problem:
        """A reference to what is not in the folder of the stage, or will not be."""
        folder = self._folders[reference.stage]
        above = (folder / reference.stage / reference.inside).parent
        siblings = sorted(each.name for each in above.iterdir()) if above.is_dir() else []
        what = "has not left" if folder == self.output_dir else "will not leave"
        hints = [f"beside it: {', '.join(siblings)}"] if siblings else []
        source = self.config.stages[reference.stage].recipe
        if reference.inside.startswith("checkpoints/") and hasattr(source, "checkpoint"):
            keys = dotted(("stages", reference.stage, "recipe", "checkpoint"))
            hints.append(f"{keys} says by every, keep and keep_every which there are")
        message = f"stage {reference.stage} {what} {reference.inside}"
        return Problem(dotted(path), message, "\n    ".join(hints))

    def _expect(self, name: str, task: Task) -> None:
        """Write what a stage will leave for those that refer to it, if that can be told."""
        stages = self.config.stages.values()
        if name not in {each.stage for other in stages for each in references(other).values()}:
            return
        folder = self.temporary / name
        folder.mkdir()
        with suppress(UserError):  # of a recipe whose mistakes have just been reported
            if task.write_expected_artifacts(folder):
                self._folders[name] = self.temporary

    def _shown(self, text: str) -> str:
        """A text without the temporary folder, which will be gone."""
        return text.replace(str(self.temporary), str(self.output_dir))
