"""Mask2Former's pixel decoder: maps of several strides that have seen each other.

Cheng et al. 2021, "Masked-attention Mask Transformer for Universal Image Segmentation"
(arXiv:2112.01527), with the deformable encoder of arXiv:2010.04159.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_segment.deformable import DeformableAttention, Size, centers

LEVELS = 3  # of the encoder and of the decoder after it, from the coarsest
_GROUPS = 32
_POINTS = 4


def sine_positions(size: Size, dim: int, device: torch.device) -> Tensor:
    """Positions as sines and cosines of y, then x, at ``dim / 4`` wavelengths: [h * w, dim].

    Counted from 1, over the last and times 2 pi, as in DETR (arXiv:2005.12872).
    """
    height, width = size
    half = dim // 2
    exponents = torch.arange(half, device=device, dtype=torch.float32).div(2, rounding_mode="floor")
    waves = 10000 ** (2 * exponents / half)

    def of(length: int) -> Tensor:
        places = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        phases = (places / (length + 1e-6) * (2 * math.pi))[:, None] / waves
        return torch.stack([phases[:, 0::2].sin(), phases[:, 1::2].cos()], -1).flatten(1)

    down = of(height)[:, None].expand(height, width, half)
    across = of(width)[None, :].expand(height, width, half)
    return torch.cat([down, across], -1).flatten(0, 1)


class EncoderLayer(nn.Module):
    """Deformable attention among all levels and an FFN, each normalized after it is added."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, levels=LEVELS, heads=heads, points=_POINTS)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self, tokens: Tensor, positions: Tensor, places: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        found = self.self_attn(tokens + positions, places, tokens, sizes)
        tokens = self.norm1(tokens + found)
        found = self.linear2(F.relu(self.linear1(tokens)))
        return self.norm2(tokens + found)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Layers, under the name of the official files."""

    def __init__(self, dim: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(layers))


class LevelEncoder(nn.Module):
    """Maps [B, D, h, w] of three levels to maps of the same sizes."""

    def __init__(self, dim: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.level_encoding = nn.Parameter(torch.empty(LEVELS, dim))
        self.encoder = Encoder(dim, heads, hidden, layers)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sizes = [(each.shape[-2], each.shape[-1]) for each in maps]
        device, dim = maps[0].device, maps[0].shape[1]
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)
        # Two statements of one sum, so that halves of precision are rounded once.
        positions = torch.cat(
            [
                sine_positions(size, dim, device) + level.float()
                for size, level in zip(sizes, self.level_encoding, strict=True)
            ]
        ).to(tokens.dtype)
        places = centers(sizes, device)
        for layer in self.encoder.layers:
            tokens = layer(tokens, positions, places, sizes)
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        return [p.transpose(1, 2).unflatten(2, size) for p, size in zip(parts, sizes, strict=True)]


class NormedConv(nn.Conv2d):
    """A convolution without bias and a group norm, under the names of the official files."""

    def __init__(self, inside: int, outside: int, kernel: int) -> None:
        super().__init__(inside, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(_GROUPS, outside)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(super().forward(maps))  # type: ignore[no-any-return]


class PixelDecoder(nn.Module):
    """Four maps, strides 4 to 32, to features of masks at stride 4 and three maps, coarse to fine.

    ``widths`` are the channels of the four maps, ``dim`` those of all that is put out.
    """

    def __init__(
        self, widths: Sequence[int], dim: int, *, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1), nn.GroupNorm(_GROUPS, dim))
            for width in reversed(widths[1:])
        )
        self.encoder = LevelEncoder(dim, heads, hidden, layers)
        self.mask_feature = nn.Conv2d(dim, dim, 1)
        self.lateral_convs = nn.ModuleList([NormedConv(widths[0], dim, 1)])
        self.output_convs = nn.ModuleList([NormedConv(dim, dim, 3)])

    @torch.no_grad()
    def init_weights(self) -> None:
        for parameter in self.encoder.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, DeformableAttention):
                module.init_weights()
            elif isinstance(module, EncoderLayer):
                for linear in (module.linear1, module.linear2):
                    bound = linear.in_features**-0.5
                    nn.init.uniform_(linear.bias, -bound, bound)
        for conv, _ in self.input_convs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.encoder.level_encoding)
        for conv in (self.mask_feature, *self.lateral_convs, *self.output_convs):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[B, D, H / s, W / s] of strides s of 4 to 32: features [B, dim, H / 4, W / 4], levels."""
        coarse = reversed(maps[1:])
        levels = self.encoder([conv(x) for conv, x in zip(self.input_convs, coarse, strict=True)])
        fine = self.lateral_convs[0](maps[0])
        fine = fine + F.interpolate(levels[-1], fine.shape[-2:], mode="bilinear")
        return self.mask_feature(F.relu(self.output_convs[0](fine))), levels
