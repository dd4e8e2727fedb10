"""Folders of timm: its ``vit_*_patch16_dinov3`` and ``vit_*_patch16_dinov3_qkvb``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from attrs import frozen

from dinov3_framework import (
    BackboneConfig,
    CheckpointError,
    Chunks,
    Content,
    Dropped,
    ImagesConfig,
    Layout,
    Renamed,
    Rule,
)
from dinov3_vit.configs import DEFAULT_ROPE_BASE, SWIGLU_MULTIPLE, VitConfig
from dinov3_vit.naming import MaskedKeyBias, Naming, rule_without_place, unlike_the_published
from dinov3_vit.recognition import (
    REQUIRED,
    Structure,
    base_option,
    published_heads,
    ratio_of,
)

_OUTER = {
    "cls_token": "cls_token",
    "storage_tokens": "reg_token",
    "patch_embed.proj": "patch_embed.proj",
    "norm": "norm",
}
_INNER = {
    "norm1": "norm1",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.proj": "attn.proj",
    "ls1.gamma": "gamma_1",
    "norm2": "norm2",
    "ls2.gamma": "gamma_2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_GATED = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}
_MASK_TOKEN = "stands for masked patches in training, nothing else"
_NORM = "layernormbf16"  # the one whose epsilon timm's architectures have
# What else its architectures have in common, by the names of their arguments.
_ROPE = {
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "rope_grid_indexing": "ij",
    "rope_grid_offset": 0.0,
}


@frozen
class _Size:
    """Arguments of ``timm.models.eva.Eva`` that tell its architectures from one another."""

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    swiglu_mlp: bool = False
    variants: tuple[bool, ...] = (False, True)  # values of qkv_bias that there are


_SIZES = (
    _Size("vit_small", 384, 12, 6),
    _Size("vit_small_plus", 384, 12, 6, swiglu_mlp=True),
    _Size("vit_base", 768, 12, 12),
    _Size("vit_large", 1024, 24, 16),
    _Size("vit_huge_plus", 1280, 32, 20, swiglu_mlp=True),
    _Size("vit_tiny", 192, 12, 3, variants=(True,)),
    _Size("vit_7b", 4096, 40, 32, mlp_ratio=2.0, swiglu_mlp=True, variants=(False,)),
)
_ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    f"{size.name}_patch16_dinov3{'_qkvb' if qkv_bias else ''}": {
        "in_chans": 3,
        "patch_size": 16,
        "embed_dim": size.embed_dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "mlp_ratio": size.mlp_ratio,
        "swiglu_mlp": size.swiglu_mlp,
        "qkv_bias": qkv_bias,
        "num_reg_tokens": 4,
        "init_values": 1e-5,
        "rope_temperature": DEFAULT_ROPE_BASE,
    }
    for size in _SIZES
    for qkv_bias in size.variants
}


@frozen
class TimmLayout(Layout):
    """Tensors as timm's ``Eva`` names them, with a ``config.json`` that ``local-dir:`` reads.

    A size that timm has no architecture for is written as the nearest one and ``model_args``. The
    folder asks timm for the class token (``global_pool``), as this framework's backbones give it;
    timm by itself would average over patches.
    """

    format: ClassVar[str] = "timm"
    config: ClassVar[type[BackboneConfig]] = VitConfig

    # ------------------------------------------------------------------- reading
    def recognize(self, content: Content) -> VitConfig | None:
        """Heads and RoPE's base from ``config.json``; without it, those of published models."""
        names = content.shapes.keys()
        if "blocks.0.attn.qkv.weight" not in names or "pos_embed" in names:
            return None
        if not names & {"blocks.0.gamma_1", "reg_token", "blocks.0.attn.q_bias"}:
            return None
        arguments = _arguments(content.settings)
        shapes = _naming("blocks.0.mlp.fc1_g.weight" in names).official(content.shapes)
        if arguments is None:
            return None
        if REQUIRED - shapes.keys() == {"norm.weight"} and "fc_norm.weight" in names:
            raise CheckpointError(
                "this is a classifier of timm made with use_fc_norm=True: it normalizes the mean "
                "of its tokens (fc_norm) and has no norm of the tokens themselves, so it gives no "
                "features; fine-tune without use_fc_norm, or take the weights that it began as"
            )
        if not shapes.keys() >= REQUIRED:
            return None
        structure = Structure.of(shapes)
        heads = arguments.get("num_heads")
        if heads is None or arguments.get("embed_dim") != structure.embed_dim:
            heads = _published_heads(structure.embed_dim)
        return structure.config(
            int(heads),
            {
                "qkv_bias": "blocks.0.attn.q_bias" in names,  # the keys' is never in the file
                "pos_embed_rope_base": base_option(
                    float(arguments.get("rope_temperature", DEFAULT_ROPE_BASE))
                ),
            },
        )

    def rules(self, config: BackboneConfig, names: Sequence[str]) -> Sequence[Rule]:
        config = cast(VitConfig, config)
        naming = _naming(config.ffn_layer != "mlp")
        return [rule_without_place(name) or self._rule(name, config, naming) for name in names]

    def _rule(self, name: str, config: VitConfig, naming: Naming) -> Rule:
        if name == "mask_token":
            return Dropped(name, _MASK_TOKEN)
        if name.endswith(".attn.qkv.bias"):
            attention = name.removesuffix("qkv.bias")
            kind = MaskedKeyBias if config.mask_k_bias else Chunks
            return kind(name, [f"{attention}q_bias", None, f"{attention}v_bias"])
        return Renamed(name, naming(name))

    # ------------------------------------------------------------------- writing
    def refusal(self, config: BackboneConfig) -> str | None:
        config = cast(VitConfig, config)
        if config.norm_layer != _NORM:
            return (
                "its norms are LayerNorms with epsilon 1e-5, and this backbone has "
                f'norm_layer = "{config.norm_layer}"'
            )
        for name in ("proj_bias", "ffn_bias"):
            if not getattr(config, name):
                return f"its projections and FFNs have biases, and this backbone {name} = false"
        return unlike_the_published(config)

    def settings(
        self, config: BackboneConfig, images: ImagesConfig, size: int
    ) -> Mapping[str, Mapping[str, Any]]:
        config = cast(VitConfig, config)
        architecture, arguments = _nearest(_arguments_of(config))
        return {
            "config.json": {
                "architecture": architecture,
                "num_classes": 0,
                "num_features": config.embed_dim,
                "global_pool": "token",
                "model_args": {"global_pool": "token", **arguments},
                "pretrained_cfg": {
                    "num_classes": 0,
                    "input_size": [images.channels, size, size],
                    "fixed_input_size": True,
                    "pool_size": None,
                    "crop_pct": 1.0,
                    "interpolation": "bicubic",
                    "mean": list(images.mean),
                    "std": list(images.std),
                    "first_conv": "patch_embed.proj",
                    "classifier": "head",
                },
            }
        }


