"""What this package offers to the framework."""

from __future__ import annotations

from dinov3_framework import Component, Layout, Published, hookimpl
from dinov3_vit.components import COMPONENTS, PUBLISHED
from dinov3_vit.layouts import LAYOUTS


@hookimpl
def dinov3_backbones() -> list[Component]:
    return COMPONENTS


@hookimpl
def dinov3_layouts() -> list[Layout]:
    return LAYOUTS


@hookimpl
def dinov3_published() -> list[Published]:
    return PUBLISHED
