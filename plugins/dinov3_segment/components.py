"""The heads of this package by name, and their published weights."""

from __future__ import annotations

from dinov3_framework import Component, Published
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

PUBLISHED: list[Published] = []
