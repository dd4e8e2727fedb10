"""Configs of backbones: what they refuse, and the published sizes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import attrs
import pytest
import torch
from backbone_families import CONVNEXT, EACH_FAMILY, FAMILIES, VIT, Family
from dinov3_convnext.configs import ConvNextConfig, ConvNextTinyConfig
from dinov3_vit.configs import Vit7bConfig, VitConfig, VitSmallConfig

from dinov3_framework import InvalidOption, Registry, preset

REFUSED: dict[Family, list[tuple[dict[str, Any], str]]] = {
    VIT: [
        ({"embed_dim": 100, "num_heads": 3}, "embed_dim: 100 is not a multiple of num_heads = 3"),
        ({"embed_dim": 60, "num_heads": 10}, "is 6 a head; RoPE needs a multiple of 4"),
        ({"depth": 0}, "depth: must be above 0"),
        ({"depth": 10**7}, "depth: must be at most 1,000"),
        ({"in_chans": 0}, "in_chans: must be above 0"),
        ({"n_storage_tokens": -1}, "n_storage_tokens: must not be negative"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: must be at least 0 and below 1"),
        ({"pos_embed_rope_jitter_coords": 0.5}, "pos_embed_rope_jitter_coords: must be at least 1"),
        ({"pos_embed_rope_rescale_coords": 0.0}, "must be at least 1"),
        (
            {"pos_embed_rope_min_period": 1.0},
            "pos_embed_rope_max_period: is missing; the shortest and the longest",
        ),
        (
            {
                "pos_embed_rope_base": 100.0,
                "pos_embed_rope_min_period": 1.0,
                "pos_embed_rope_max_period": 9.0,
            },
            "pos_embed_rope_base: is 100, while the periods are given too",
        ),
        (
            {"pos_embed_rope_min_period": 9.0, "pos_embed_rope_max_period": 1.0},
            "pos_embed_rope_min_period: 9 is above pos_embed_rope_max_period = 1",
        ),
    ],
    CONVNEXT: [
        ({"depths": (3, 3, 9)}, "depths: must be 4 numbers, one for each stage, is [3, 3, 9]"),
        ({"depths": (3, 3, 0, 3)}, "depths: must all be above 0, is [3, 3, 0, 3]"),
        ({"depths": (3, 3, 10**7, 3)}, "depths: must all be at most 1,000"),
        ({"dims": (8,) * 5}, "dims: must be 4 numbers"),
        ({"dims": (8, 8, 8, -8)}, "dims: must all be above 0"),
        ({"patch_size": 0}, "patch_size: must be above 0"),
        ({"in_chans": 0}, "in_chans: must be above 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: must be at least 0 and below 1"),
        ({"layer_scale_init_value": -1.0}, "layer_scale_init_value: must not be negative"),
    ],
}
# As published: ViTs of 21M, 29M, 86M, 300M, 840M and 6,716M, the others follow from their shapes;
# ConvNeXts of 29M, 50M, 89M and 198M with ImageNet's classifier, of 0.8M to 1.5M.
SIZES = {
    "vit_small": 21_601_152,
    "vit_small_plus": 28_697_472,
    "vit_base": 85_669_632,
    "vit_large": 303_154_176,
    "vit_large_plus": 403_915_776,
    "vit_so400m": 415_411_200,
    "vit_huge_plus": 840_633_600,
    "vit_huge": 630_754_560,
    "vit_giant": 1_134_577_152,
    "vit_7b": 6_716_043_264,
    "convnext_tiny": 27_820_128,
    "convnext_small": 49_454_688,
    "convnext_base": 87_566_464,
    "convnext_large": 196_230_336,
}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        pytest.param(config, options, message, id=f"{config.__name__} {message}")
        for family, cases in REFUSED.items()
        for options, message in cases
        for config in (family.config, next(iter(family.presets.values())))
        if config is family.config or len(options) == 1
    ],
)
def test_impossible_configs(config: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        config(**options)
    assert message in str(caught.value)


def test_every_preset_has_its_size() -> None:
    registry, found = Registry.load(), {}
    for family in FAMILIES:
        for name in family.presets:
            with torch.device("meta"):
                model = registry.build("backbone", name)
            assert all(parameter.is_meta for parameter in model.parameters())
            found[name] = sum(parameter.numel() for parameter in model.parameters())
    assert found == SIZES


@EACH_FAMILY
def test_presets_only_change_defaults(family: Family) -> None:
    base = attrs.fields_dict(family.config)
    for config in family.presets.values():
        fields = attrs.fields_dict(config)
        assert list(fields) == list(base)
        for name, field in fields.items():
            assert (field.metadata, field.validator) == (base[name].metadata, base[name].validator)


def test_presets_are_configs_like_any() -> None:
    assert VitSmallConfig(depth=3) == VitSmallConfig(depth=3) != VitSmallConfig()
    assert VitSmallConfig().pos_embed_rope_rescale_coords == 2.0
    assert (Vit7bConfig().untie_global_and_local_cls_norm, Vit7bConfig().qkv_bias) == (True, False)
    tiny = ConvNextTinyConfig()
    assert (tiny.depths, tiny.dims) == (ConvNextConfig().depths, ConvNextConfig().dims)
    with pytest.raises(TypeError, match="no such field: dept"):
        preset(dept=3)(type("Misspelled", (VitConfig,), {}))


@EACH_FAMILY
def test_every_field_is_documented(family: Family) -> None:
    assert not [field.name for field in attrs.fields(family.config) if not field.metadata["doc"]]


@EACH_FAMILY
def test_no_layer_scale(family: Family) -> None:
    assert any("gamma" in name for name in family.build().state_dict())
    for none in (None, 0.0):
        state = family.build(**{family.scale: none}).state_dict()
        assert not any("gamma" in name for name in state)


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from dinov3_convnext import plugin as a; from dinov3_vit import plugin as b;"
        "counts = len(a.dinov3_backbones()), len(b.dinov3_backbones());"
        "assert counts == (5, 11), counts; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_networks_need_no_plugin_machinery() -> None:
    """So that they can be used where torch, numpy and attrs are all there is."""
    code = (
        "import sys, dinov3_convnext.network, dinov3_vit.transformer;"
        "heavy = {'pluggy', 'cattrs', 'torchvision', 'safetensors', 'rich'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
