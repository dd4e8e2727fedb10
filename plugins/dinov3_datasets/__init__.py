"""Datasets: folders, lists, archives and tables of images, and a small Fashion-MNIST."""

from __future__ import annotations

from dinov3_datasets.configs import FashionMnistConfig, ImageFolderConfig
from dinov3_datasets.hf_config import HfDatasetConfig
from dinov3_datasets.list_config import ImageListConfig
from dinov3_datasets.webdataset_config import WebDatasetConfig
from dinov3_framework import Component, hookimpl


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [
        Component("image_folder", ImageFolderConfig, "dinov3_datasets.image_folder:ImageFolder"),
        Component("image_list", ImageListConfig, "dinov3_datasets.image_list:ImageList"),
        Component("webdataset", WebDatasetConfig, "dinov3_datasets.webdataset:open_webdataset"),
        Component("hf_dataset", HfDatasetConfig, "dinov3_datasets.hf_dataset:HfDataset"),
        Component("fashion_mnist", FashionMnistConfig, "dinov3_datasets.fashion:FashionMnist"),
    ]
