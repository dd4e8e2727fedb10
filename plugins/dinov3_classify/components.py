"""The heads of this package by name, and their published weights."""

from __future__ import annotations

from dinov3_classify.configs_heads import (
    AttentiveProbeConfig,
    LinearClassifierConfig,
    LinearProbesConfig,
)
from dinov3_framework import Component, Published, PublishedFile

COMPONENTS = [
    Component(
        "linear_classifier", LinearClassifierConfig, "dinov3_classify.heads:LinearClassifier"
    ),
    Component("attentive_probe", AttentiveProbeConfig, "dinov3_classify.heads:AttentiveProbe"),
    Component("linear_probes", LinearProbesConfig, "dinov3_classify.probes:LinearProbes"),
]

_FILE = "dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth"

PUBLISHED: list[Published] = [
    # On the LVD-1689M weights of ViT-7B/16, trained on ImageNet-1k.
    Published(
        "dinov3_vit7b16_lc",
        {
            "IMAGENET1K": PublishedFile(
                _FILE,
                LinearClassifierConfig(),
                url=f"https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/{_FILE}",
            )
        },
        kind="head",
    )
]
