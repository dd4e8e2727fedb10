"""A backbone small enough to see through, and its export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig, config, option
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.kinds import BackboneConfig, Component
from dinov3_framework.parallel.state_dicts import full_state_dict
from dinov3_framework.registry import Registry
from dinov3_framework.weights.export import export_backbone

GRAY = ImagesConfig(channels=1, mean=(0.25,), std=(0.5,))


@config
class TinyConfig(BackboneConfig):
    """A backbone of one convolution."""

    embed_dim: int = option("width", default=6)
    scales: tuple[float, ...] = option("factors", default=(1.0, 2.0))
    hidden_buffer: bool = option(
        "whether to have a buffer that state dicts leave out", default=False
    )


class Tiny(Backbone):
    """Class token: the mean over patches of one convolution, with a scale and an offset."""

    patch_size = 4

    def __init__(self, settings: TinyConfig) -> None:
        super().__init__()
        self.in_chans = settings.in_chans or 3
        self.embed_dim = settings.embed_dim
        self.scales = settings.scales
        self.proj = nn.Conv2d(self.in_chans, self.embed_dim, 4, stride=4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("offset", torch.empty(self.embed_dim))
        if settings.hidden_buffer:
            self.register_buffer("hidden", torch.empty(self.embed_dim), persistent=False)

    def init_weights(self) -> None:
        nn.init.normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.offset.copy_(torch.arange(float(self.embed_dim)))
        if hasattr(self, "hidden"):
            self.hidden.fill_(3.0)

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> dict[str, Tensor]:
        tokens = self.drop(self.proj(images)).flatten(2).mean(2) + self.offset
        if hasattr(self, "hidden"):
            tokens = tokens + self.hidden
        return {"x_norm_clstoken": tokens * sum(self.scales)}


def tiny_registry() -> Registry:
    registry = Registry()
    registry.add("backbone", Component("tiny", TinyConfig, Tiny), "test", "tests")
    return registry


def build(registry: Registry, **values: Any) -> Tiny:
    torch.manual_seed(0)
    backbone = registry.build("backbone", "tiny", **values)
    backbone.init_weights()
    return backbone.eval()


def export(
    path: Path,
    backbone: nn.Module,
    images: ImagesConfig | None = None,
    state: dict[str, Tensor] | None = None,
    **values: Any,
) -> Path:
    export_backbone(
        path,
        full_state_dict(backbone) if state is None else state,
        component="tiny",
        config=values,
        images=images or ImagesConfig(),
        size=16,
        provenance={"run": "a test", "iterations": "7"},
    )
    return path


def pictures(count: int = 5, channels: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
