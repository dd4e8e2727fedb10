"""The backbones of this package by name."""

from __future__ import annotations

from dinov3_framework import Component
from dinov3_vit.configs import PRESETS, VitConfig

_FACTORY = "dinov3_vit.transformer:VisionTransformer"

COMPONENTS = [
    Component("vit", VitConfig, _FACTORY),
    *(Component(name, config, _FACTORY) for name, config in PRESETS.items()),
]
