"""Multi-scale deformable attention in plain, differentiable PyTorch.

Zhu et al. 2020, "Deformable DETR" (arXiv:2010.04159). The letters in shapes: B images, N queries,
S positions of all levels together, D width, H heads, L levels, K points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]  # height and width of a level


def centers(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Where the positions of levels lie on the image, one level after the other: [S, 2].

    x and y of the centers, from 0 to 1.
    """
    parts = []
    for height, width in sizes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        across = x[None, :].expand(height, width)
        down = y[:, None].expand(height, width)
        parts.append(torch.stack([across, down], -1).flatten(0, 1))
    return torch.cat(parts)


class DeformableAttention(nn.Module):
    """Each query looks at a few points around its place, on every level of the values.

    ``ratio`` is the width of the values inside over that outside. Values are sampled in float32,
    which the places, of some thousand pixels, need.
    """

    def __init__(
        self, dim: int, *, levels: int, heads: int, points: int, ratio: float = 1.0
    ) -> None:
        super().__init__()
        inside = int(dim * ratio)
        if inside % heads or dim % heads:
            raise ValueError(f"{heads} heads do not divide widths of {dim} and {inside}")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, 2 * heads * levels * points)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, inside)
        self.output_proj = nn.Linear(inside, dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Heads look in directions around the circle, points ever farther; all weigh the same."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * steps[:, None]  # [H, 1, K, 2]
        offsets = offsets.expand(-1, self.levels, -1, -1).flatten()
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, queries: Tensor, places: Tensor, values: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """Queries [B, N, D] at places [N, 2] (x, y from 0 to 1), values [B, S, D]: [B, N, D]."""
        samples, length, _ = queries.shape
        inside = self.value_proj(values)
        heads = inside.unflatten(-1, (self.heads, inside.shape[-1] // self.heads))
        shape = (samples, length, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).view(*shape, 2).float()
        weights = self.attention_weights(queries).view(*shape[:3], -1).float()
        weights = weights.softmax(-1).view(shape)
        found = sample(heads, places.float(), offsets, weights, sizes)
        return self.output_proj(found.to(inside.dtype))  # type: ignore[no-any-return]


def sample(
    values: Tensor, places: Tensor, offsets: Tensor, weights: Tensor, sizes: Sequence[Size]
) -> Tensor:
    """Weighed sums of values at places: [B, N, H * d].

    values [B, S, H, d]; places [N, 2]; offsets [B, N, H, L, K, 2] in positions of their level;
    weights [B, N, H, L, K], in whose precision all is computed. Bilinear between the centers of
    positions, 0 beyond the edge.
    """
    samples, _, heads, width = values.shape
    length, points = offsets.shape[1], offsets.shape[4]
    dtype = weights.dtype
    # Level by level: what all levels' points see would be the largest tensor of a step.
    total, start = None, 0
    for level, (height, across) in enumerate(sizes):
        stop = start + height * across
        grid = values[:, start:stop].permute(0, 2, 3, 1).to(dtype)
        grid = grid.reshape(samples * heads, width, height, across)
        start = stop
        x, y = offsets[:, :, :, level].unbind(-1)
        step = torch.stack([x / across, y / height], -1)  # [B, N, H, K, 2]
        where = 2 * (places[:, None, None].to(dtype) + step) - 1
        where = where.transpose(1, 2).reshape(samples * heads, length, points, 2)
        seen = F.grid_sample(
            grid, where, mode="bilinear", padding_mode="zeros", align_corners=False
        )  # [B * H, d, N, K]
        shares = weights[:, :, :, level].transpose(1, 2).reshape(samples * heads, 1, length, points)
        found = (seen * shares).sum(-1)
        total = found if total is None else total + found
    if total is None:
        raise ValueError("there is no level to sample")
    return total.view(samples, heads * width, length).transpose(1, 2)
