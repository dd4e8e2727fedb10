"""The heads of this package by name, and their published weights."""

from __future__ import annotations

from dinov3_framework import Component, Published
from dinov3_segment.configs_linear import LinearSegmentationConfig

COMPONENTS: list[Component] = [
    Component(
        "linear_segmentation", LinearSegmentationConfig, "dinov3_segment.linear:LinearSegmentation"
    ),
]

PUBLISHED: list[Published] = []