def _naming(gated: bool) -> Naming:
    return Naming("blocks.", _OUTER, _INNER | _GATED if gated else _INNER)


def _published_heads(embed_dim: int) -> int:
    tiny = next(size for size in _SIZES if size.name == "vit_tiny")
    return tiny.num_heads if embed_dim == tiny.embed_dim else published_heads(embed_dim)


# --------------------------------------------------------------------------- config.json
def _arguments(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The architecture's arguments; nothing without settings, None if it is another one."""
    if not settings:
        return {}
    architecture = str(settings.get("architecture"))
    if architecture not in _ARCHITECTURES:
        return None
    given = settings.get("model_args") or {}
    for name, value in _ROPE.items():
        if given.get(name, value) != value:
            raise CheckpointError(
                f"config.json says {name} = {given[name]!r}; these backbones have {value!r}"
            )
    return {**_ARCHITECTURES[architecture], **given}


def _arguments_of(config: VitConfig) -> dict[str, Any]:
    return {
        "in_chans": 3 if config.in_chans is None else config.in_chans,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": ratio_of(config.ffn_hidden, config.embed_dim),
        "swiglu_mlp": config.ffn_layer != "mlp",
        "qkv_bias": config.qkv_bias,
        "num_reg_tokens": config.n_storage_tokens,
        "init_values": 1e-5 if config.layerscale_init else None,  # a first value, long gone
        "rope_temperature": config.pos_embed_rope_base or DEFAULT_ROPE_BASE,
    }


def _nearest(wanted: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An architecture, and those of its arguments that must be changed to have ``wanted``."""
    differing = {
        name: {key: value for key, value in wanted.items() if arguments[key] != value}
        for name, arguments in _ARCHITECTURES.items()
        # A gated FFN brings arguments of its own.
        if arguments["swiglu_mlp"] == wanted["swiglu_mlp"]
    }
    name = min(differing, key=lambda each: len(differing[each]))
    arguments = differing[name]
    if wanted["swiglu_mlp"] and "mlp_ratio" in arguments:
        # Some round the width up further.
        arguments["swiglu_align_to"] = SWIGLU_MULTIPLE["swiglu"]
    return name, arguments
