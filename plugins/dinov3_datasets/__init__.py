"""Datasets: folders, lists, archives and tables of images, scenes, ImageNet; parts, mixtures.

And the task ``index``, which writes what some of them need beside their data.
"""

from __future__ import annotations

from dinov3_datasets.composed_configs import MixtureConfig, SubsetConfig
from dinov3_datasets.configs import FashionMnistConfig, ImageFolderConfig, IndexConfig
from dinov3_datasets.depth_configs import DepthFolderConfig, NyuDepthConfig
from dinov3_datasets.hf_config import HfDatasetConfig
from dinov3_datasets.imagenet_configs import (
    Imagenet1kConfig,
    Imagenet22kConfig,
    ImagenetV2Config,
)
from dinov3_datasets.list_config import ImageListConfig
from dinov3_datasets.mask_configs import (
    Ade20kConfig,
    CityscapesConfig,
    MaskFolderConfig,
    PascalVocConfig,
)
from dinov3_datasets.scene_configs import GeotiffScenesConfig
from dinov3_datasets.webdataset_config import WebDatasetConfig
from dinov3_framework import Component, hookimpl


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [
        Component("image_folder", ImageFolderConfig, "dinov3_datasets.image_folder:ImageFolder"),
        Component("image_list", ImageListConfig, "dinov3_datasets.image_list:ImageList"),
        Component("webdataset", WebDatasetConfig, "dinov3_datasets.webdataset:open_webdataset"),
        Component("hf_dataset", HfDatasetConfig, "dinov3_datasets.hf_dataset:HfDataset"),
        Component("imagenet_1k", Imagenet1kConfig, "dinov3_datasets.imagenet_1k:Imagenet1k"),
        Component("imagenet_v2", ImagenetV2Config, "dinov3_datasets.imagenet_v2:ImagenetV2"),
        Component("imagenet_22k", Imagenet22kConfig, "dinov3_datasets.imagenet_22k:Imagenet22k"),
        Component("fashion_mnist", FashionMnistConfig, "dinov3_datasets.fashion:FashionMnist"),
        Component(
            "geotiff_scenes", GeotiffScenesConfig, "dinov3_datasets.geotiff_scenes:GeotiffScenes"
        ),
        Component(
            "image_mask_folder",
            MaskFolderConfig,
            "dinov3_datasets.image_mask_folder:ImageMaskFolder",
        ),
        Component(
            "image_depth_folder",
            DepthFolderConfig,
            "dinov3_datasets.image_depth_folder:ImageDepthFolder",
        ),
        Component("ade20k", Ade20kConfig, "dinov3_datasets.published_masks:open_ade20k"),
        Component(
            "cityscapes", CityscapesConfig, "dinov3_datasets.published_masks:open_cityscapes"
        ),
        Component("pascal_voc", PascalVocConfig, "dinov3_datasets.published_masks:open_pascal_voc"),
        Component("nyu_depth", NyuDepthConfig, "dinov3_datasets.nyu_depth:open_nyu_depth"),
        Component("subset", SubsetConfig, "dinov3_datasets.subset:Subset", composes=True),
        Component("mixture", MixtureConfig, "dinov3_datasets.mixture:build_mixture", composes=True),
    ]


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [Component("index", IndexConfig, "dinov3_datasets.index_task:IndexTask")]
