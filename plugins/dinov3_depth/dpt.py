"""DPT's decoder: four layers of a backbone become one map (arXiv:2103.13413).

Names of modules are those of the official files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_depth.configs_heads import DptDepthConfig
from dinov3_depth.depth_head import DepthHead
from dinov3_framework.contracts.data import Target
from dinov3_framework.contracts.networks import FeatureInfo, FeatureNeeds, HeadFeatures
from dinov3_framework.data.tokens import even_layers
from dinov3_framework.errors import UserError
from dinov3_framework.parallel.batch_norm import GlobalBatchNorm2d


class Conv(nn.Module):
    """A convolution that keeps the size, perhaps with a ReLU after it."""

    def __init__(
        self, inside: int, outside: int, kernel: int, *, bias: bool = True, relu: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=bias)
        self.relu = relu

    def init_weights(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, maps: Tensor) -> Tensor:
        found = self.conv(maps)
        return found.relu() if self.relu else found  # type: ignore[no-any-return]


class Reassemble(nn.Module):
    """Layers [B, D, h, w] with their class tokens to maps at strides 4, 8, 16 and 32.

    ``factors`` are how much finer each map is than its layer.
    """

    def __init__(
        self, config: DptDepthConfig, channels: Sequence[int], factors: Sequence[float]
    ) -> None:
        super().__init__()
        self.readout = config.readout
        self.projects = nn.ModuleList(
            Conv(inside, outside, 1)
            for inside, outside in zip(channels, config.widths, strict=True)
        )
        self.resize_layers = nn.ModuleList(
            _resizing(width, factor) for width, factor in zip(config.widths, factors, strict=True)
        )
        if config.readout == "project":
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * inside, inside), nn.GELU()) for inside in channels
            )
        self.batchnorm_layers = nn.ModuleList(
            GlobalBatchNorm2d(inside) if config.batch_norm else nn.Identity() for inside in channels
        )

    def forward(self, layers: Sequence[Tensor], cls: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for index, grid in enumerate(layers):
            if self.readout == "add":
                grid = grid + cls[index][:, :, None, None]
            elif self.readout == "project":
                patches = grid.flatten(2).transpose(1, 2)
                beside = cls[index][:, None].expand_as(patches)
                patches = self.readout_projects[index](torch.cat([patches, beside], -1))
                grid = patches.transpose(1, 2).unflatten(2, grid.shape[-2:])
            projected = self.projects[index](self.batchnorm_layers[index](grid))
            found.append(self.resize_layers[index](projected))
        return found


def _resizing(width: int, factor: float) -> nn.Module:
    if factor == 1:
        return nn.Identity()
    if factor > 1:
        return nn.ConvTranspose2d(width, width, int(factor), int(factor))
    return nn.Conv2d(width, width, 3, stride=int(1 / factor), padding=1)


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, added to what came in."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 3, bias=bias)
        self.conv2 = Conv(channels, channels, 3, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.conv2(self.conv1(maps.relu()).relu())  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """A finer map is added to what is there, which becomes twice as large."""

    def __init__(self, channels: int, bias: bool, *, first: bool) -> None:
        super().__init__()
        self.project = Conv(channels, channels, 1)
        self.res_conv_unit1 = None if first else ResidualUnit(channels, bias)
        self.res_conv_unit2 = ResidualUnit(channels, bias)

    def forward(self, maps: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None and self.res_conv_unit1 is not None:
            if finer.shape[-2:] != maps.shape[-2:]:
                finer = F.interpolate(finer, maps.shape[-2:], mode="bilinear")
            maps = maps + self.res_conv_unit1(finer)
        maps = self.res_conv_unit2(maps)
        doubled = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(doubled)  # type: ignore[no-any-return]


class _Doubled(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=True)


class Scores(nn.Module):
    """The last convolutions, with a doubling of the size between them."""

    def __init__(self, channels: int, hidden: int, bins: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            _Doubled(),
            nn.Conv2d(channels // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, bins, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(maps)  # type: ignore[no-any-return]


class DptDepth(DepthHead):
    """Scores of bins at the image's resolution, or a little above it."""

    config: DptDepthConfig

    def __init__(
        self,
        config: DptDepthConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(config, targets)
        if config.layers is None and len(features) < 4:
            raise UserError(f"needs four layers, and this backbone has {len(features)}")
        layers = config.layers or even_layers(len(features))
        infos = [features[layer] for layer in layers]
        self.needs = FeatureNeeds(
            layers=tuple(layers), class_token=config.readout != "ignore", norm=config.norm
        )
        channels = [info.channels for info in infos]
        self.reassemble_blocks = Reassemble(config, channels, _factors(infos))
        self.convs = nn.ModuleList(
            Conv(width, config.channels, 3, bias=False) for width in config.widths
        )
        self.fusion_blocks = nn.ModuleList(
            Fusion(config.channels, config.bias, first=index == 0) for index in range(4)
        )
        projected = Conv(config.channels, config.channels, 3, relu=True)
        self.project = projected if config.projection else nn.Identity()
        self.conv_depth = Scores(config.channels, config.hidden, config.bins)

    def init_weights(self) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Conv):
                module.init_weights()

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        return [self.reassemble_blocks, *self.convs, *self.fusion_blocks]

    def forward(self, features: HeadFeatures) -> Tensor:
        dtype = self.conv_depth.head[0].weight.dtype
        layers = [grid.to(dtype) for grid in features.maps]
        cls = [token.to(dtype) for token in features.cls]
        *finer, coarsest = [
            conv(grid)
            for conv, grid in zip(self.convs, self.reassemble_blocks(layers, cls), strict=True)
        ]
        first, *others = self.fusion_blocks
        fused = first(coarsest)
        for fusion, grid in zip(others, reversed(finer), strict=True):
            fused = fusion(fused, grid)
        return self.conv_depth(self.project(fused))  # type: ignore[no-any-return]


def _factors(infos: Sequence[FeatureInfo]) -> list[float]:
    """How much finer each of four maps is than its layer: to a stride of 4 patches / 16, doubling.

    Layers of one stride, as those of a ViT, become finer and coarser than they are; those of
    strides 4, 8, 16 and 32 stay.
    """
    if len({info.stride for info in infos}) == 1:
        return [4, 2, 1, 0.5]
    factors = [info.stride / (4 * 2**index) for index, info in enumerate(infos)]
    if any(factor not in (4, 2, 1, 0.5, 0.25) for factor in factors):
        strides = ", ".join(str(info.stride) for info in infos)
        raise UserError(
            f"layers with strides of {strides} px cannot be brought to 4, 8, 16 and 32 px; choose "
            "layers of one stride, or of strides that double"
        )
    return factors
