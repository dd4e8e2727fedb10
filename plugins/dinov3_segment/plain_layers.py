"""Layers of the plain mask transformer, under the names of its published files.

The letters in shapes: B images, Q queries, N tokens, P patches, D width, d a head's width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines [P, d]


def rotation(grid: tuple[int, int], width: int, base: float, device: torch.device) -> Rotation:
    """The rotary position embedding of the patches of a grid, as in DINOv3's ViTs, in float32.

    Centers of patches lie in -1..1 along either side; the d / 4 periods grow from 1 to nearly
    ``base`` in even steps of their logarithm, for the height first, then for the width.
    """
    sides = [(torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in grid]
    places = torch.cartesian_prod(*sides)  # [P, 2]
    periods = base ** (torch.arange(width // 4, device=device) / (width // 4))
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(tokens: Tensor, by: Rotation) -> Tensor:
    """Rotate the patches, which are the last P of the tokens [B, heads, N, d]."""
    cos, sin = (part.to(tokens.dtype) for part in by)
    count = cos.shape[0]
    others, patches = tokens.split((tokens.shape[2] - count, count), dim=2)
    first, second = patches.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return torch.cat([others, patches * cos + turned * sin], dim=2)


class PlainAttention(nn.Module):
    """Attention among queries, class, storage and patch tokens, in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, by: Rotation, seen: Tensor | None) -> Tensor:
        """[B, N, D]; ``seen``, bool [B, Q, P], says which patches the queries attend to."""
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, by), rotate(k, by)
        if seen is None:
            found = F.scaled_dot_product_attention(q, k, v)
        else:
            # All but the queries see everything: without a mask they have the faster kernels.
            batch, queries, patches = seen.shape
            others = seen.new_ones(batch, queries, tokens.shape[1] - patches)
            mask = torch.cat([others, seen], dim=2)[:, None]
            parts = q.split((queries, tokens.shape[1] - queries), dim=2)
            masked = F.scaled_dot_product_attention(parts[0], k, v, attn_mask=mask)
            found = torch.cat([masked, F.scaled_dot_product_attention(parts[1], k, v)], dim=2)
        out: Tensor = self.o_proj(found.transpose(1, 2).flatten(2))
        return out


class PlainScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.lambda1)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.lambda1


class PlainMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.up_proj(values)))
        return out


class PlainBlock(nn.Module):
    """Attention and MLP, each normalized before and scaled after."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = PlainAttention(width, heads)
        self.layer_scale1 = PlainScale(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = PlainMlp(width, hidden)
        self.layer_scale2 = PlainScale(width)

    def forward(self, tokens: Tensor, by: Rotation, seen: Tensor | None) -> Tensor:
        tokens = tokens + self.layer_scale1(self.attention(self.norm1(tokens), by, seen))
        out: Tensor = tokens + self.layer_scale2(self.mlp(self.norm2(tokens)))
        return out


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of maps [B, C, h, w]."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Doubling(nn.Module):
    """Twice the height and width of maps [B, D, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.norm = ChannelNorm(width, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv2(F.gelu(self.conv1(maps))))
        return out
