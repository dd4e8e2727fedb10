"""The heads of this package by name, and their published weights."""

from __future__ import annotations

from dinov3_framework import Component, Published, PublishedFile
from dinov3_segment.configs_linear import LinearSegmentationConfig
from dinov3_segment.configs_mask2former import Mask2FormerConfig
from dinov3_segment.configs_plain import PlainMaskTransformerConfig

COMPONENTS: list[Component] = [
    Component(
        "linear_segmentation", LinearSegmentationConfig, "dinov3_segment.linear:LinearSegmentation"
    ),
    Component("mask2former", Mask2FormerConfig, "dinov3_segment.mask2former:Mask2Former"),
    Component(
        "plain_mask_transformer",
        PlainMaskTransformerConfig,
        "dinov3_segment.plain_mask:PlainMaskTransformer",
    ),
]

_FILE = "dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth"

PUBLISHED: list[Published] = [
    # On the LVD-1689M weights of ViT-7B/16, trained on ADE20K.
    Published(
        "dinov3_vit7b16_ms",
        {
            "ADE20K": PublishedFile(
                _FILE,
                Mask2FormerConfig(),
                size=896,
                url=f"https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/{_FILE}",
            )
        },
        kind="head",
    )
]
