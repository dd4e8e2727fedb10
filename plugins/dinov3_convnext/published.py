"""The published weights: distilled from the ViT-7B on LVD-1689M, images from the web."""

from __future__ import annotations

from dinov3_convnext.configs import PRESETS
from dinov3_framework import Published, PublishedFile

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
