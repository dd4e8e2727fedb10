"""Folders of Hugging Face's transformers: ``model_type`` "dinov3_vit"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from attrs import frozen

from dinov3_framework import (
    BackboneConfig,
    CheckpointError,
    Chunks,
    Content,
    ImagesConfig,
    Layout,
    Renamed,
    Rule,
)
from dinov3_vit.configs import DEFAULT_ROPE_BASE, VitConfig
from dinov3_vit.naming import (
    NO_MASK_TOKEN,
    BesideEmpty,
    MaskedKeyBias,
    Naming,
    rule_without_place,
    unlike_the_published,
)
from dinov3_vit.recognition import REQUIRED, Structure, base_option, published_heads

_MODEL_TYPE = "dinov3_vit"
_OUTER = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
}
_INNER = {
    "norm1": "norm1",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "ls2.gamma": "layer_scale2.lambda1",
}
_MLP = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
_GATED = {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}
_QKV = ("q", "k", "v")
_EPSILONS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
_BILINEAR = 2  # Pillow's number for it


@frozen
class HuggingFaceLayout(Layout):
    """Tensors as ``DINOv3ViTModel`` names them, with its ``config.json``.

    Files name the blocks ``layer.0``; the module itself, in recent versions, ``model.layer.0``,
    and so does a state dict that somebody saved by hand. Without ``config.json``, what shapes do
    not tell is as in published models.
    """

    blocks: str = "layer."

    format: ClassVar[str] = "huggingface"
    config: ClassVar[type[BackboneConfig]] = VitConfig

    def _naming(self, gated: bool) -> Naming:
        return Naming(self.blocks, _OUTER, _INNER | (_GATED if gated else _MLP))

    # ------------------------------------------------------------------- reading
    def recognize(self, content: Content) -> VitConfig | None:
        first = f"{self.blocks}0"
        if f"{first}.attention.q_proj.weight" not in content.shapes:
            return None
        settings = _settings(content.settings)
        gated = f"{first}.mlp.gate_proj.weight" in content.shapes
        shapes = self._naming(gated).official(content.shapes)
        if settings is None or not shapes.keys() >= REQUIRED:
            return None
        structure = Structure.of(shapes)
        options = self._bias_options(content)
        if not settings:
            return structure.config(published_heads(structure.embed_dim), options)
        _check(settings, structure)
        heads = _number(settings, "num_attention_heads", 6)
        return structure.config(int(heads), options | _options(settings, gated))

    def _bias_options(self, content: Content) -> dict[str, bool]:
        biases = f"{self.blocks}0.attention.{{}}_proj.bias"
        query, key, value = (biases.format(each) in content.shapes for each in _QKV)
        if query != value or (key and not query):
            raise CheckpointError(
                "of query, key and value, some have a bias and some have none; these backbones "
                "have all three, all but the key's, or none"
            )
        return {"qkv_bias": True, "mask_k_bias": not key} if query else {"qkv_bias": False}

    def rules(self, config: BackboneConfig, names: Sequence[str]) -> Sequence[Rule]:
        config = cast(VitConfig, config)
        naming = self._naming(config.ffn_layer != "mlp")
        return [rule_without_place(name) or self._rule(name, config, naming) for name in names]

    def _rule(self, name: str, config: VitConfig, naming: Naming) -> Rule:
        if ".attn.qkv." in name:
            _, index, _, _, last = name.split(".")
            parts = [f"{self.blocks}{index}.attention.{each}_proj.{last}" for each in _QKV]
            if last == "bias" and config.mask_k_bias:
                return MaskedKeyBias(name, [parts[0], None, parts[2]])
            return Chunks(name, parts)
        if name == "cls_token" and not config.n_storage_tokens:
            return BesideEmpty(name, naming(name), empty=naming("storage_tokens"))
        if name == "mask_token":
            return Renamed(name, naming(name), leading=1, lacking=NO_MASK_TOKEN)
        return Renamed(name, naming(name))

    # ------------------------------------------------------------------- writing
    def refusal(self, config: BackboneConfig) -> str | None:
        config = cast(VitConfig, config)
        if config.norm_layer not in _EPSILONS:
            return f"it norms by LayerNorm alone, and this backbone by {config.norm_layer}"
        if not config.layerscale_init:
            return "it always scales residual branches, and this backbone has layerscale_init = 0"
        return unlike_the_published(config)

    def settings(
        self, config: BackboneConfig, images: ImagesConfig, size: int
    ) -> Mapping[str, Mapping[str, Any]]:
        return {
            "config.json": _config_json(cast(VitConfig, config), size),
            "preprocessor_config.json": _preprocessor_json(images, size),
        }


# --------------------------------------------------------------------------- config.json
def _settings(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Those of this model, which may be a part of another; None if they are another model's."""
    nested = [value for value in settings.values() if isinstance(value, Mapping)]
    for each in (settings, *nested):
        if each.get("model_type") == _MODEL_TYPE:
            return each
    return None if settings else {}


