"""Files of Vision Transformers under the official names; and all layouts of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from attrs import frozen

from dinov3_framework import (
    BackboneConfig,
    CheckpointError,
    Content,
    Implied,
    Layout,
    Renamed,
    Rule,
)
from dinov3_vit.configs import VitConfig
from dinov3_vit.huggingface import HuggingFaceLayout
from dinov3_vit.naming import NO_MASK_TOKEN, is_buffer
from dinov3_vit.recognition import (
    REQUIRED,
    Structure,
    heads_of,
    published_heads,
    rope_options,
)
from dinov3_vit.timm import TimmLayout

_PERIODS = "rope_embed.periods"
_QKV_BIAS = "blocks.0.attn.qkv.bias"
# Names that other libraries' Vision Transformers do not have; official files have most of them.
_TELLING = frozenset({"mask_token", "storage_tokens", _PERIODS, "blocks.0.ls1.gamma"})


@frozen
class MetaLayout(Layout):
    """The published checkpoints' own names, which are those of ``VisionTransformer.state_dict()``.

    With ``buffers = False``, files of parameters alone, such as a shadow copy that an optimizer
    kept: RoPE's periods and the mask of the keys' bias are not in them and follow from the config.
    """

    buffers: bool = True

    format: ClassVar[str] = "meta"
    config: ClassVar[type[BackboneConfig]] = VitConfig
    unsaid: ClassVar[str] = "the epsilon of its norms and how RoPE's coordinates are normalized"

    def recognize(self, content: Content) -> VitConfig | None:
        """All of the config that shapes and RoPE's periods tell.

        Left at their defaults are: the norms' epsilon, what RoPE's coordinates are divided by,
        the precision it is calculated in, and all that acts in training alone. Without periods, a
        published backbone of the same width says how many heads there are and what base RoPE has.
        """
        shapes = content.shapes
        if not shapes.keys() >= REQUIRED or "blocks.0.attn.qkv.weight" not in shapes:
            return None
        if {"pos_embed", "mask_token"} <= shapes.keys():
            raise CheckpointError(
                "this is a DINOv2 model: it has learnt positions (pos_embed), where DINOv3's "
                "backbones have rotary ones; no backbone here can hold it"
            )
        if not _TELLING & shapes.keys() or self.buffers != (_PERIODS in shapes):
            return None
        structure = Structure.of(shapes)
        options = self._bias_options(content)
        if not self.buffers:
            return structure.config(published_heads(structure.embed_dim), options)
        heads = heads_of(structure.embed_dim, shapes[_PERIODS])
        return structure.config(heads, options | rope_options(content.read(_PERIODS)))

    def _bias_options(self, content: Content) -> dict[str, Any]:
        if _QKV_BIAS not in content.shapes:
            return {"qkv_bias": False}
        if self.buffers:
            masked = f"{_QKV_BIAS}_mask" in content.shapes
        else:
            # A mask keeps the keys' bias at the zero that it starts from.
            masked = not content.read(_QKV_BIAS).chunk(3)[1].any()
        return {"qkv_bias": True, "mask_k_bias": masked}

    def rules(self, config: BackboneConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [
            Renamed(name, name, lacking=NO_MASK_TOKEN if name == "mask_token" else "")
            if self.buffers or not is_buffer(name)
            else Implied(name)
            for name in names
        ]


# Of two layouts of one format, the first is the one that files are written in.
LAYOUTS: list[Layout] = [
    MetaLayout(),
    MetaLayout(buffers=False),
    HuggingFaceLayout(),
    HuggingFaceLayout(blocks="model.layer."),
    TimmLayout(),
]
