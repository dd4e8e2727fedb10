"""Plots of a training run: crops, masks and metrics; and what a backbone's patch features see."""

from __future__ import annotations

from dinov3_figures.configs import FiguresConfig, VisualizeConfig
from dinov3_framework import Component, hookimpl

__all__ = ["FiguresConfig", "VisualizeConfig"]


@hookimpl
def dinov3_observers() -> list[Component]:
    return [Component("figures", FiguresConfig, "dinov3_figures.observer:Plots")]


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [Component("visualize", VisualizeConfig, "dinov3_figures.task:Visualize")]
