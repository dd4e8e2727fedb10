"""A chain of tiny stages, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
from dinov3_pipeline.configs import PipelineConfig
from dinov3_pipeline.task import Pipeline
from run_support import TINY, losses
from safetensors.torch import load_file
from torch import Tensor
from trainer_support import registry

from dinov3_framework.contracts.running import Plan
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe

CHAIN = f"""
task = "pipeline"

[stages.pretrain.recipe]
extends = "{TINY}"
iterations = 4

[stages.adapt.recipe]
extends = "{TINY}"
drop = ["losses.koleo"]
iterations = 4
init_from = {{ weights = "stage:pretrain" }}

[stages.last.recipe]
extends = "{TINY}"
iterations = 3
init_from = {{ weights = "stage:adapt", network = "student", projectors = true }}
"""

KNN = """
[stages.knn.recipe]
extends = "dinov3_recipes:knn"
weights = "stage:last"
"""


def write_chain(folder: Path, text: str = CHAIN) -> Path:
    path = folder / "chain.toml"
    path.write_text(text, "utf-8")
    return path


def chain_config(recipe: Path, *overrides: str) -> PipelineConfig:
    config = structure_recipe(registry(), compose(recipe, overrides))
    assert isinstance(config, PipelineConfig)
    return config


def checked(recipe: Path, *overrides: str, world_size: int = 1) -> Plan:
    """What the check says of a chain that writes beside its recipe."""
    overrides = (*overrides, f'output_dir="{recipe.parent}/out"')
    config = chain_config(recipe, *overrides)
    return Pipeline(config, registry=registry()).check(world_size)


def recipe_of(folder: Path) -> dict[str, Any]:
    return tomli.loads((folder / "recipe.toml").read_text("utf-8"))


def exported(folder: Path) -> dict[str, Tensor]:
    """The export's tensors; beside them it names the folder that the run started from."""
    return load_file(folder / "exports" / "teacher_backbone.safetensors")


def assert_same_chain(
    one: Path, other: Path, stages: Sequence[str] = ("pretrain", "adapt", "last")
) -> None:
    """Equal to the bit: every figure and every weight."""
    for stage in stages:
        assert losses(one / stage) == losses(other / stage), stage
        ours, theirs = exported(one / stage), exported(other / stage)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.equal(theirs[name]), f"{stage}: {name}"