def _check(settings: Mapping[str, Any], structure: Structure) -> None:
    """Raise ``CheckpointError`` for what the tensors contradict and what no config expresses."""
    for name, found in {
        "hidden_size": structure.embed_dim,
        "num_hidden_layers": structure.depth,
        "intermediate_size": structure.ffn_hidden,
    }.items():
        if settings.get(name, found) != found:
            raise CheckpointError(
                f"config.json says {name} = {settings[name]}, and the tensors beside it {found}; "
                "they are not of one model"
            )
    activation = settings.get("hidden_act", "gelu")
    wanted = "silu" if structure.gated else "gelu"
    if activation != wanted:
        raise CheckpointError(
            f'config.json says hidden_act = "{activation}"; these backbones have "{wanted}" in '
            f"{'a gated' if structure.gated else 'a plain'} FFN"
        )


def _options(settings: Mapping[str, Any], gated: bool) -> dict[str, Any]:
    """The config's fields that shapes do not tell; what is left out is as transformers has it."""
    epsilon = _number(settings, "layer_norm_eps", 1e-5)
    norms = [n for n, value in _EPSILONS.items() if math.isclose(value, epsilon, rel_tol=1e-6)]
    if not norms:
        known = " or ".join(map(str, _EPSILONS.values()))
        raise CheckpointError(
            f"config.json says layer_norm_eps = {epsilon}; these backbones' norms have {known}"
        )
    return {
        "norm_layer": norms[0],
        "pos_embed_rope_base": base_option(_number(settings, "rope_theta", DEFAULT_ROPE_BASE)),
        "pos_embed_rope_shift_coords": settings.get("pos_embed_shift"),
        "pos_embed_rope_jitter_coords": settings.get("pos_embed_jitter"),
        "pos_embed_rope_rescale_coords": settings.get("pos_embed_rescale", 2.0),
    }


def _number(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"config.json says {name} = {value!r}, not a number above 0")
    return value


def _config_json(config: VitConfig, size: int) -> dict[str, Any]:
    gated = config.ffn_layer != "mlp"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": _MODEL_TYPE,
        "dtype": "float32",
        "image_size": size,
        "patch_size": config.patch_size,
        "num_channels": 3 if config.in_chans is None else config.in_chans,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_hidden,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and not config.mask_k_bias,
        "value_bias": config.qkv_bias,
        "proj_bias": config.proj_bias,
        "mlp_bias": config.ffn_bias,
        "layerscale_value": config.layerscale_init,
        "layer_norm_eps": _EPSILONS[config.norm_layer],
        "num_register_tokens": config.n_storage_tokens,
        "rope_theta": config.pos_embed_rope_base or DEFAULT_ROPE_BASE,
        "pos_embed_shift": config.pos_embed_rope_shift_coords,
        "pos_embed_jitter": config.pos_embed_rope_jitter_coords,
        "pos_embed_rescale": config.pos_embed_rope_rescale_coords,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
    }


def _preprocessor_json(images: ImagesConfig, size: int) -> dict[str, Any]:
    return {
        # The name in published folders, which old and new versions know.
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": _BILINEAR,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
