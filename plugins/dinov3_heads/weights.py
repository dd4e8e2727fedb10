"""Heads in files: what these say of them, and how they are loaded onto a backbone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import attrs

from dinov3_framework import (
    Backbone,
    Head,
    ImagesConfig,
    Registry,
    Subject,
)
from dinov3_framework.parallel.sharder import initialise
from dinov3_framework.weights.info import BackboneInfo
from dinov3_framework.weights.loading import describe_backbone, load_placed

HEAD, BACKBONE = "exports/head.safetensors", "exports/backbone.safetensors"


@attrs.frozen
class Loaded:
    backbone: Backbone
    images: ImagesConfig
    size: int | None
    provenance: Mapping[str, str]
    component: str
    config: Any
    name: str


def describe_recipe_backbone(config: Any, registry: Registry, simulated: bool = False) -> Loaded:
    s = Subject.described(config, registry)
    if config.weights is None:
        from dinov3_framework.configs import replace

        c = replace(config.backbone, in_chans=s.images.channels)
        comp = registry.of_config(c).component.name
    else:
        d = describe_backbone(config.weights, registry=registry)
        c, comp = d.config, d.component
    return Loaded(s.backbone, s.images, s.size, dict(s.origin), comp, c, s.name)


def load_recipe_backbone(
    config: Any, registry: Registry, device="auto", sharder=None, trains=False
) -> Loaded:
    d = describe_recipe_backbone(config, registry)
    if sharder is None:
        s = Subject.opened(config, registry, device)
        return attrs.evolve(d, backbone=s.backbone)
    if config.weights is not None:
        return attrs.evolve(
            d, backbone=load_placed(config.weights, sharder=sharder, registry=registry).backbone
        )
    b = sharder.place(copy.deepcopy(d.backbone), trains=trains)
    initialise(b, d.backbone, Subject.seed(config))
    return attrs.evolve(d, backbone=b.eval())


@attrs.frozen
class LoadedHead:
    """A head with what it was trained on."""

    head: Head
    info: BackboneInfo

    @property
    def size(self) -> int | None:
        return self.info.size or None

    name = "head"
    provenance = {}


def head_info(component, config, images, size, targets, provenance):
    return BackboneInfo(
        component,
        config,
        images,
        size,
        {**provenance, "targets": json.dumps({n: attrs.asdict(t) for n, t in targets.items()})},
    )
