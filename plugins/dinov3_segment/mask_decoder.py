"""Mask2Former's decoder: queries that look where their own masks are (arXiv:2112.01527).

The letters in shapes: B images, Q queries, K classes, D width, P positions of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_segment.pixel_decoder import LEVELS, sine_positions


class Attention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention``.

    Batches come first, and masks are one for all heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """[B, Q, D], [B, P, D], [B, P, D]; ``seen``, bool [B, Q, P], is what may be looked at."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(each, weight, bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for each, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if seen is None else seen[:, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SelfAttentionLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, at: Tensor) -> Tensor:
        keys = queries + at
        return self.norm(queries + self.self_attn(keys, keys, queries))  # type: ignore[no-any-return]


class CrossAttentionLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = Attention(dim, heads)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, at: Tensor, tokens: Tensor, positions: Tensor, seen: Tensor
    ) -> Tensor:
        found = self.multihead_attn(queries + at, tokens + positions, tokens, seen)
        return self.norm(queries + found)  # type: ignore[no-any-return]


class FfnLayer(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor) -> Tensor:
        found = self.linear2(F.relu(self.linear1(queries)))
        return self.norm(queries + found)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Three layers with ReLU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        first, second, third = self.layers
        return third(F.relu(second(F.relu(first(tokens)))))  # type: ignore[no-any-return]


class MaskDecoder(nn.Module):
    """Queries to masks and their classes, over three levels in turn."""

    def __init__(
        self, dim: int, classes: int, *, queries: int, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(dim, heads) for _ in range(layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(dim, heads) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FfnLayer(dim, hidden) for _ in range(layers))
        self.post_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(queries, dim)
        self.query_embed = nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.class_embed = nn.Linear(dim, classes + 1)
        self.mask_embed = Mlp(dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.init_weights()
            elif isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
                module.reset_parameters()
        for layer in self.transformer_ffn_layers:
            nn.init.xavier_uniform_(layer.linear1.weight)
            nn.init.xavier_uniform_(layer.linear2.weight)
        for module in self.modules():
            if isinstance(module, Attention):
                module.init_weights()  # last, over what its linear layer was given

    def forward(self, levels: Sequence[Tensor], features: Tensor) -> list[dict[str, Any]]:
        """Levels [B, D, h, w], coarse to fine, and features of masks [B, D, H / 4, W / 4].

        The outputs of the queries as they are learned, and after each layer.
        """
        sizes = [(each.shape[-2], each.shape[-1]) for each in levels]
        dim, device = features.shape[1], features.device
        tokens = [
            each.flatten(2).transpose(1, 2) + embedded
            for each, embedded in zip(levels, self.level_embed.weight, strict=True)
        ]
        positions = [sine_positions(size, dim, device).to(features.dtype) for size in sizes]
        queries = self.query_feat.weight.expand(features.shape[0], -1, -1)
        at = self.query_embed.weight
        outputs = [self._outputs(queries, features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for place, (cross, own, ffn) in enumerate(layers):
            level = place % LEVELS
            seen = self._seen(outputs[-1]["pred_masks"], sizes[level])
            queries = cross(queries, at, tokens[level], positions[level], seen)
            queries = ffn(own(queries, at))
            outputs.append(self._outputs(queries, features))
        return outputs

    def _outputs(self, queries: Tensor, features: Tensor) -> dict[str, Any]:
        queries = self.post_norm(queries)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_embed(queries), features)
        return {"pred_logits": self.class_embed(queries), "pred_masks": masks}

    @staticmethod
    @torch.no_grad()
    def _seen(masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Which positions are in the masks [B, Q, h, w]: bool [B, Q, P]; all for an empty mask."""
        inside = F.interpolate(masks.float(), size, mode="bilinear").flatten(2) >= 0
        return inside | ~inside.any(-1, keepdim=True)
