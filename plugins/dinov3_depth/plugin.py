"""What this package offers."""

from __future__ import annotations

from dinov3_depth.components import COMPONENTS, PUBLISHED
from dinov3_depth.configs_evaluation import DepthConfig
from dinov3_depth.layouts import LAYOUTS
from dinov3_framework import Component, Layout, Published, hookimpl


@hookimpl
def dinov3_heads() -> list[Component]:
    return COMPONENTS


@hookimpl
def dinov3_evaluations() -> list[Component]:
    return [Component("depth", DepthConfig, "dinov3_depth.evaluation:DepthEvaluation")]


@hookimpl
def dinov3_published() -> list[Published]:
    return PUBLISHED


@hookimpl
def dinov3_layouts() -> list[Layout]:
    return LAYOUTS
