"""Mistakes of a stage, told such that everybody knows which stage it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dinov3_framework.errors import Problem, RecipeError, UserError
from dinov3_framework.recipes.toml_text import dotted


@contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Put the stage's name, or its keys' path, before whatever a person is told of it."""
    try:
        yield
    except RecipeError as error:
        named = RecipeError(stage_problems(name, error.problems))
        named.shared = error.shared
        raise named from error
    except UserError as error:
        error.args = (f"stage {name}: {error}",)
        raise
    except Exception as error:
        error.add_note(f"in stage {name}")
        raise


def stage_problems(name: str, problems: list[Problem]) -> list[Problem]:
    """Problems of a stage's recipe, with their key paths in the whole one."""
    above = dotted(("stages", name, "recipe"))
    return [
        problem._replace(where=f"{above}.{problem.where}" if problem.where else above)
        for problem in problems
    ]
