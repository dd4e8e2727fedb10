"""Files of heads that say nothing of themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dinov3_framework import Layout, Renamed, Rule
from dinov3_framework.contracts.layouts import Content
from dinov3_segment.configs_mask2former import Mask2FormerConfig
from dinov3_segment.layouts_plain import PlainMaskLayout

if TYPE_CHECKING:
    from dinov3_framework import Target

_ADAPTER, _SEGMENTER = "segmentation_model.0.", "segmentation_model.1."
_CLASSES = f"{_SEGMENTER}predictor.class_embed.weight"
_EXTRACTOR = f"{_ADAPTER}interactions.0.extractor"
_ENCODER = f"{_SEGMENTER}pixel_decoder.encoder.encoder.layers"
_POINTS = 4  # of each head and level, in all that is published
_LEVELS = 3


class Mask2FormerLayout(Layout):
    """The published segmenter: an adapter and Mask2Former.

    The backbone may be in its file, below the adapter; it has a file of its own and is left out.
    """

    format = "meta"
    config = Mask2FormerConfig
    unsaid = "which layers of the backbone it looks at"
    others = (f"{_ADAPTER}backbone.*",)

    def recognize(self, content: Content) -> Mask2FormerConfig | None:
        shapes = content.shapes
        if _CLASSES not in shapes or f"{_EXTRACTOR}.attn.value_proj.weight" not in shapes:
            return None
        queries, hidden = shapes[f"{_SEGMENTER}predictor.query_feat.weight"]
        inside, width = shapes[f"{_EXTRACTOR}.attn.value_proj.weight"]
        return Mask2FormerConfig(
            hidden_dim=hidden,
            queries=queries,
            heads=shapes[f"{_ENCODER}.0.self_attn.attention_weights.bias"][0]
            // (_POINTS * _LEVELS),
            ffn_dim=shapes[f"{_ENCODER}.0.linear1.bias"][0],
            encoder_layers=_count(shapes, _ENCODER),
            decoder_layers=_count(shapes, f"{_SEGMENTER}predictor.transformer_ffn_layers"),
            adapter_channels=shapes[f"{_ADAPTER}spm.stem.0.weight"][0],
            adapter_heads=shapes[f"{_EXTRACTOR}.attn.attention_weights.bias"][0] // _POINTS,
            adapter_ratio=inside / width,
            adapter_ffn_ratio=shapes[f"{_EXTRACTOR}.ffn.fc1.bias"][0] / width,
        )

    def rules(self, config: Mask2FormerConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, name) for name in names]

    def targets(self, content: Content) -> Mapping[str, Target]:
        from dinov3_framework import Target  # takes torch

        return {"mask": Target("mask", n_classes=content.shapes[_CLASSES][0] - 1)}


def _count(shapes: Mapping[str, object], prefix: str) -> int:
    """How many modules of a list there are."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max(int(found[1]) for name in shapes if (found := pattern.match(name)))


LAYOUTS: list[Layout] = [Mask2FormerLayout(), PlainMaskLayout()]
