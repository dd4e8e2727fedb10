"""The plugin of small heads, and the recipe that trains one, in this process."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from run_support import HERE, PLUGINS

from dinov3_framework import Registry
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe

RECIPE = HERE / "tiny_head.toml"

SEGMENTATION = (
    "head.use=toy_segmentation",
    "head.layers=[0, 1]",
    "observers.score.evaluations.val.target=mask",
)
TUNED = ("tune_backbone=true",)


@cache
def registry() -> Registry:
    """All plugins, and the tests' own."""
    sys.path[:0] = PLUGINS
    try:
        import dinov3_toy_heads  # noqa: F401

        return Registry.load()
    finally:
        del sys.path[: len(PLUGINS)]


def recipe(*overrides: str) -> Any:
    """The config of the tiny training of a head."""
    return structure_recipe(registry(), compose(RECIPE, overrides))


def task(*overrides: str) -> Any:
    return registry().build(recipe(*overrides), registry=registry())
