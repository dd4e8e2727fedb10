"""The smallest network that keeps the contract of a backbone, for observers to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone

PATCH_SIZE = 4


class ToyBackbone(Backbone):
    """Patches through one convolution; the class token is their mean; no storage tokens."""

    patch_size = PATCH_SIZE
    embed_dim = 8

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.patch_embed = nn.Conv2d(in_chans, self.embed_dim, PATCH_SIZE, stride=PATCH_SIZE)
        self.mask_token = nn.Parameter(torch.zeros(self.embed_dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.normal_(self.patch_embed.weight, std=0.1)
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.mask_token)

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Any:
        if not isinstance(images, Tensor):
            given = masks if masks is not None else [None] * len(images)
            return [self.forward_features(*pair) for pair in zip(images, given, strict=True)]
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        if isinstance(masks, Tensor):
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
        return {
            "x_norm_clstoken": tokens[:, 0],
            "x_storage_tokens": tokens[:, 1:1],
            "x_norm_patchtokens": tokens[:, 1:],
            "x_prenorm": tokens,
            "masks": masks,
        }
