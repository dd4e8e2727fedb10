"""ConvNeXt's config: what it refuses, and the published sizes."""

from __future__ import annotations

import subprocess
import sys

import attrs
import pytest
import torch
from dinov3_convnext.configs import PRESETS, ConvNextConfig, ConvNextTinyConfig
from dinov3_convnext.network import ConvNeXt

from dinov3_framework import InvalidOption, Registry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (3, 3, 9)}, r"depths: must be 4 numbers, one for each stage, is \[3, 3, 9\]"),
        ({"depths": (3, 3, 0, 3)}, r"depths: must all be above 0, is \[3, 3, 0, 3\]"),
        ({"dims": (8,) * 5}, "dims: must be 4 numbers"),
        ({"dims": (8, 8, 8, -8)}, "dims: must all be above 0"),
        ({"patch_size": 0}, "patch_size: must be above 0"),
        ({"in_chans": 0}, "in_chans: must be above 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: must be at least 0 and below 1"),
        ({"layer_scale_init_value": -1.0}, "layer_scale_init_value: must not be negative"),
    ],
)
@pytest.mark.parametrize("config", [ConvNextConfig, ConvNextTinyConfig])
def test_impossible_configs(
    config: type[ConvNextConfig], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidOption, match=message):
        config(**options)


# Published as 29M, 50M, 89M and 198M: with ImageNet's classifier, of 0.8M to 1.5M.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("convnext_tiny", 27_820_128),
        ("convnext_small", 49_454_688),
        ("convnext_base", 87_566_464),
        ("convnext_large", 196_230_336),
    ],
)
def test_preset_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Registry.load().build("backbone", name)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_presets_only_change_defaults() -> None:
    base = attrs.fields_dict(ConvNextConfig)
    for config in PRESETS.values():
        fields = attrs.fields_dict(config)
        assert list(fields) == list(base)
        for name, field in fields.items():
            assert (field.metadata, field.validator) == (base[name].metadata, base[name].validator)
            assert field.default == base[name].default or name in ("depths", "dims")
    tiny = ConvNextTinyConfig()
    assert (tiny.depths, tiny.dims) == (ConvNextConfig().depths, ConvNextConfig().dims)


def test_no_layer_scale() -> None:
    small = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}
    for none in (None, 0.0):
        state = ConvNeXt(ConvNextConfig(**small, layer_scale_init_value=none)).state_dict()
        assert not any("gamma" in name for name in state)


def test_drop_path_rises_to_the_last_block() -> None:
    config = ConvNextConfig(depths=(1, 1, 2, 1), dims=(4, 4, 4, 4), drop_path_rate=0.4)
    rates = [block.drop_path_rate for block in ConvNeXt(config).blocks_to_shard()]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from dinov3_convnext import plugin; found = plugin.dinov3_backbones();"
        "assert len(found) == 5, found; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_network_needs_no_plugin_machinery() -> None:
    """So that it can be used where torch, numpy and attrs are all there is."""
    code = (
        "import sys, dinov3_convnext.network;"
        "heavy = {'pluggy', 'cattrs', 'torchvision', 'safetensors', 'rich'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
