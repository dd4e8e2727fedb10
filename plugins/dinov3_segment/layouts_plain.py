"""Files of the plain mask transformer as it is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from dinov3_framework import CheckpointError, Layout, Renamed, Rule
from dinov3_framework.contracts.layouts import Content
from dinov3_segment.configs_plain import PlainMaskTransformerConfig

if TYPE_CHECKING:
    from dinov3_framework import Target

_LEVELS = 4  # of every published one: the last layer of each quarter of the backbone


class PlainMaskLayout(Layout):
    """The decoder and what normalizes the backbone's layers, without the backbone."""

    format = "meta"
    config = PlainMaskTransformerConfig
    unsaid: ClassVar[str] = "which layers it sees and how many heads its attention has"

    def recognize(self, content: Content) -> PlainMaskTransformerConfig | None:
        shapes = content.shapes
        if not {"decoder.attn_mask_probs", "decoder.q.weight", "decoder.scalers.0"} <= set(shapes):
            return None
        levels = sum(name.startswith("decoder.scalers.") for name in shapes)
        if levels != _LEVELS:
            raise CheckpointError(
                f"a plain mask transformer on {levels} layers of a backbone; its file does not say "
                f"which they are, known is that alone for {_LEVELS}"
            )
        lateral: Literal["mlp", "linear", "none"] = "none"
        if "decoder.lateral_projections.0.0.weight" in shapes:
            lateral = "mlp"
        elif "decoder.lateral_projections.0.weight" in shapes:
            lateral = "linear"
        queries, width = shapes["decoder.q.weight"]
        hidden = shapes.get("decoder.blocks.0.mlp.up_proj.weight", (width,))[0]
        return PlainMaskTransformerConfig(
            queries=queries,
            blocks=shapes["decoder.attn_mask_probs"][0],
            hidden=None if hidden == width else hidden,
            lateral=lateral,
            batch_norm="bn.0.weight" in shapes,
        )

    def rules(self, config: PlainMaskTransformerConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, name) for name in names]

    def targets(self, content: Content) -> Mapping[str, Target]:
        from dinov3_framework import Target  # takes torch

        classes = content.shapes["decoder.class_head.weight"][0] - 1  # and nothing
        return {"mask": Target("mask", n_classes=classes, ignore_index=255)}
