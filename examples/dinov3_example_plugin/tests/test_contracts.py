"""The backbone and the loss keep the framework's contracts."""

from __future__ import annotations

import pytest
import torch
from dinov3_example_plugin import ConvMixerConfig, VicRegConfig

from dinov3_framework import ImagesConfig, Registry, UserError
from dinov3_framework.testing import check_backbone, check_loss


def test_the_installed_plugin_is_found() -> None:
    registry = Registry.load()
    assert registry.get("backbone", "conv_mixer").distribution == "dinov3-example-plugin"
    assert registry.get("loss", "vicreg").distribution == "dinov3-example-plugin"


@pytest.mark.parametrize("channels", [None, 1])
def test_conv_mixer_keeps_the_contract(channels: int | None) -> None:
    check_backbone(ConvMixerConfig(patch_size=4, embed_dim=16, depth=2, in_chans=channels))


@pytest.mark.parametrize("n_layers", [1, 3])
def test_vicreg_keeps_the_contract(n_layers: int) -> None:
    check_loss(VicRegConfig(hidden_dim=12, output_dim=10, n_layers=n_layers))


@pytest.mark.parametrize("field", ["kernel_size", "depth", "patch_size"])
def test_wrong_options_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ConvMixerConfig(**{field: 0})


def test_images_that_do_not_fit_are_refused() -> None:
    backbone = Registry.load().build("backbone", "conv_mixer", patch_size=4, embed_dim=8, depth=1)
    channels = ImagesConfig().channels
    with pytest.raises(UserError, match="no multiple of patch_size = 4"):
        backbone(torch.zeros(1, channels, 8, 10))
    with pytest.raises(UserError, match=r"takes images \[batch, 3, height, width\]"):
        backbone(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match=r"masks are \[1, 3\]"):
        backbone.forward_features(
            torch.zeros(1, channels, 8, 8), torch.zeros(1, 3, dtype=torch.bool)
        )
