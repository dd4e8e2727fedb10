"""The backbones of this package by name, and their published weights.

LVD-1689M are photographs from the web, SAT-493M satellite images.
"""

from __future__ import annotations

from dinov3_framework import SATELLITE_IMAGES, WEB_IMAGES, Component, Published, PublishedFile
from dinov3_vit.configs import (
    PRESETS,
    Vit7bConfig,
    VitBaseConfig,
    VitConfig,
    VitHugePlusConfig,
    VitLargeConfig,
    VitLargePlusConfig,
    VitSmallConfig,
    VitSmallPlusConfig,
)

_FACTORY = "dinov3_vit.transformer:VisionTransformer"

COMPONENTS = [
    Component("vit", VitConfig, _FACTORY),
    *(Component(name, config, _FACTORY) for name, config in PRESETS.items()),
]

_IMAGES = {"LVD1689M": WEB_IMAGES, "SAT493M": SATELLITE_IMAGES}


def _published(name: str, **weights: tuple[VitConfig, str]) -> Published:
    """``weights`` are a config and a digest by training set."""
    files = {
        trained_on: PublishedFile(
            file=f"{name}_pretrain_{trained_on.lower()}-{digest}.pth",
            config=config,
            images=_IMAGES[trained_on],
        )
        for trained_on, (config, digest) in weights.items()
    }
    return Published(name, files)


PUBLISHED: list[Published] = [
    _published("dinov3_vits16", LVD1689M=(VitSmallConfig(), "08c60483")),
    _published("dinov3_vits16plus", LVD1689M=(VitSmallPlusConfig(), "4057cbaa")),
    _published("dinov3_vitb16", LVD1689M=(VitBaseConfig(), "73cec8be")),
    _published(
        "dinov3_vitl16",
        LVD1689M=(VitLargeConfig(), "8aa4cbdd"),
        SAT493M=(VitLargeConfig(untie_global_and_local_cls_norm=True), "eadcf0ff"),
    ),
    _published("dinov3_vitl16plus", LVD1689M=(VitLargePlusConfig(), "46503df0")),
    _published("dinov3_vith16plus", LVD1689M=(VitHugePlusConfig(), "7c1da9a5")),
    _published(
        "dinov3_vit7b16",
        LVD1689M=(Vit7bConfig(), "a955f4ea"),
        SAT493M=(Vit7bConfig(), "a6675841"),
    ),
]
