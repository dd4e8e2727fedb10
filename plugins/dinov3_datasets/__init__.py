"""Datasets: folders of images, and a small Fashion-MNIST that needs no download."""

from __future__ import annotations

from dinov3_datasets.configs import FashionMnistConfig, ImageFolderConfig
from dinov3_framework import Component, hookimpl


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [
        Component("image_folder", ImageFolderConfig, "dinov3_datasets.image_folder:ImageFolder"),
        Component("fashion_mnist", FashionMnistConfig, "dinov3_datasets.fashion:FashionMnist"),
    ]
