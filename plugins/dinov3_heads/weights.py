"""Heads in files: what these say of them, and how they are loaded onto a backbone."""

from __future__ import annotations

import json

import attrs

from dinov3_framework import Head
from dinov3_framework.weights.info import BackboneInfo

HEAD, BACKBONE = "exports/head.safetensors", "exports/backbone.safetensors"


@attrs.frozen
class LoadedHead:
    """A head with what it was trained on."""

    head: Head
    info: BackboneInfo

    @property
    def size(self) -> int | None:
        return self.info.size or None

    name = "head"
    provenance: Mapping[str, str] = {}


def head_info(component, config, images, size, targets, provenance):
    return BackboneInfo(
        component,
        config,
        images,
        size,
        {**provenance, "targets": json.dumps({n: attrs.asdict(t) for n, t in targets.items()})},
    )
