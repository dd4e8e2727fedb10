"""Options of the plain mask transformer."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import InvalidOption, config, option, positive
from dinov3_segment.configs_masks import MaskClassificationConfig


def _layers(value: tuple[int, ...]) -> str | None:
    return None if value and len(set(value)) == len(value) else "must name layers, each once"


def _shares(value: tuple[float, ...]) -> str | None:
    return None if all(0 <= each <= 1 for each in value) else f"must lie in 0..1: {list(value)}"


@config
class PlainMaskTransformerConfig(MaskClassificationConfig):
    """Queries and patch tokens through a few transformer blocks outside the backbone (PMT).

    As in arXiv:2603.25398. As it stands, the published decoder for ADE20K on a ViT-L.
    """

    queries: int = option("learned queries, each for one mask", default=100, check=positive)
    blocks: int = option("transformer blocks of the decoder", default=6, check=positive)
    heads: int | None = option(
        "heads of their attention; left out, one for each 64 channels, as in the ViTs",
        default=None,
        check=positive,
    )
    hidden: int | None = option(
        "width within their MLPs; left out, the backbone's own", default=None, check=positive
    )
    layers: tuple[int, ...] | None = option(
        "layers of the backbone that are seen, from 0, or from -1 backwards; left out, the last of "
        "each quarter of them",
        default=None,
        check=_layers,
    )
    lateral: Literal["mlp", "linear", "none"] = option(
        "what each layer's tokens pass through before they are summed", default="mlp"
    )
    batch_norm: bool = option("normalize each layer's channels over the batch", default=True)
    rope_base: float = option(
        "base of the rotary position embedding", default=100.0, check=positive
    )
    masked_attention: bool = option(
        "in training, a query attends to patches in its own mask alone, as foreseen by what comes "
        "before the block, and ever more rarely so",
        default=True,
    )
    unmask_from: tuple[float, ...] | None = option(
        "share of the training, for each block, up to which its queries are always masked; left "
        "out, as published",
        default=None,
        check=_shares,
    )
    unmask_until: tuple[float, ...] | None = option(
        "share from which on they never are", default=None, check=_shares
    )
    unmask_power: float = option(
        "power of the remaining part of that time that the probability is",
        default=0.9,
        check=positive,
    )

    def __attrs_post_init__(self) -> None:
        for name in ("unmask_from", "unmask_until"):
            given = getattr(self, name)
            if given is not None and len(given) != self.blocks:
                raise InvalidOption(name, f"has {len(given)} numbers for blocks = {self.blocks}")
