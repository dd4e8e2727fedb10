"""The engine: everything between a checked recipe and its results; and the tasks it offers."""

from __future__ import annotations

from dinov3_framework.components import Component
from dinov3_framework.engine.extraction.settings import FeaturesTaskConfig
from dinov3_framework.engine.pipeline_settings import PipelineConfig
from dinov3_framework.engine.settings import DistillConfig, MultiDistillConfig, PretrainConfig
from dinov3_framework.hookspecs import hookimpl


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [
        Component(
            "features", FeaturesTaskConfig, "dinov3_framework.engine.extraction.task:FeaturesTask"
        ),
        Component("distill", DistillConfig, "dinov3_framework.engine.distill:Distill"),
        Component(
            "multi_distill",
            MultiDistillConfig,
            "dinov3_framework.engine.multi_distill:MultiDistill",
        ),
        Component("pipeline", PipelineConfig, "dinov3_framework.engine.pipeline:Pipeline"),
        Component("pretrain", PretrainConfig, "dinov3_framework.engine.pretrain:Pretrain"),
    ]
