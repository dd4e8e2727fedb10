"""The families of backbones, small, for tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dinov3_convnext.configs
import dinov3_vit.configs
import pytest
import torch
from attrs import frozen
from dinov3_convnext.configs import ConvNextConfig
from dinov3_convnext.network import ConvNeXt
from dinov3_vit.configs import VitConfig
from dinov3_vit.transformer import VisionTransformer
from torch import Tensor, nn


@frozen(eq=False)
class Family:
    """A network, its configs, and the options that make it small, random or without scales."""

    name: str
    network: type[Any]
    config: type[Any]
    presets: Mapping[str, type[Any]]
    small: Mapping[str, Any]
    scale: str  # the option of the initial layer scale
    random: Mapping[str, Any]  # what makes passes random in training
    patch: int
    n_layers: int

    def build(self, **options: Any) -> Any:
        """A small one, drawn from seed 0, with a layer scale that lets every block be seen."""
        torch.manual_seed(0)
        return self.network(self.config(**{**self.small, self.scale: 0.5, **options}))

    def images(self, samples: int, patches: int = 4, channels: int = 3) -> Tensor:
        side = patches * self.patch
        generator = torch.Generator().manual_seed(samples * side)
        return torch.randn(samples, channels, side, side, generator=generator)

    def crops(self) -> list[Tensor]:
        """A batch of global and one of local crops."""
        return [self.images(4), self.images(6, patches=2)]

    def total(self, model: Any, seed: int = 3) -> Tensor:
        """A scalar of everything a pass gives, with its random draws fixed."""
        torch.manual_seed(seed)
        masks = [torch.arange(4 * 16).view(4, 16) % 3 == 0, None] if model.takes_masks else None
        total: Tensor = sum(
            (output[name].float() ** 3).mean()
            for output in model.forward_features(self.crops(), masks)
            for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm")
        )
        return total


VIT = Family(
    name="vit",
    network=VisionTransformer,
    config=VitConfig,
    presets=dinov3_vit.configs.PRESETS,
    small={"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
    scale="layerscale_init",
    random={"drop_path_rate": 0.5, "pos_embed_rope_rescale_coords": 2.0},
    patch=8,
    n_layers=3,
)
CONVNEXT = Family(
    name="convnext",
    network=ConvNeXt,
    config=ConvNextConfig,
    presets=dinov3_convnext.configs.PRESETS,
    small={"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)},
    scale="layer_scale_init_value",
    random={"drop_path_rate": 0.6},
    patch=32,
    n_layers=4,
)
FAMILIES = [VIT, CONVNEXT]
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
