"""The Vision Transformer's config: what it refuses, and the published sizes."""

from __future__ import annotations

import subprocess
import sys

import attrs
import pytest
import torch
from dinov3_vit.configs import PRESETS, Vit7bConfig, VitConfig, VitSmallConfig
from dinov3_vit.transformer import VisionTransformer

from dinov3_framework import InvalidOption, preset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 100, "num_heads": 3}, "embed_dim: 100 is not a multiple of num_heads = 3"),
        ({"embed_dim": 60, "num_heads": 10}, "is 6 a head; RoPE needs a multiple of 4"),
        ({"depth": 0}, "depth: must be above 0"),
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
)
def test_impossible_configs(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        VitConfig(**options)
    assert message in str(caught.value)


# Published: 21M, 29M, 86M, 300M, 840M and 6,716M; the others follow from their shapes.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_small", 21_601_152),
        ("vit_small_plus", 28_697_472),
        ("vit_base", 85_669_632),
        ("vit_large", 303_154_176),
        ("vit_large_plus", 403_915_776),
        ("vit_so400m", 415_411_200),
        ("vit_huge_plus", 840_633_600),
        ("vit_huge", 630_754_560),
        ("vit_giant", 1_134_577_152),
        ("vit_7b", 6_716_043_264),
    ],
)
def test_preset_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = VisionTransformer(PRESETS[name]())
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_presets_only_change_defaults() -> None:
    base = attrs.fields_dict(VitConfig)
    for config in PRESETS.values():
        fields = attrs.fields_dict(config)
        assert list(fields) == list(base)
        for name, field in fields.items():
            assert (field.metadata, field.validator) == (base[name].metadata, base[name].validator)
    assert VitSmallConfig().pos_embed_rope_rescale_coords == 2.0
    assert VitSmallConfig(depth=3) == VitSmallConfig(depth=3) != VitSmallConfig()
    assert Vit7bConfig().untie_global_and_local_cls_norm
    assert not Vit7bConfig().qkv_bias


def test_a_preset_checks_its_values_too() -> None:
    with pytest.raises(InvalidOption, match="depth: must be above 0"):
        VitSmallConfig(depth=0)
    with pytest.raises(TypeError, match="no such field: dept"):
        preset(dept=3)(type("Misspelled", (VitConfig,), {}))


def test_every_field_is_documented() -> None:
    for field in attrs.fields(VitConfig):
        assert field.metadata["doc"], field.name


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys, dinov3_vit.plugin as p; found = p.dinov3_backbones();"
        "assert len(found) == 11, found; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
