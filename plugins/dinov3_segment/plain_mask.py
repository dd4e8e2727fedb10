"""The plain mask transformer: masks from a frozen backbone by a few plain blocks.

After "PMT: Plain Mask Transformer for Image and Video Segmentation with Frozen Vision Encoders"
(Cavagnero et al. 2026, arXiv:2603.25398) and its published names and settings. The letters in
shapes: B images, Q queries, K classes, L layers of the backbone, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework.contracts.data import Target
from dinov3_framework.contracts.networks import FeatureInfo, FeatureNeeds, HeadFeatures
from dinov3_framework.errors import UserError
from dinov3_framework.parallel.batch_norm import GlobalBatchNorm2d
from dinov3_segment.configs_plain import PlainMaskTransformerConfig
from dinov3_segment.draws import image_generators, is_simulated, uniform
from dinov3_segment.mask_head import MaskHead
from dinov3_segment.plain_layers import Doubling, PlainBlock, rotation

# Of the six blocks of the published training on ADE20K: 16 epochs of 1,263 iterations.
_UNMASK_FROM = tuple(each / 20208 for each in (0, 5384, 7403, 9422, 11442, 13461))
_UNMASK_UNTIL = tuple(each / 20208 for each in (3000, 8749, 10769, 12788, 14807, 16826))


def spread(published: Sequence[float], blocks: int) -> list[float]:
    """Values of as many blocks, read off those of the published number of them."""
    places = np.linspace(0, len(published) - 1, blocks)
    return [float(each) for each in np.interp(places, range(len(published)), published)]


class PlainDecoder(nn.Module):
    """From tokens of several layers to masks and their classes."""

    attn_mask_probs: Tensor

    def __init__(
        self, config: PlainMaskTransformerConfig, width: int, levels: int, classes: int, stride: int
    ) -> None:
        super().__init__()
        heads = config.heads or max(width // 64, 1)
        if width % (4 * heads):
            raise UserError(
                f"heads = {heads}: the backbone's width {width} is no multiple of 4 x it"
            )
        self.config, self.head_width = config, width // heads
        # How likely it is of each block that a query is masked.
        self.register_buffer("attn_mask_probs", torch.empty(config.blocks))
        self._settled: list[float] | None = None
        if config.lateral != "none":
            self.lateral_projections = nn.ModuleList(
                _lateral(config.lateral == "mlp", width) for _ in range(levels)
            )
        self.scalers = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in range(levels))
        self.q = nn.Embedding(config.queries, width)
        hidden = config.hidden or width
        self.blocks = nn.ModuleList(PlainBlock(width, hidden, heads) for _ in range(config.blocks))
        self.decoder_norm = nn.LayerNorm(width)
        doublings = max(int(math.log2(stride)) - 2, 1)  # to a quarter of the image
        self.upscale = nn.Sequential(*(Doubling(width) for _ in range(doublings)))
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, width),
        )  # fmt: skip
        self.class_head = nn.Linear(width, classes + 1)

    def forward(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Tokens [B, ..., D] of each level, patches last, to the outputs after each block.

        The first outputs are those before all blocks; where they are of no use, the last alone.
        """
        tokens = torch.stack([self._lateral(i, each) for i, each in enumerate(levels)]).sum(0)
        queries = self.q.weight.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([queries, tokens], dim=1)
        by = rotation(grid, self.head_width, self.config.rope_base, tokens.device)
        chances = self._chances()
        drawn = self.training and any(0 < chance < 1 for chance in chances)
        generators = image_generators(tokens, "unmasked queries") if drawn else []
        outputs = []
        for block, chance in zip(self.blocks, chances, strict=True):
            seen = None
            if chance > 0 or (self.training and self.config.masked_attention):
                outputs.append(self._outputs(tokens, grid))
            if chance > 0:
                seen = self._seen(outputs[-1]["pred_masks"], grid)
                if drawn:
                    seen = seen | _unmasked(generators, seen.shape[1], chance)[..., None]
            tokens = block(tokens, by, seen)
        return [*outputs, self._outputs(tokens, grid)]

    def _chances(self) -> list[float]:
        """How likely queries are masked, by block; in eval mode all or none of them are."""
        if not self.config.masked_attention:
            return [0.0] * len(self.blocks)
        if is_simulated(self.attn_mask_probs):
            return self._settled or [1.0] * len(self.blocks)
        chances = [float(each) for each in self.attn_mask_probs.tolist()]
        return chances if self.training else [float(round(each)) for each in chances]

    def train(self, mode: bool = True) -> PlainDecoder:
        """As of any module; in eval mode a copy without values knows what this one does."""
        super().train(mode)
        if not is_simulated(self.attn_mask_probs):
            self._settled = None if mode else self._chances()
        return self

    def _lateral(self, level: int, tokens: Tensor) -> Tensor:
        if self.config.lateral != "none":
            tokens = tokens + self.lateral_projections[level](tokens)
        return tokens * self.scalers[level]

    def _outputs(self, tokens: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        tokens = self.decoder_norm(tokens)
        queries = tokens[:, : self.config.queries]
        maps = tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), self.upscale(maps))
        return {"pred_logits": self.class_head(queries), "pred_masks": masks}

    @staticmethod
    @torch.no_grad()
    def _seen(masks: Tensor, grid: tuple[int, int]) -> Tensor:
        """Which patches are in the masks [B, Q, h, w]: bool [B, Q, P]."""
        return F.interpolate(masks, grid, mode="bilinear").flatten(2) > 0


