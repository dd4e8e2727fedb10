"""What a run's recipe says of the backbone in its checkpoints."""

from __future__ import annotations

from pathlib import Path

import tomli
import torch

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import CheckpointError, UserError
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.registry import Registry
from dinov3_framework.weights.info import BackboneInfo
from dinov3_framework.weights.locations import RECIPE


def recipe_info(checkpoint: Path, registry: Registry) -> BackboneInfo | None:
    """The backbone of the run that ``checkpoint`` belongs to; None if there is no such recipe.

    The run's folder is the one above ``checkpoints/step_...``.
    """
    recipe = checkpoint.resolve().parent.parent / RECIPE
    if not recipe.is_file():
        return None
    try:
        config = structure_recipe(registry, compose(recipe))
    except (UserError, OSError, tomli.TOMLDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint} belongs to a run whose recipe cannot be read any more: {error}"
        ) from error
    backbone, images = getattr(config, "backbone", None), getattr(config, "images", None)
    if backbone is None or not isinstance(images, ImagesConfig):
        return None
    component, values = registry.values_of(backbone)
    return BackboneInfo(
        component=component,
        config=values,
        images=images,
        size=_trained_size(registry, config),
        provenance={"checkpoint": checkpoint.name, "run": str(recipe.parent)},
    )


def _trained_size(registry: Registry, config: object) -> int:
    """Pixels of the global crops of a training recipe."""
    images, augmentation = config.images, config.augmentation  # type: ignore[attr-defined]
    with torch.device("meta"):
        backbone = registry.build(config.backbone)  # type: ignore[attr-defined]
    built = registry.build(augmentation, channels=images.channels, patch_size=backbone.patch_size)
    return int(built.views["global"].size)
