"""Mask2Former as a head: a ViT adapter, a pixel decoder, a decoder of masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework.configs import InvalidOption
from dinov3_framework.contracts.data import Target
from dinov3_framework.contracts.networks import FeatureInfo, FeatureNeeds, HeadFeatures
from dinov3_framework.data.tokens import even_layers
from dinov3_framework.errors import UserError
from dinov3_segment.adapter import ViTAdapter
from dinov3_segment.configs_mask2former import Mask2FormerConfig
from dinov3_segment.mask_decoder import MaskDecoder
from dinov3_segment.mask_head import MaskHead
from dinov3_segment.pixel_decoder import PixelDecoder

_COARSEST = 32  # pixels of the coarsest map's stride, of which sides of images are multiples
_FINEST = 4  # pixels of the stride of masks
_GROUPS = 32


class Segmenter(nn.Module):
    """Pixel decoder and decoder, under the names of the official files."""

    def __init__(self, config: Mask2FormerConfig, width: int, classes: int) -> None:
        super().__init__()
        dim, heads, hidden = config.hidden_dim, config.heads, config.ffn_dim
        self.pixel_decoder = PixelDecoder(
            [width] * 4, dim, heads=heads, hidden=hidden, layers=config.encoder_layers
        )
        self.predictor = MaskDecoder(
            dim,
            classes,
            queries=config.queries,
            heads=heads,
            hidden=hidden,
            layers=config.decoder_layers,
        )

    def forward(self, maps: Sequence[Tensor]) -> list[dict[str, Any]]:
        features, levels = self.pixel_decoder(maps)
        return self.predictor(levels, features)  # type: ignore[no-any-return]


class Mask2Former(MaskHead):
    """Masks of the classes of an image, by queries that look where their masks are."""

    config: Mask2FormerConfig

    def __init__(
        self,
        config: Mask2FormerConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
        in_chans: int = 3,
    ) -> None:
        super().__init__(config, targets)
        if config.layers is None and len(features) < 4:
            raise UserError(f"needs four layers, and this backbone has {len(features)}")
        layers = config.layers or even_layers(len(features))
        infos = {features[layer] for layer in layers}
        if len(infos) > 1:
            raise UserError(
                "layers must be alike, and this backbone's differ in width or stride: "
                + ", ".join(
                    f"{each.channels} at {each.stride} px" for each in sorted(infos, key=str)
                )
            )
        (info,) = infos
        _check_widths(config, info.channels)
        self.needs = FeatureNeeds(layers=tuple(layers), image=True)
        adapter = ViTAdapter(
            info.channels,
            in_chans=in_chans,
            channels=config.adapter_channels,
            heads=config.adapter_heads,
            points=config.adapter_points,
            ratio=config.adapter_ratio,
            ffn_ratio=config.adapter_ffn_ratio,
            drop_path=config.adapter_drop_path,
        )
        segmenter = Segmenter(config, info.channels, self.classes)
        self.segmentation_model = nn.ModuleList([adapter, segmenter])

    def init_weights(self) -> None:
        adapter, segmenter = self._parts()
        adapter.init_weights()
        segmenter.pixel_decoder.init_weights()
        segmenter.predictor.init_weights()

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        adapter, segmenter = self._parts()
        predictor = segmenter.predictor
        return [
            *adapter.interactions,
            *segmenter.pixel_decoder.encoder.encoder.layers,
            *predictor.transformer_cross_attention_layers,
            *predictor.transformer_self_attention_layers,
            *predictor.transformer_ffn_layers,
        ]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Not norms and embeddings, as in Mask2Former's training."""
        return parameter.ndim > 1 and not any(
            part in name for part in ("level_e", "query_feat", "query_embed")
        )

    def forward(self, features: HeadFeatures) -> dict[str, Any]:
        _, segmenter = self._parts()
        outputs = segmenter(self.maps(features))
        height, width = (-(-side // _FINEST) for side in features.image_size)
        for each in outputs:  # what images were filled up with is cut off again
            each["pred_masks"] = each["pred_masks"][..., :height, :width]
        *earlier, last = outputs
        # Whoever predicts keeps outputs of many windows, and has no use for the earlier layers.
        return {**last, "aux_outputs": earlier} if self.training else dict(last)

    def maps(self, features: HeadFeatures) -> list[Tensor]:
        """The adapter's maps [B, D, H / s, W / s] for strides s of 4, 8, 16 and 32.

        Sides that are no multiples of 32 are filled up with the mean color and with the values at
        the edge of the layers.
        """
        adapter, _ = self._parts()
        dtype = adapter.level_embed.dtype
        if features.image is None:
            raise ValueError("the adapter looks at the image, and there is none")
        image = features.image.to(dtype)
        height, width = image.shape[-2:]
        bottom, right = -height % _COARSEST, -width % _COARSEST
        layers = [each.to(dtype) for each in features.maps]
        if bottom or right:
            stride = height // layers[0].shape[-2]
            image = F.pad(image, (0, right, 0, bottom))
            more = (0, right // stride, 0, bottom // stride)
            layers = [F.pad(each, more, mode="replicate") for each in layers]
        return adapter(image, layers)  # type: ignore[no-any-return]

    def _parts(self) -> tuple[ViTAdapter, Segmenter]:
        adapter, segmenter = self.segmentation_model
        return adapter, segmenter  # type: ignore[return-value]


def _check_widths(config: Mask2FormerConfig, width: int) -> None:
    inside = int(width * config.adapter_ratio)
    if width % config.adapter_heads or inside % config.adapter_heads:
        raise InvalidOption(
            "adapter_heads",
            f"is {config.adapter_heads}, which does not divide the widths {width} and {inside}",
        )
    if config.hidden_dim % config.heads:
        raise InvalidOption(
            "heads", f"is {config.heads}, which does not divide hidden_dim = {config.hidden_dim}"
        )
    if config.hidden_dim % _GROUPS:
        raise InvalidOption(
            "hidden_dim",
            f"is {config.hidden_dim}, no multiple of the {_GROUPS} groups of its norms",
        )
