"""The Vision Transformer's config, and one config per published size."""

from __future__ import annotations

import math
from typing import Any, Literal

from dinov3_framework import (
    BackboneConfig,
    InvalidOption,
    config,
    not_negative,
    option,
    positive,
    preset,
)

DEFAULT_ROPE_BASE = 100.0
# What the hidden width of a SwiGLU is rounded up to.
SWIGLU_MULTIPLE = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


def _depth(value: int) -> str | None:
    """Files name depths too; a far deeper one would be built without end."""
    return positive(value) or (None if value <= 1000 else f"must be at most 1,000, is {value:,}")


def _below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else f"must be at least 0 and below 1, is {value}"


def _at_least_one(value: float) -> str | None:
    return None if value >= 1 else f"must be at least 1 (1 changes nothing), is {value}"


@config
class VitConfig(BackboneConfig):
    """A Vision Transformer, every dimension of it free; the defaults give a plain ViT-B/16."""

    patch_size: int = option("pixels along the side of a patch", default=16, check=positive)
    embed_dim: int = option("width of a token", default=768, check=positive)
    depth: int = option("number of blocks", default=12, check=_depth)
    num_heads: int = option("attention heads of a block", default=12, check=positive)
    ffn_ratio: float = option("hidden width of the FFN over embed_dim", default=4.0, check=positive)
    ffn_layer: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"] = option(
        "FFN: a GELU MLP, or SwiGLU with 2/3 of the hidden width rounded up to a multiple of 8 or "
        "of the number in the name",
        default="mlp",
    )
    qkv_bias: bool = option("bias of the query, key and value projection", default=True)
    proj_bias: bool = option("bias of the attention's output projection", default=True)
    ffn_bias: bool = option("biases of the FFN", default=True)
    layerscale_init: float | None = option(
        "initial scale of each residual branch; 0 for none", default=1e-5, check=not_negative
    )
    norm_layer: Literal["layernorm", "layernormbf16", "rmsnorm"] = option(
        "LayerNorm with epsilon 1e-6, LayerNorm with 1e-5 (for bf16), or RMSNorm with 1e-5",
        default="layernormbf16",
    )
    n_storage_tokens: int = option(
        "storage (register) tokens beside the class token", default=4, check=not_negative
    )
    mask_k_bias: bool = option(
        "hold the keys' bias at 0, where it has no effect on attention", default=True
    )
    untie_cls_and_patch_norms: bool = option(
        "a final norm of their own for class and storage tokens", default=False
    )
    untie_global_and_local_cls_norm: bool = option(
        "a final norm of their own for class and storage tokens of local crops, in training",
        default=False,
    )
    pos_embed_rope_base: float | None = option(
        "RoPE: the periods rise from 1 towards this; left out, 100, unless both periods are given",
        default=None,
        check=positive,
    )
    pos_embed_rope_min_period: float | None = option(
        "RoPE: shortest period, where an image spans -1 to 1",
        default=None,
        check=positive,
    )
    pos_embed_rope_max_period: float | None = option(
        "RoPE: longest period, where an image spans -1 to 1", default=None, check=positive
    )
    pos_embed_rope_normalize_coords: Literal["min", "max", "separate"] = option(
        "RoPE: what maps patch positions to [-1, 1]: the shorter side, the longer, or each side "
        "its own length",
        default="separate",
    )
    pos_embed_rope_shift_coords: float | None = option(
        "RoPE, in training: shift each axis by a uniform value up to this",
        default=None,
        check=not_negative,
    )
    pos_embed_rope_jitter_coords: float | None = option(
        "RoPE, in training: scale each axis by a log-uniform factor up to this or one over it",
        default=None,
        check=_at_least_one,
    )
    pos_embed_rope_rescale_coords: float | None = option(
        "RoPE, in training: scale both axes by one log-uniform factor up to this or one over it",
        default=None,
        check=_at_least_one,
    )
    pos_embed_rope_dtype: Literal["fp32", "fp16", "bf16"] = option(
        "RoPE: precision of the tables and of the rotation, whatever the parameters' precision",
        default="fp32",
    )
    drop_path_rate: float = option(
        "fraction of a batch's samples that skip a residual branch, in training",
        default=0.0,
        check=_below_one,
    )

    def __attrs_post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise InvalidOption(
                "embed_dim", f"{self.embed_dim} is not a multiple of num_heads = {self.num_heads}"
            )
        if self.head_dim % 4:
            raise InvalidOption(
                "embed_dim",
                f"{self.embed_dim} over num_heads = {self.num_heads} is {self.head_dim} a head; "
                "RoPE needs a multiple of 4",
            )
        self._check_periods()

    def _check_periods(self) -> None:
        base = self.pos_embed_rope_base
        low, high = self.pos_embed_rope_min_period, self.pos_embed_rope_max_period
        if low is None and high is None:
            return
        if low is None or high is None:
            missing = "min" if low is None else "max"
            raise InvalidOption(
                f"pos_embed_rope_{missing}_period",
                "is missing; the shortest and the longest period go together",
            )
        if base is not None:
            raise InvalidOption(
                "pos_embed_rope_base",
                f"is {base:g}, while the periods are given too; leave out one or the other",
            )
        if low > high:
            raise InvalidOption(
                "pos_embed_rope_min_period",
                f"{low:g} is above pos_embed_rope_max_period = {high:g}",
            )

    def evaluation_settings(self) -> dict[str, object]:
        low, high = self.pos_embed_rope_min_period, self.pos_embed_rope_max_period
        base = self.pos_embed_rope_base
        return {
            "num_heads": self.num_heads,
            "norm_layer": self.norm_layer,
            "pos_embed_rope_base": DEFAULT_ROPE_BASE if base is None and low is None else base,
            "pos_embed_rope_min_period": low,
            "pos_embed_rope_max_period": high,
            "pos_embed_rope_normalize_coords": self.pos_embed_rope_normalize_coords,
            "pos_embed_rope_dtype": self.pos_embed_rope_dtype,
        }

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the FFN, as it is built."""
        hidden = int(self.embed_dim * self.ffn_ratio)
        if self.ffn_layer == "mlp":
            return hidden
        # Three matrices of 2/3 of the width have as many weights as two of the whole.
        multiple = SWIGLU_MULTIPLE[self.ffn_layer]
        return math.ceil(int(hidden * 2 / 3) / multiple) * multiple


# The published models rescale coordinates in training; the rest of their recipe is VitConfig's.
_PUBLISHED: dict[str, Any] = {"pos_embed_rope_rescale_coords": 2.0}
_PLUS: dict[str, Any] = {**_PUBLISHED, "ffn_layer": "swiglu", "ffn_ratio": 6.0}


@preset(**_PUBLISHED, embed_dim=384, depth=12, num_heads=6)
class VitSmallConfig(VitConfig):
    """DINOv3's ViT-S/16, 21.6M parameters."""


