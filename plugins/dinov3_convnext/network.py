"""ConvNeXt: class and patch tokens of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_convnext.configs import STAGES, STRIDE, ConvNextConfig
from dinov3_convnext.layers import EPSILON, Block, downsampling, stem
from dinov3_framework import Backbone, FeatureInfo, UserError


class ConvNeXt(Backbone):
    """Patch tokens are the last stage's positions; the class token is their mean, then normalized.

    ``patch_size`` is the stride of patch tokens, 32 pixels, and ``n_layers`` counts stages. There
    are no storage tokens. Sides that are no multiple of 32 lose what is over at the right and at
    the bottom, as strided convolutions do.

    State-dict names are those of DINOv3's published checkpoints, where ``norm`` and ``norms.3`` are
    one layer under two names. The module is initialized when built; on the meta device, call
    ``to_empty`` and ``init_weights`` (or load weights).

    Layer-wise learning-rate decay does not act on it: the published models give all layers one
    learning rate.
    """

    takes_masks = False

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        self.config = config
        dims, depths = config.dims, config.depths
        self.embed_dim, self.patch_size, self.n_layers = dims[-1], STRIDE, STAGES
        self.in_chans = 3 if config.in_chans is None else config.in_chans

        self.downsample_layers = nn.ModuleList(
            [stem(self.in_chans, dims[0]), *(downsampling(*pair) for pair in pairwise(dims))]
        )
        rates = _rising(config.drop_path_rate, sum(depths))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(Block(dim, config.layer_scale_init_value, next(rates)) for _ in range(depth))
            )
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=EPSILON)
        # What follows each stage where it is an intermediate layer.
        self.norms = nn.ModuleList([*(nn.Identity() for _ in dims[:-1]), self.norm])
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Give every parameter its initial value; there are no buffers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Block):
                module.init_scale()

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Strides 4, 8, 16 and 32, or that of ``patch_size`` for all."""
        strides = [self.config.patch_size or STRIDE >> (STAGES - 1 - i) for i in range(STAGES)]
        return tuple(map(FeatureInfo, self.config.dims, strides))

    # ----------------------------------------------------------------------- features
    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Tokens of a batch [B, C, H, W], or of several batches of other sizes in one pass.

        Each batch gives a dict: ``x_norm_clstoken`` [B, D], ``x_storage_tokens`` [B, 0, D],
        ``x_norm_patchtokens`` [B, P, D] with P = (H // 32) * (W // 32), all after the final norm;
        ``x_prenorm`` [B, 1 + P, D]; ``masks``, which is None. Several batches are a list, and so is
        the result.

        Raises ``UserError`` for images that do not fit this model, and for masks: convolutions mix
        neighboring pixels from the first layer on, so that no patch can be replaced by a token.
        A list of None, one for each batch, is no mask.
        """
        alone = isinstance(images, Tensor)
        _refuse_masks(masks)
        batches = self._prepared([images] if isinstance(images, Tensor) else images)
        for stage in range(STAGES):
            batches = self._stage(stage, batches)
        named = [self._named(_mean_first(maps)) for maps in batches]
        return named[0] if alone else named

    def _named(self, tokens: Tensor) -> dict[str, Tensor | None]:
        normed = self.norm(tokens)
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": normed[:, 1:1],
            "x_norm_patchtokens": normed[:, 1:],
            "x_prenorm": tokens,
            "masks": None,
        }

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
        """What stages put out, in the network's order; stages after the last of them do not run.

        ``n`` is a number of last stages, or the stages' indices from 0. Stage i gives its patches
        [B, P, dims[i]], or [B, dims[i], h, w] with ``reshape``; with ``return_class_token`` and
        ``return_extra_tokens`` a tuple of patches, their mean [B, dims[i]] and no storage tokens
        [B, 0, dims[i]]. A stage has a stride of 4, 8, 16 or 32 pixels; where the config has a
        ``patch_size``, its map is resized to H // patch_size x W // patch_size (the mean is of the
        map before). ``norm`` applies the final norm to the last stage: the others have none.
        """
        wanted = self._stages_wanted(n)
        size = self._resized_to(images)
        batches, layers = self._prepared([images]), []
        for stage in range(max(wanted) + 1):
            batches = self._stage(stage, batches)
            if stage not in wanted:
                continue
            (maps,) = batches
            tokens = _mean_first(maps, size)
            if norm:
                tokens = self.norms[stage](tokens)
            patches = tokens[:, 1:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, size or maps.shape[-2:])
            parts = [patches]
            if return_class_token:
                parts.append(tokens[:, 0])
            if return_extra_tokens:
                parts.append(tokens[:, 1:1])
            layers.append(tuple(parts) if len(parts) > 1 else patches)
        return tuple(layers)

    def _stages_wanted(self, n: int | Sequence[int]) -> set[int]:
        wanted = set(range(STAGES - n, STAGES) if isinstance(n, int) else n)
        if not wanted or not wanted <= set(range(STAGES)):
            raise UserError(
                f"intermediate layers n = {n}: this model has stages 0 to {STAGES - 1}; name some "
                f"of them, or say how many of the last ones (1 to {STAGES})"
            )
        return wanted

    def _resized_to(self, images: Tensor) -> tuple[int, int] | None:
        """The grid that intermediate layers are resized to, if they are."""
        patch = self.config.patch_size
        if patch is None:
            return None
        height, width = images.shape[-2:]
        if min(height, width) < patch:
            raise UserError(
                f"images of {height} x {width} pixels (height x width) are smaller than a patch of "
                f"patch_size = {patch}; resize them, or leave the backbone's patch_size out"
            )
        return height // patch, width // patch

    def _prepared(self, images: Sequence[Tensor]) -> list[Tensor]:
        for batch in images:
            self._check(batch)
        return [batch.contiguous(memory_format=torch.channels_last) for batch in images]

    def _stage(self, stage: int, batches: Sequence[Tensor]) -> list[Tensor]:
        """Maps of each batch before a stage to those after it."""
        downsample, blocks = self.downsample_layers[stage], self.stages[stage]
        return blocks([downsample(maps) for maps in batches])  # type: ignore[no-any-return]

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise UserError(
                f"images of shape {list(images.shape)}: this backbone takes [batch, "
                f"{self.in_chans}, height, width]; images.channels and the backbone's in_chans "
                "must agree"
            )
        height, width = images.shape[-2:]
        if min(height, width) < STRIDE:
            raise UserError(
                f"images of {height} x {width} pixels (height x width): this backbone needs at "
                f"least {STRIDE} each way; resize them"
            )

    # ----------------------------------------------------------------------- for the engine
    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """As the published models were trained: norms between stages decay, others do not."""
        return parameter.ndim > 1 or (
            name.startswith("downsample_layers.") and name.endswith("weight")
        )

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        """The blocks of all stages: a stage would be most of the network at once."""
        return [block for stage in self.stages for block in stage.children()]


def _rising(last: float, count: int) -> Iterator[float]:
    """``count`` evenly spaced numbers from 0 to ``last``."""
    return (last * index / max(count - 1, 1) for index in range(count))


def _mean_first(maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Maps [B, D, h, w] to their mean and their positions, resized to ``size``: [B, 1 + P, D]."""
    mean = maps.mean((2, 3))[:, None]
    if size is not None:
        # In float32: on the CPU, torch does not resize in bfloat16.
        resized = F.interpolate(maps.float(), size, mode="bilinear", antialias=True)
        maps = resized.to(maps.dtype)
    return torch.cat([mean, maps.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _refuse_masks(masks: Tensor | Sequence[Tensor | None] | None) -> None:
    given = [masks] if masks is None or isinstance(masks, Tensor) else masks
    if any(mask is not None for mask in given):
        raise UserError(
            "ConvNeXt cannot replace masked patches; leave out losses that need masks, or take a "
            "backbone that can"
        )
