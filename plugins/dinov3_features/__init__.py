"""Features of a dataset's images as files: the task ``features``."""

from __future__ import annotations

from dinov3_features.configs import FeaturesTaskConfig
from dinov3_framework import Component, hookimpl


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [Component("features", FeaturesTaskConfig, "dinov3_features.task:FeaturesTask")]
