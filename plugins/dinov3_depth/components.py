"""The heads of this package by name, and their published weights."""

from __future__ import annotations

from dinov3_depth.configs_heads import CHMV2, SYNTHMIX, DptDepthConfig, LinearDepthConfig
from dinov3_framework import Component, ImagesConfig, Published, PublishedFile

COMPONENTS: list[Component] = [
    Component("linear_depth", LinearDepthConfig, "dinov3_depth.linear:LinearDepth"),
    Component("dpt_depth", DptDepthConfig, "dinov3_depth.dpt:DptDepth"),
]

_AT = "https://dl.fbaipublicfiles.com/dinov3"
_SYNTHMIX = "dinov3_vit7b16_synthmix_dpt_head-02040be1.pth"
_CHMV2 = "dinov3_vitl16_chmv2_dpt_head-3703d643.pth"

# Its published examples subtract a red of 0.420; the backbone was trained with 0.430.
CANOPY_IMAGES = ImagesConfig(mean=(0.420, 0.411, 0.296), std=(0.213, 0.156, 0.143))

PUBLISHED: list[Published] = [
    # On the LVD-1689M weights of ViT-7B/16, trained on a mixture of synthetic images.
    Published(
        "dinov3_vit7b16_dd",
        {
            "SYNTHMIX": PublishedFile(
                _SYNTHMIX, SYNTHMIX, size=768, url=f"{_AT}/dinov3_vit7b16/{_SYNTHMIX}"
            )
        },
        kind="head",
    ),
    # On the SAT-493M weights of ViT-L/16: heights of trees from satellite images.
    Published(
        "dinov3_vitl16_chmv2",
        {
            "CHMV2": PublishedFile(
                _CHMV2, CHMV2, CANOPY_IMAGES, size=416, url=f"{_AT}/chmv2/{_CHMV2}"
            )
        },
        kind="head",
    ),
]
