"""The parts of a ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s").

Maps are [B, C, H, W] with channels last in memory. Convolutions take them as they are, and their
view [B, H, W, C], which costs no copy, is what norms and linear layers are fastest on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a map [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPSILON)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def stem(in_chans: int, channels: int) -> nn.Sequential:
    """Images [B, in_chans, H, W] to maps [B, channels, H // 4, W // 4]."""
    return nn.Sequential(
        nn.Conv2d(in_chans, channels, kernel_size=4, stride=4), ChannelNorm(channels)
    )


def downsampling(before: int, after: int) -> nn.Sequential:
    """Maps [B, before, H, W] to [B, after, H // 2, W // 2]."""
    return nn.Sequential(ChannelNorm(before), nn.Conv2d(before, after, kernel_size=2, stride=2))


class Block(nn.Module):
    """A depthwise convolution and an MLP over the channels, added to the maps that come in.

    Takes batches of maps of several sizes in one call, so that a sharded block is gathered once.
    """

    def __init__(self, channels: int, initial_scale: float | None, drop_path_rate: float) -> None:
        super().__init__()
        self.initial_scale, self.drop_path_rate = initial_scale, drop_path_rate
        self.gamma = nn.Parameter(torch.empty(channels)) if initial_scale else None
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPSILON)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def init_scale(self) -> None:
        """The layer scale's initial value (Touvron et al. 2021)."""
        if self.gamma is not None and self.initial_scale is not None:
            nn.init.constant_(self.gamma, self.initial_scale)

    def forward(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C, H, W] of each batch; the same shapes back."""
        return [self._add(maps) for maps in batches]

    def _add(self, maps: Tensor) -> Tensor:
        positions = self.norm(self.dwconv(maps).permute(0, 2, 3, 1))
        gains: Tensor = self.pwconv2(F.gelu(self.pwconv1(positions)))
        scale = self._scale(gains)
        if scale is not None:
            gains = gains * scale
        return maps + gains.permute(0, 3, 1, 2)

    def _scale(self, gains: Tensor) -> Tensor | None:
        """What gains [B, H, W, C] are multiplied by; None where that is 1.

        Drop path (stochastic depth, Huang et al. 2016) takes each sample's gains away by a draw of
        its own, and scales up those it leaves, so that their expectation stays.
        """
        if not self.training or self.drop_path_rate == 0:
            return self.gamma
        kept = 1 - self.drop_path_rate
        draw = gains.new_empty(len(gains), 1, 1, 1).bernoulli_(kept).div_(kept)
        return draw if self.gamma is None else self.gamma * draw
