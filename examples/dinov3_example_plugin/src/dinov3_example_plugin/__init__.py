"""A backbone and a loss from outside the framework. Configs and hooks only: no torch here."""

from __future__ import annotations

from dinov3_framework import (
    BackboneConfig,
    Component,
    LossConfig,
    config,
    hookimpl,
    not_negative,
    option,
    positive,
)


def _odd(value: int) -> str | None:
    return None if value > 0 and value % 2 else f"must be odd and above 0, is {value}"


@config
class ConvMixerConfig(BackboneConfig):
    """ConvMixer: patches, then blocks that mix places and channels by turns."""

    patch_size: int = option("pixels along the side of a patch", default=7, check=positive)
    embed_dim: int = option("width of a token", default=256, check=positive)
    depth: int = option("number of blocks", default=8, check=positive)
    kernel_size: int = option(
        "patches along the side of the depthwise convolution", default=5, check=_odd
    )


@config
class VicRegConfig(LossConfig):
    """VICReg between the class tokens of the student's two global crops."""

    hidden_dim: int = option("hidden width of the expander", default=1024, check=positive)
    output_dim: int = option("width of the embeddings", default=1024, check=positive)
    n_layers: int = option("linear layers of the expander", default=3, check=positive)
    invariance: float = option(
        "factor of the distance between the crops' embeddings", default=25.0, check=not_negative
    )
    variance: float = option(
        "factor of what each channel's deviation lacks to 1", default=25.0, check=not_negative
    )
    covariance: float = option(
        "factor of the channels' squared covariances", default=1.0, check=not_negative
    )


@hookimpl
def dinov3_backbones() -> list[Component]:
    return [Component("conv_mixer", ConvMixerConfig, "dinov3_example_plugin.conv_mixer:ConvMixer")]


@hookimpl
def dinov3_losses() -> list[Component]:
    return [Component("vicreg", VicRegConfig, "dinov3_example_plugin.vicreg:VicReg")]
