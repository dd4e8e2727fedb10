"""ConvMixer (Trockman and Kolter 2022, "Patches Are All You Need?", arXiv:2201.09792)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_example_plugin import ConvMixerConfig
from dinov3_framework import Backbone, UserError


class MixerBlock(nn.Module):
    """[B, D, h, w] to the same: a depthwise convolution with a residual, then a pointwise one.

    The paper's batch norms are group norms of one group: batches of crops and of half the images
    must not look different to the network.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same")
        self.spatial_norm = nn.GroupNorm(1, dim)
        self.channels = nn.Conv2d(dim, dim, 1)
        self.channels_norm = nn.GroupNorm(1, dim)
        self.activation = nn.GELU()

    def forward(self, maps: Tensor) -> Tensor:
        maps = maps + self.spatial_norm(self.activation(self.spatial(maps)))
        mixed: Tensor = self.channels_norm(self.activation(self.channels(maps)))
        return mixed


class ConvMixer(Backbone):
    """Patch tokens of a fully convolutional network; the class token is their mean.

    There are no storage tokens. Masked patches are replaced by a learnt token before the first
    block, so that a masked image can be completed from its surroundings.
    """

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        self.embed_dim = config.embed_dim
        self.patch_size = config.patch_size
        self.in_chans = 3 if config.in_chans is None else config.in_chans
        self.patch_embed = nn.Conv2d(
            self.in_chans, self.embed_dim, self.patch_size, stride=self.patch_size
        )
        self.mask_token = nn.Parameter(torch.zeros(self.embed_dim))
        self.blocks = nn.ModuleList(
            MixerBlock(self.embed_dim, config.kernel_size) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(self.embed_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal convolutions of standard deviation 0.02, biases 0, norms 1."""
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Tokens of a batch [B, C, H, W], or of a list of batches; see ``Backbone``.

        Raises ``UserError`` where images or masks do not fit the network.
        """
        if isinstance(images, Tensor):
            if masks is not None and not isinstance(masks, Tensor):
                raise UserError("one batch of images takes one mask tensor, not a list of them")
            return self._features(images, masks)
        if masks is None:
            masks = [None] * len(images)
        return [self._features(*pair) for pair in zip(images, masks, strict=True)]

    def _features(self, images: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
        maps = self._embed(images, mask)
        for block in self.blocks:
            maps = block(maps)
        patches = maps.flatten(2).transpose(1, 2)  # [B, P, D]
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
        normalized = self.norm(tokens)
        return {
            "x_norm_clstoken": normalized[:, 0],
            "x_storage_tokens": normalized[:, 1:1],
            "x_norm_patchtokens": normalized[:, 1:],
            "x_prenorm": tokens,
            "masks": mask,
        }

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Patch embeddings [B, D, h, w], masked ones replaced."""
        patch = self.patch_size
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise UserError(
                f"conv_mixer takes images [batch, {self.in_chans}, height, width], got "
                f"{list(images.shape)}; images.channels and in_chans must agree"
            )
        if images.shape[2] % patch or images.shape[3] % patch:
            raise UserError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels are no multiple of "
                f"patch_size = {patch}; resize or crop them"
            )
        maps: Tensor = self.patch_embed(images)
        if mask is None:
            return maps
        if mask.shape != (len(maps), maps[0, 0].numel()):
            raise UserError(
                f"masks are {list(mask.shape)}, the images have {list(maps.shape[2:])} patches"
            )
        hidden = mask.view(len(maps), 1, *maps.shape[2:])
        return torch.where(hidden, self.mask_token.to(maps.dtype)[:, None, None], maps)

    def layer_of(self, name: str) -> tuple[int, int]:
        """Embeddings are layer 0, block i is i + 1, the final norm comes last."""
        last = len(self.blocks) + 1
        part, _, rest = name.partition(".")
        if part in ("patch_embed", "mask_token"):
            return 0, last
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1, last
        return last, last

    def role_of(self, name: str) -> str | None:
        return "patch_embed" if name.startswith("patch_embed.") else None

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        """The mixer blocks."""
        return list(self.blocks)
