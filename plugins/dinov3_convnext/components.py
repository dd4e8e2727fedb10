"""The backbones of this package by name, and their published weights.

Those were distilled from the ViT-7B on LVD-1689M, images from the web.
"""

from __future__ import annotations

from dinov3_convnext.configs import PRESETS, ConvNextConfig
from dinov3_framework import Component, Published, PublishedFile

_FACTORY = "dinov3_convnext.network:ConvNeXt"

COMPONENTS = [
    Component("convnext", ConvNextConfig, _FACTORY),
    *(Component(name, config, _FACTORY) for name, config in PRESETS.items()),
]

# First digits of each file's SHA-256.
_DIGESTS = {
    "convnext_tiny": "21b726bb",
    "convnext_small": "296db49d",
    "convnext_base": "801f2ba9",
    "convnext_large": "61fa432d",
}

PUBLISHED = [
    Published(
        f"dinov3_{name}",
        {
            "LVD1689M": PublishedFile(
                f"dinov3_{name}_pretrain_lvd1689m-{digest}.pth", PRESETS[name]()
            )
        },
    )
    for name, digest in _DIGESTS.items()
]
