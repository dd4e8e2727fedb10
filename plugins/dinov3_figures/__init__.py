"""Figures of a training run: its crops and masks, its curves, and what its patch features see."""

from __future__ import annotations

from dinov3_figures.configs import FiguresConfig
from dinov3_framework import Component, hookimpl

__all__ = ["FiguresConfig"]


@hookimpl
def dinov3_observers() -> list[Component]:
    return [Component("figures", FiguresConfig, "dinov3_figures.observer:Figures")]
