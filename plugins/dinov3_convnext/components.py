"""All that this package offers: backbones, the files they are kept in, and published weights."""

from __future__ import annotations

from dinov3_convnext.configs import PRESETS, ConvNextConfig
from dinov3_convnext.layouts import LAYOUTS
from dinov3_convnext.published import PUBLISHED
from dinov3_framework import Component

__all__ = ["COMPONENTS", "LAYOUTS", "PUBLISHED"]

_FACTORY = "dinov3_convnext.network:ConvNeXt"

COMPONENTS = [
    Component("convnext", ConvNextConfig, _FACTORY),
    *(Component(name, config, _FACTORY) for name, config in PRESETS.items()),
]