@preset(**_PLUS, embed_dim=384, depth=12, num_heads=6)
class VitSmallPlusConfig(VitConfig):
    """DINOv3's ViT-S+/16 (wider SwiGLU FFN), 28.7M parameters."""


@preset(**_PUBLISHED, embed_dim=768, depth=12, num_heads=12)
class VitBaseConfig(VitConfig):
    """DINOv3's ViT-B/16, 85.7M parameters."""


@preset(**_PUBLISHED, embed_dim=1024, depth=24, num_heads=16)
class VitLargeConfig(VitConfig):
    """DINOv3's ViT-L/16, 303M parameters.

    The satellite (SAT-493M) weights want ``untie_global_and_local_cls_norm = true`` besides.
    """


@preset(**_PLUS, embed_dim=1024, depth=24, num_heads=16)
class VitLargePlusConfig(VitConfig):
    """ViT-L+/16 (wider SwiGLU FFN), 404M parameters."""


@preset(**_PUBLISHED, embed_dim=1152, depth=27, num_heads=18, ffn_ratio=3.777777778)
class VitSo400mConfig(VitConfig):
    """The shape-optimized ViT-SO400M/16, 415M parameters."""


@preset(**_PLUS, embed_dim=1280, depth=32, num_heads=20)
class VitHugePlusConfig(VitConfig):
    """DINOv3's ViT-H+/16 (wider SwiGLU FFN), 841M parameters."""


@preset(**_PUBLISHED, embed_dim=1280, depth=32, num_heads=20)
class VitHugeConfig(VitConfig):
    """The plain ViT-H/16, 631M parameters."""


@preset(**_PUBLISHED, embed_dim=1536, depth=40, num_heads=24)
class VitGiantConfig(VitConfig):
    """ViT-g/16, with 64 channels a head, 1,135M parameters."""


@preset(
    **_PUBLISHED,
    embed_dim=4096,
    depth=40,
    num_heads=32,
    ffn_ratio=3.0,
    ffn_layer="swiglu64",
    qkv_bias=False,
    untie_global_and_local_cls_norm=True,
)
class Vit7bConfig(VitConfig):
    """DINOv3's ViT-7B/16, 6,716M parameters."""


PRESETS: dict[str, type[VitConfig]] = {
    "vit_small": VitSmallConfig,
    "vit_small_plus": VitSmallPlusConfig,
    "vit_base": VitBaseConfig,
    "vit_large": VitLargeConfig,
    "vit_large_plus": VitLargePlusConfig,
    "vit_so400m": VitSo400mConfig,
    "vit_huge_plus": VitHugePlusConfig,
    "vit_huge": VitHugeConfig,
    "vit_giant": VitGiantConfig,
    "vit_7b": Vit7bConfig,
}
