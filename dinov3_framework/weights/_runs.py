"""What a run's recipe says of the backbone in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinov3_framework.errors import CheckpointError, UserError
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.registry import Registry
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.locations import RECIPE


def recipe_info(checkpoint: Path, registry: Registry) -> ComponentInfo | None:
    """The backbone of the run that ``checkpoint`` belongs to; None if there is no such recipe.

    The run's folder is the one above ``checkpoints/step_...``.
    """
    recipe = checkpoint.resolve().parent.parent / RECIPE
    if not recipe.is_file():
        return None
    try:
        config = structure_recipe(registry, compose(recipe))
    except (UserError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint} belongs to a run whose recipe cannot be read any more: {error}"
        ) from error
    parts: list[Any] = [
        getattr(config, name, None) for name in ("backbone", "images", "augmentation")
    ]
    if None in parts:
        return None
    backbone, images, augmentation = parts
    component, values = registry.values_of(backbone)
    with torch.device("meta"):
        patch = registry.build(backbone).patch_size
    views = registry.build(augmentation, channels=images.channels, patch_size=patch).views
    provenance = {"checkpoint": checkpoint.name, "run": str(recipe.parent)}
    return ComponentInfo(component, values, images, int(views["global"].size), provenance)