class PlainMaskTransformer(MaskHead):
    """Masks of the classes of an image, by queries among the tokens of a ViT that stays as it is.

    In training each block's queries attend to patches in their own masks alone, at first always
    and in the end never, so that the trained head needs no masks. Departures from the published
    training: batches are normalized and points drawn as if there were one process, whatever their
    number.
    """

    config: PlainMaskTransformerConfig

    def __init__(
        self,
        config: PlainMaskTransformerConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(config, targets)
        layers = config.layers or _quarters(len(features))
        infos = {features[layer] for layer in layers}
        if len(infos) > 1:
            raise UserError(
                "layers must be alike, and this backbone's differ in width or stride: "
                + ", ".join(f"{i.channels} at {i.stride} px" for i in sorted(infos, key=str))
            )
        (info,) = infos
        self.needs = FeatureNeeds(layers=layers, class_token=True, storage=True)
        if config.batch_norm:
            self.bn = nn.ModuleList(GlobalBatchNorm2d(info.channels) for _ in layers)
        self.decoder = PlainDecoder(config, info.channels, len(layers), self.classes, info.stride)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for scaler in self.decoder.scalers:
            nn.init.ones_(scaler)
        nn.init.ones_(self.decoder.attn_mask_probs)

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        return self.decoder.blocks

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return True  # all of them, as published

    def before_step(self, iteration: int, total: int) -> None:
        config, blocks = self.config, self.config.blocks
        begins = config.unmask_from or spread(_UNMASK_FROM, blocks)
        ends = config.unmask_until or spread(_UNMASK_UNTIL, blocks)
        done = iteration / total
        left = [
            1.0 if done < begin else max((end - done) / max(end - begin, 1e-9), 0.0)
            for begin, end in zip(begins, ends, strict=True)
        ]
        chances = torch.tensor(left) ** config.unmask_power
        self.decoder.attn_mask_probs.copy_(chances)

    def forward(self, features: HeadFeatures) -> dict[str, Any]:
        if len(features.storage) < len(features.maps):
            raise ValueError("the decoder takes storage tokens, too, and they are not there")
        grid = (features.maps[0].shape[-2], features.maps[0].shape[-1])
        dtype = self.decoder.class_head.weight.dtype
        levels = []
        for index, (maps, cls, storage) in enumerate(
            zip(features.maps, features.cls, features.storage, strict=True)
        ):
            patches = maps.flatten(2)
            prefix = torch.cat([cls[:, None], storage], dim=1).transpose(1, 2)
            channels = torch.cat([prefix.to(patches.dtype), patches], dim=2).to(dtype)
            if self.config.batch_norm:
                channels = self.bn[index](channels[..., None])[..., 0]
            levels.append(channels.transpose(1, 2))
        *earlier, last = self.decoder(levels, grid)
        return {**last, "aux_outputs": earlier} if self.training else last


def _quarters(count: int) -> tuple[int, ...]:
    # Not even_layers: of 24 layers the published one takes 5 first, and there may be fewer than 4.
    parts = min(4, count)
    return tuple((part + 1) * count // parts - 1 for part in range(parts))


def _lateral(mlp: bool, width: int) -> nn.Module:
    if not mlp:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width))


def _unmasked(generators: Sequence[torch.Generator], queries: int, chance: float) -> Tensor:
    """Which queries see everything, bool [B, Q]."""
    return torch.stack([uniform(each, queries) > chance for each in generators])
