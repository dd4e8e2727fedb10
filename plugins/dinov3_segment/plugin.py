"""What this package offers."""

from __future__ import annotations

from dinov3_framework import Component, Layout, Published, hookimpl
from dinov3_segment.components import COMPONENTS, PUBLISHED
from dinov3_segment.configs_evaluation import SegmentationConfig
from dinov3_segment.layouts import LAYOUTS


@hookimpl
def dinov3_heads() -> list[Component]:
    return COMPONENTS


@hookimpl
def dinov3_evaluations() -> list[Component]:
    return [
        Component(
            "segmentation",
            SegmentationConfig,
            "dinov3_segment.evaluation:SegmentationEvaluation",
        ),
    ]


@hookimpl
def dinov3_published() -> list[Published]:
    return PUBLISHED


@hookimpl
def dinov3_layouts() -> list[Layout]:
    return LAYOUTS
