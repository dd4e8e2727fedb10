"""Datasets: folders of images, satellite scenes, a small Fashion-MNIST; parts and mixtures."""

from __future__ import annotations

from dinov3_datasets.composed_configs import MixtureConfig, SubsetConfig
from dinov3_datasets.configs import FashionMnistConfig, ImageFolderConfig
from dinov3_framework import Component, hookimpl


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [
        Component("image_folder", ImageFolderConfig, "dinov3_datasets.image_folder:ImageFolder"),
        Component("fashion_mnist", FashionMnistConfig, "dinov3_datasets.fashion:FashionMnist"),
        Component("subset", SubsetConfig, "dinov3_datasets.subset:Subset", composes=True),
        Component("mixture", MixtureConfig, "dinov3_datasets.mixture:build_mixture", composes=True),
    ]
