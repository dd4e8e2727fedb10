"""A transformer block that takes several crop batches at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dinov3_vit.configs import VitConfig
from dinov3_vit.layers import NORMS, Attention, LayerScale, build_ffn, concatenate, separate
from dinov3_vit.rope import RotaryTable

Branch = Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]


class Block(nn.Module):
    """Attention and FFN, each normalized before and added to the tokens.

    Crops of other sizes come as other batches: attention stays within a crop, while norms and
    linear layers see the tokens of all batches together, in one call of the module, so that a
    sharded block is gathered once.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.layerscale_init
        self.drop_path_rate = config.drop_path_rate
        self.norm1 = NORMS[config.norm_layer](dim)
        self.attn = Attention(config)
        self.ls1 = LayerScale(dim, scale) if scale else nn.Identity()
        self.norm2 = NORMS[config.norm_layer](dim)
        self.mlp = build_ffn(config)
        self.ls2 = LayerScale(dim, scale) if scale else nn.Identity()

    def forward(self, batches: Sequence[Tensor], tables: Sequence[RotaryTable]) -> list[Tensor]:
        """Batches of tokens [B, N, D] and their rotary tables; the same shapes back."""

        def attention(tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
            return self.attn(self.norm1(tokens), shapes, tables)  # type: ignore[no-any-return]

        def ffn(tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
            return self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]

        return self._add(ffn, self.ls2, self._add(attention, self.ls1, batches))

    def _add(self, branch: Branch, scale: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
        """Tokens plus what a branch makes of them; with drop path, of a part of each batch.

        Samples that would be dropped are not computed. What the rest gain is scaled up by the
        batch's size over theirs, so that the mean over batches stays. (Stochastic depth: Huang et
        al. 2016; on subsets of a batch: the DINOv2 paper, section 5.)
        """
        if not self.training or self.drop_path_rate == 0:
            gains = _run(branch, batches)
            return [_added(scale, *pair) for pair in zip(batches, gains, strict=True)]
        subsets = [random_subset(tokens, self.drop_path_rate) for tokens in batches]
        kept = [tokens[rows] for tokens, rows in zip(batches, subsets, strict=True)]
        return [
            tokens.index_add(0, rows, scale(gain).to(tokens.dtype), alpha=len(tokens) / len(rows))
            for tokens, rows, gain in zip(batches, subsets, _run(branch, kept), strict=True)
        ]


def _added(scale: nn.Module, tokens: Tensor, gain: Tensor) -> Tensor:
    if isinstance(scale, LayerScale):
        return scale(gain, onto=tokens)  # type: ignore[no-any-return]
    return tokens + scale(gain)  # type: ignore[no-any-return]


def random_subset(tokens: Tensor, drop_rate: float) -> Tensor:
    """Rows of a batch [B, ...] that are kept, at least one: int64 [max(int(B * (1 - rate)), 1)]."""
    count = max(int(len(tokens) * (1 - drop_rate)), 1)
    return torch.randperm(len(tokens), device=tokens.device)[:count]


def _run(branch: Branch, batches: Sequence[Tensor]) -> list[Tensor]:
    """Pack batches [B, N, D] into [sum of B * N, D], run the branch, unpack."""
    shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in batches]
    packed = concatenate([tokens.flatten(0, 1) for tokens in batches])
    parts = separate(branch(packed, shapes), [samples * length for samples, length in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]
