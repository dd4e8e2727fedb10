"""The backbone and the loss keep the framework's contracts."""

from __future__ import annotations

import pytest
import torch
from dinov3_example_plugin import ConvMixerConfig, VicRegConfig

from dinov3_framework import ImagesConfig, Registry, UserError
from dinov3_framework.testing import BackboneSuite, LossSuite


def test_the_installed_plugin_is_found() -> None:
    registry = Registry.load()
    assert registry.get("backbone", "conv_mixer").distribution == "dinov3-example-plugin"
    assert registry.get("loss", "vicreg").distribution == "dinov3-example-plugin"


class TestConvMixer(BackboneSuite):
    config = ConvMixerConfig(patch_size=4, embed_dim=16, depth=2)


class TestConvMixerOfGrayImages(BackboneSuite):
    config = ConvMixerConfig(patch_size=4, embed_dim=16, depth=2, in_chans=1)


class TestVicReg(LossSuite):
    config = VicRegConfig(hidden_dim=12, output_dim=10, n_layers=3)


class TestVicRegOfOneLayer(LossSuite):
    config = VicRegConfig(hidden_dim=12, output_dim=10, n_layers=1)


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
