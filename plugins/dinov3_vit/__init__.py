"""Vision Transformers with axial RoPE and storage tokens: DINOv3's own, and any other size."""

from __future__ import annotations

from dinov3_framework import Component, hookimpl
from dinov3_vit.configs import PRESETS, VitConfig

FACTORY = "dinov3_vit.transformer:VisionTransformer"


@hookimpl
def dinov3_backbones() -> list[Component]:
    return [
        Component("vit", VitConfig, FACTORY),
        *(Component(name, config, FACTORY) for name, config in PRESETS.items()),
    ]
