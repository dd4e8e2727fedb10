"""Stages one after the other in one command: the task ``pipeline``."""

from __future__ import annotations

from dinov3_framework import Component, hookimpl
from dinov3_pipeline.configs import PipelineConfig


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [Component("pipeline", PipelineConfig, "dinov3_pipeline.task:Pipeline")]
