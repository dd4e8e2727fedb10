"""Linear heads, data with labels and masks, and what measures them; for tests."""

from __future__ import annotations

from dinov3_framework import (
    BackboneConfig,
    Component,
    DatasetConfig,
    EvaluationConfig,
    HeadConfig,
    TransformConfig,
    config,
    hookimpl,
    option,
)


@config
class LinearClassifierConfig(HeadConfig):
    """A linear layer on class tokens and mean patches."""

    target: str = option("target that is learned", default="label")
    layers: tuple[int, ...] = option("layers of the backbone", default=(-1,))


@config
class LinearSegmentationConfig(HeadConfig):
    """A 1 x 1 convolution on patches."""

    target: str = option("target that is learned", default="mask")
    layers: tuple[int, ...] = option("layers of the backbone", default=(-1,))


@config
class SquaresConfig(DatasetConfig):
    """Noise with a bright square in one of the quarters, which is the label; and its mask."""

    count: int = option("images", default=32)
    size: int = option("side in pixels", default=28)
    seed: int = option("seed of all", default=0)
    stream: bool = option("whether it has no index", default=False)
    ragged: bool = option("whether sizes differ", default=False)
    classes: int = option("classes of the mask", default=2)
    there: bool = option("whether this machine has it", default=True)
    versioned: bool = option("whether they can be told from others", default=False)
    corrupt: tuple[int, ...] = option("images that cannot be decoded", default=())


@config
class ShapesConfig(DatasetConfig):
    """Drawn shapes and a mask of their classes."""

    count: int = option("images", default=10)
    size: int = option("side in pixels", default=64)
    seed: int = option("seed of all", default=0)


@config
class HeadScoreConfig(EvaluationConfig):
    """Share of right labels or pixels, in percent, as ``accuracy``."""

    dataset: DatasetConfig = option("what is measured on")
    transform: TransformConfig = option("what becomes of it")
    target: str = option("target that is compared", default="label")
    batch_size: int = option("images at a time", default=8)
    workers: int = option("loader workers", default=0)


@config
class LastLayerConfig(BackboneConfig):
    """A backbone of two layers that gives the last one alone, in patches of 4 pixels."""


@hookimpl
def dinov3_backbones() -> list[Component]:
    return [Component("last_layer", LastLayerConfig, "dinov3_toy_heads.data:build_last_layer")]


@hookimpl
def dinov3_heads() -> list[Component]:
    return [
        Component(
            "toy_classifier", LinearClassifierConfig, "dinov3_toy_heads.heads:LinearClassifier"
        ),
        Component(
            "toy_segmentation",
            LinearSegmentationConfig,
            "dinov3_toy_heads.heads:LinearSegmentation",
        ),
    ]


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [
        Component("squares", SquaresConfig, "dinov3_toy_heads.data:build_squares"),
        Component("shapes", ShapesConfig, "dinov3_toy_heads.shapes:build_shapes"),
    ]


@hookimpl
def dinov3_evaluations() -> list[Component]:
    return [Component("head_score", HeadScoreConfig, "dinov3_toy_heads.data:HeadScore")]
