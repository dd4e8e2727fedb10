"""A ViT adapter: feature maps at strides 4, 8, 16 and 32 from a backbone that has one stride.

Chen et al. 2022, "Vision Transformer Adapter for Dense Predictions" (arXiv:2205.08534), as DINOv3
takes it: convolutions over the image gather what layers of the backbone say, which nothing is fed
back to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework.parallel.batch_norm import GlobalBatchNorm2d
from dinov3_segment.deformable import DeformableAttention, Size, centers
from dinov3_segment.draws import image_generators, uniform

_EPS = 1e-6
_EXTRACTORS = (1, 1, 1, 3)  # for each of the four layers


class SpatialPrior(nn.Module):
    """Convolutions over the image, to maps at strides 4, 8, 16 and 32."""

    def __init__(self, in_chans: int, channels: int, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv(in_chans, channels, stride=2),
            *_conv(channels, channels),
            *_conv(channels, channels),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv(channels, 2 * channels, stride=2))
        self.conv3 = nn.Sequential(*_conv(2 * channels, 4 * channels, stride=2))
        self.conv4 = nn.Sequential(*_conv(4 * channels, 4 * channels, stride=2))
        self.fc1 = nn.Conv2d(channels, dim, 1)
        self.fc2 = nn.Conv2d(2 * channels, dim, 1)
        self.fc3 = nn.Conv2d(4 * channels, dim, 1)
        self.fc4 = nn.Conv2d(4 * channels, dim, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] to four maps [B, D, H / stride, W / stride]."""
        first = self.stem(images)
        second = self.conv2(first)
        third = self.conv3(second)
        maps = (first, second, third, self.conv4(third))
        projections = (self.fc1, self.fc2, self.fc3, self.fc4)
        return [project(each) for project, each in zip(projections, maps, strict=True)]


def _conv(inside: int, outside: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return [conv, GlobalBatchNorm2d(outside), nn.ReLU(inplace=True)]


class DepthwiseConv(nn.Module):
    """One depthwise convolution over the maps of all levels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        maps = (
            self.dwconv(part.transpose(1, 2).unflatten(2, size))
            for part, size in zip(parts, sizes, strict=True)
        )
        return torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)


class ConvFfn(nn.Module):
    """An FFN that also looks at the neighbors of each position."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), sizes)))  # type: ignore[no-any-return]


class Extractor(nn.Module):
    """What positions of all levels take from a layer of the backbone, and an FFN.

    ``shares`` [B] are factors of what each image gains by the FFN.
    """

    def __init__(
        self, dim: int, *, heads: int, points: int, ratio: float, ffn_ratio: float
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=_EPS)
        self.attn = DeformableAttention(dim, levels=1, heads=heads, points=points, ratio=ratio)
        self.ffn = ConvFfn(dim, int(dim * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(
        self,
        tokens: Tensor,
        places: Tensor,
        sizes: Sequence[Size],
        seen: Tensor,
        grid: Size,
        shares: Tensor | None,
    ) -> Tensor:
        """Tokens [B, S, D] of ``sizes``, a layer's patches [B, P, D] of ``grid``: [B, S, D]."""
        tokens = tokens + self.attn(self.query_norm(tokens), places, self.feat_norm(seen), [grid])
        gain = self.ffn(self.ffn_norm(tokens), sizes)
        return tokens + (gain if shares is None else gain * shares[:, None, None].to(gain))  # type: ignore[no-any-return]


class Interaction(nn.Module):
    """An extractor for a layer of the backbone; two more for the last."""

    def __init__(self, extractors: Sequence[Extractor]) -> None:
        super().__init__()
        self.extractor = extractors[0]
        self.extra_extractors = nn.ModuleList(extractors[1:]) if extractors[1:] else None

    def forward(
        self,
        tokens: Tensor,
        places: Tensor,
        sizes: Sequence[Size],
        seen: Tensor,
        grid: Size,
        shares: Sequence[Tensor | None],
    ) -> Tensor:
        extractors = (self.extractor, *(self.extra_extractors or ()))
        for extractor, share in zip(extractors, shares, strict=True):
            tokens = extractor(tokens, places, sizes, seen, grid, share)
        return tokens


class ViTAdapter(nn.Module):
    """Maps [B, D, H / s, W / s] for strides s of 4, 8, 16, 32 from an image and four layers.

    In training each FFN of each image is left out with the probability ``drop_path`` (stochastic
    depth: Huang et al. 2016); which, depends on the step and the image's place in the batch alone.
    """

    def __init__(
        self,
        dim: int,
        *,
        in_chans: int,
        channels: int,
        heads: int,
        points: int,
        ratio: float,
        ffn_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()

        def extractor() -> Extractor:
            return Extractor(
                dim,
                heads=heads,
                points=points,
                ratio=ratio,
                ffn_ratio=ffn_ratio,
            )

        self.drop_path = drop_path
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPrior(in_chans, channels, dim)
        self.interactions = nn.ModuleList(
            Interaction([extractor() for _ in range(count)]) for count in _EXTRACTORS
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1 = GlobalBatchNorm2d(dim)
        self.norm2 = GlobalBatchNorm2d(dim)
        self.norm3 = GlobalBatchNorm2d(dim)
        self.norm4 = GlobalBatchNorm2d(dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                height, width = module.kernel_size
                fan_out = height * width * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | GlobalBatchNorm2d):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.init_weights()
        nn.init.normal_(self.level_embed)

    def forward(self, image: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
        """An image [B, C, H, W], sides multiples of 32, and four layers [B, D, h, w]."""
        first, *priors = self.spm(image)
        sizes = [(each.shape[-2], each.shape[-1]) for each in priors]
        embedded = zip(priors, self.level_embed, strict=True)
        tokens = torch.cat([p.flatten(2).transpose(1, 2) + level for p, level in embedded], dim=1)
        places = centers(sizes, image.device)
        shares = self._shares(image)
        for interaction, layer, count in zip(self.interactions, layers, _EXTRACTORS, strict=True):
            grid = (layer.shape[-2], layer.shape[-1])
            seen = layer.flatten(2).transpose(1, 2).to(tokens.dtype)
            own, shares = shares[:count], shares[count:]
            tokens = interaction(tokens, places, sizes, seen, grid, own)
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        rest = [p.transpose(1, 2).unflatten(2, size) for p, size in zip(parts, sizes, strict=True)]
        maps = [self.up(rest[0]) + first, *rest]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return [
            norm(each + F.interpolate(layer.to(each.dtype), each.shape[-2:], mode="bilinear"))
            for norm, each, layer in zip(norms, maps, layers, strict=True)
        ]

    def _shares(self, image: Tensor) -> list[Tensor | None]:
        """What each extractor's FFN counts for, by image [B]."""
        count = sum(_EXTRACTORS)
        if not self.training or self.drop_path == 0:
            return [None] * count
        drawn = [uniform(each, count) for each in image_generators(image, "adapter drop path")]
        kept = (torch.stack(drawn) >= self.drop_path).float() / (1 - self.drop_path)
        return list(kept.to(image.device).unbind(1))
