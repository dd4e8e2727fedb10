"""What an inspection is of: a dataset and an augmentation, given or taken from a recipe."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from dinov3_framework import (
    Augmentation,
    AugmentationConfig,
    DataError,
    Dataset,
    DatasetConfig,
    ImagesConfig,
    Problem,
    RecipeError,
    Registry,
    StreamDataset,
)
from dinov3_reports.configs import InspectConfig

_PATCH = 16  # pixels, where no backbone says
NO_DATASET = (
    "there is nothing to look at: give data=FOLDER, a dataset (dataset.use=...), or a training's "
    "recipe (training=FILE)"
)


@attrs.frozen(eq=False)
class Subject:
    """A dataset, built, and what is made of its images."""

    dataset: Dataset | StreamDataset
    images: ImagesConfig
    augmentation: Augmentation | None

    @property
    def total(self) -> int | None:
        return len(self.dataset) if isinstance(self.dataset, Dataset) else None


def build_subject(config: InspectConfig, registry: Registry) -> Subject:
    """Raises ``DataError`` for data that this machine lacks, ``RecipeError`` for a mistake."""
    images = _images(config)
    augmentation = _augmentation(config)
    made = None
    if augmentation is not None:
        patch = _patch_size(config, registry)
        made = registry.build(augmentation, channels=images.channels, patch_size=patch)
    dataset = registry.build(_dataset(config, registry), channels=images.channels)
    if isinstance(dataset, StreamDataset):
        if config.limit is None:
            message = "a stream has no end, so that not all of it can be looked at"
            raise RecipeError([Problem("limit", message, "say how many samples")])
    elif len(dataset) == 0:
        raise DataError(f"{dataset.describe()}: holds no samples to look at")
    return Subject(dataset, images, made)


def _dataset(config: InspectConfig, registry: Registry) -> DatasetConfig:
    if config.dataset is not None:
        return config.dataset
    if config.recipe is None:
        raise DataError(NO_DATASET)
    dataset = getattr(config.recipe, "dataset", None)
    if not isinstance(dataset, DatasetConfig):
        task = registry.of_config(config.recipe).component.name
        message = f"is one of the task {task}, which has no dataset of its own"
        hint = (
            "take the recipe of a training (of a pipeline: of one of its stages), or give dataset"
        )
        raise RecipeError([Problem("recipe", message, hint)])
    return dataset


def _augmentation(config: InspectConfig) -> AugmentationConfig | None:
    if config.augmentation is not None:
        return config.augmentation
    found = getattr(config.recipe, "augmentation", None)
    return found if isinstance(found, AugmentationConfig) else None


def _images(config: InspectConfig) -> ImagesConfig:
    found = config.images or getattr(config.recipe, "images", None)
    return found if isinstance(found, ImagesConfig) else ImagesConfig()


def _patch_size(config: InspectConfig, registry: Registry) -> int:
    if config.patch_size is not None:
        return config.patch_size
    backbone = getattr(config.recipe, "backbone", None)
    students: Any = getattr(config.recipe, "students", None)
    if backbone is None and students:
        backbone = getattr(next(iter(students.values())), "backbone", None)
    if backbone is None:
        return _PATCH
    with torch.device("meta"):
        return int(registry.build(backbone).patch_size)
