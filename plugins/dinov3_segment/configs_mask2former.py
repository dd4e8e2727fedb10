"""Options of Mask2Former on a ViT adapter."""

from __future__ import annotations

from dinov3_framework import config, fraction, option, positive
from dinov3_segment.configs_masks import MaskClassificationConfig


def _four(value: tuple[int, ...] | None) -> str | None:
    if value is None or len(value) == 4:
        return None
    return f"must name four layers, is {list(value)}"


@config
class Mask2FormerConfig(MaskClassificationConfig):
    """Mask2Former on a ViT adapter (arXiv:2112.01527, arXiv:2205.08534).

    As it is, DINOv3's published one on ViT-7B/16.
    """

    layers: tuple[int, ...] | None = option(
        "four layers of the backbone that the adapter looks at; left out, the last of each quarter",
        default=None,
        check=_four,
    )
    hidden_dim: int = option(
        "width of the pixel decoder and of the queries", default=2048, check=positive
    )
    queries: int = option("masks that are predicted", default=100, check=positive)
    heads: int = option(
        "attention heads of the pixel decoder and of the decoder", default=16, check=positive
    )
    ffn_dim: int = option("hidden width of their FFNs", default=4096, check=positive)
    encoder_layers: int = option("layers of the pixel decoder", default=6, check=positive)
    decoder_layers: int = option("layers of the decoder", default=9, check=positive)
    adapter_channels: int = option(
        "channels of the adapter's first convolution", default=64, check=positive
    )
    adapter_heads: int = option(
        "heads of the adapter's deformable attention", default=16, check=positive
    )
    adapter_points: int = option("points that each of these looks at", default=4, check=positive)
    adapter_ratio: float = option(
        "width of the adapter's attention over the backbone's", default=0.5, check=positive
    )
    adapter_ffn_ratio: float = option(
        "hidden width of the adapter's FFNs over the backbone's", default=0.25, check=positive
    )
    adapter_drop_path: float = option(
        "share of a batch for which an adapter's FFN is left out in training",
        default=0.3,
        check=fraction,
    )
