"""Reports: what is in a dataset, before training; and runs side by side, after it."""

from __future__ import annotations

from dinov3_framework import Component, hookimpl
from dinov3_reports.configs import CompareConfig, InspectConfig

__all__ = ["CompareConfig", "InspectConfig"]


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [
        Component("inspect", InspectConfig, "dinov3_reports.inspect_task:Inspect"),
        Component("compare", CompareConfig, "dinov3_reports.compare_task:Compare"),
    ]
