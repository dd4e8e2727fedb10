"""What this package offers to the framework."""

from __future__ import annotations

from dinov3_convnext.components import COMPONENTS, PUBLISHED
from dinov3_convnext.layouts import LAYOUTS
from dinov3_framework import Component, Layout, Published, hookimpl


@hookimpl
def dinov3_backbones() -> list[Component]:
    return COMPONENTS


@hookimpl
def dinov3_layouts() -> list[Layout]:
    return LAYOUTS


@hookimpl
def dinov3_published() -> list[Published]:
    return PUBLISHED
