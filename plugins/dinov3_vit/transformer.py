"""The Vision Transformer: tokens of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework import Backbone, UserError
from dinov3_vit.block import Block
from dinov3_vit.configs import VitConfig
from dinov3_vit.layers import NORMS, LayerScale, MaskedKeyBiasLinear, PatchEmbed
from dinov3_vit.rope import RotaryPositions, RotaryTable

Features = dict[str, Tensor | None]


class VisionTransformer(Backbone):
    """Class, storage and patch tokens of images, in this order in a sequence.

    State-dict names are those of DINOv3's published checkpoints. The module is initialized when
    built; on the meta device, call ``to_empty`` and ``init_weights`` (or load weights).
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        dim = self.embed_dim = config.embed_dim
        self.patch_size = config.patch_size
        self.in_chans = 3 if config.in_chans is None else config.in_chans
        self.n_storage_tokens = config.n_storage_tokens
        self.n_layers = config.depth
        norm = NORMS[config.norm_layer]

        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if self.n_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.zeros(1, self.n_storage_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(self.in_chans, dim, self.patch_size)
        self.rope_embed = RotaryPositions(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = norm(dim)
        self.cls_norm = norm(dim) if config.untie_cls_and_patch_norms else None
        self.local_cls_norm = norm(dim) if config.untie_global_and_local_cls_norm else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Give every parameter and buffer its initial value."""
        nn.init.normal_(self.cls_token, std=0.02)
        if self.n_storage_tokens:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, MaskedKeyBiasLinear):
                    module.init_mask()
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, PatchEmbed | LayerScale | RotaryPositions):
                module.init_weights()

    # ----------------------------------------------------------------------- features
    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Tokens of a batch [B, C, H, W], or of several batches of other sizes in one pass.

        ``masks``, bool [B, P], replaces patches by the mask token. Each batch gives a dict:
        ``x_norm_clstoken`` [B, D], ``x_storage_tokens`` [B, R, D], ``x_norm_patchtokens``
        [B, P, D] (all three after the final norm), ``x_prenorm`` [B, 1 + R + P, D], ``masks``.

        Several batches are a list, and so are the masks and the result; the first batch holds
        global crops, those after it local crops. In training, the random changes of RoPE's
        coordinates are drawn once per batch and pass, and hold for all blocks.

        Raises ``UserError`` where images, masks and this model do not fit together.
        """
        if isinstance(images, Tensor):
            if masks is not None and not isinstance(masks, Tensor):
                raise UserError("one batch of images takes one mask tensor, not a list of them")
            return self._features([images], [masks])[0]
        if masks is None:
            masks = [None] * len(images)
        if isinstance(masks, Tensor) or len(masks) != len(images):
            raise UserError(
                f"{len(images)} batches of images take a list of {len(images)} masks (or None)"
            )
        return self._features(images, masks)

    def _features(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Features]:
        batches, tables = self._embed(images, masks)
        for block in self.blocks:
            batches = block(batches, tables)
        return [
            self._named(tokens, mask, local=index > 0)
            for index, (tokens, mask) in enumerate(zip(batches, masks, strict=True))
        ]

    def _named(self, tokens: Tensor, mask: Tensor | None, local: bool) -> Features:
        cls, storage, patches = self._normalize(tokens, local)
        return {
            "x_norm_clstoken": cls,
            "x_storage_tokens": storage,
            "x_norm_patchtokens": patches,
            "x_prenorm": tokens,
            "masks": mask,
        }

    def _normalize(self, tokens: Tensor, local: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Class token, storage tokens and patches, each after their final norm.

        Tensors of their own, not views of one: a sharded network warns of those.
        """
        summary_norm = self.cls_norm
        if local and self.training and self.local_cls_norm is not None:
            summary_norm = self.local_cls_norm
        summary_norm = summary_norm or self.norm
        cls, storage, patches = self._parts(tokens)
        return summary_norm(cls), summary_norm(storage), self.norm(patches)

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class token [B, D], storage tokens [B, R, D] and patches [B, P, D] as views."""
        leading = 1 + self.n_storage_tokens
        sizes = [1, self.n_storage_tokens, tokens.shape[1] - leading]
        cls, storage, patches = torch.split(tokens, sizes, dim=1)
        return cls[:, 0], storage, patches

    def get_intermediate_layers(
        self,
        images: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """What blocks put out, in the network's order; blocks after the last of them do not run.

        ``n`` is a number of last blocks, or the blocks' indices from 0. Each gives its patches
        [B, P, D], or [B, D, H, W] with ``reshape``; with ``return_class_token`` and
        ``return_extra_tokens`` a tuple of patches, class token [B, D] and storage tokens [B, R, D].
        ``norm`` applies the final norm to all of them.
        """
        wanted = self._blocks_wanted(n)
        batches, tables = self._embed([images], [None])
        outputs = []
        for index in range(max(wanted) + 1):
            batches = self.blocks[index](batches, tables)
            if index in wanted:
                outputs.append(batches[0])
        grid = self._grid(images)
        return tuple(
            self._intermediate(tokens, grid, reshape, return_class_token, return_extra_tokens, norm)
            for tokens in outputs
        )

    def _intermediate(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        reshape: bool,
        with_class: bool,
        with_storage: bool,
        norm: bool,
    ) -> Any:
        cls, storage, patches = self._normalize(tokens) if norm else self._parts(tokens)
        if reshape:
            patches = patches.transpose(1, 2).reshape(patches.shape[0], -1, *grid)
        parts = [patches]
        if with_class:
            parts.append(cls)
        if with_storage:
            parts.append(storage)
        return tuple(parts) if len(parts) > 1 else patches

    def _blocks_wanted(self, n: int | Sequence[int]) -> set[int]:
        depth = len(self.blocks)
        wanted = set(range(depth - n, depth) if isinstance(n, int) else n)
        if not wanted or not wanted <= set(range(depth)):
            raise UserError(
                f"intermediate layers n = {n}: this model has blocks 0 to {depth - 1}; name some "
                f"of them, or say how many of the last ones (1 to {depth})"
            )
        return wanted

    # ----------------------------------------------------------------------- tokens
    def _embed(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[RotaryTable]]:
        tables = [self.rope_embed(*self._grid(batch)) for batch in images]
        tokens = [self._tokens(batch, mask) for batch, mask in zip(images, masks, strict=True)]
        return tokens, tables

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Patches along height and width of images that fit this model."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise UserError(
                f"images of shape {list(images.shape)}: this backbone takes [batch, "
                f"{self.in_chans}, height, width]; images.channels and the backbone's in_chans "
                "must agree"
            )
        height, width = images.shape[-2:]
        patch = self.patch_size
        if height % patch or width % patch:
            fitting = " x ".join(str(max(side // patch, 1) * patch) for side in (height, width))
            raise UserError(
                f"images of {height} x {width} pixels (height x width) are not a multiple of the "
                f"patch size {patch}; resize or crop them, to {fitting} for instance"
            )
        return height // patch, width // patch

    def _tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Class, storage and patch tokens [B, 1 + R + P, D]."""
        patches = self.patch_embed(images)
        if mask is not None:
            if mask.shape != patches.shape[:2] or mask.dtype != torch.bool:
                raise UserError(
                    f"masks are {mask.dtype} {list(mask.shape)}; these images take torch.bool "
                    f"{list(patches.shape[:2])}, one value for each patch"
                )
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        leading = [self.cls_token]
        if self.n_storage_tokens:
            leading.append(self.storage_tokens)
        expanded = [token.to(patches.dtype).expand(patches.shape[0], -1, -1) for token in leading]
        return torch.cat([*expanded, patches], dim=1)

    # ----------------------------------------------------------------------- for the engine
    def layer_of(self, name: str) -> tuple[int, int]:
        """(layer, layers): embeddings 0, block i is i + 1, final norms ``layers`` = depth + 1."""
        last = len(self.blocks) + 1
        part, _, rest = name.partition(".")
        if part in ("patch_embed", "cls_token", "storage_tokens", "mask_token", "rope_embed"):
            return 0, last
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1, last
        return last, last

    def role_of(self, name: str) -> str | None:
        return "patch_embed" if name.startswith("patch_embed.") else None

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        """The transformer blocks."""
        return list(self.blocks)
