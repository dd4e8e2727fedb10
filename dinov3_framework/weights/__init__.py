"""Weights in files: recognized, read strictly, and written, whatever format they are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3_framework.registry import Registry

# What is written besides the formats of layouts and of plugins' writers.
OWN_FORMATS = ("dinov3_framework", "meta", "reference", "checkpoint")


def formats(registry: Registry) -> list[str]:
    """The formats that weights of backbones can be written in, sorted."""
    layouts = (layout.format for layout in registry.layouts if layout.kind == "backbone")
    return sorted({*OWN_FORMATS, *registry.weights_writers, *layouts})
