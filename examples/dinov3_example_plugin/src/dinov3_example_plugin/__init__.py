"""A component of every kind, from outside the framework. Configs and hooks only: no torch here."""

from __future__ import annotations

from dinov3_framework import (
    AugmentationConfig,
    BackboneConfig,
    Component,
    DatasetConfig,
    EvaluationConfig,
    HeadConfig,
    LauncherConfig,
    LossConfig,
    ObserverConfig,
    OptimizerConfig,
    TransformConfig,
    config,
    fraction,
    hookimpl,
    not_negative,
    option,
    positive,
)
from dinov3_framework.training import TrainingConfig


def _odd(value: int) -> str | None:
    return None if value > 0 and value % 2 else f"must be odd and above 0, is {value}"


# --------------------------------------------------------------------------- networks and losses
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


@config
class LinearClassConfig(HeadConfig):
    """A linear classifier of the last layer's class token."""

    target: str = option("name of the class that is predicted", default="label")


@config
class LinearMaskConfig(HeadConfig):
    """A linear classifier of each patch, enlarged to a mask."""

    target: str = option("name of the mask that is predicted", default="mask")
    layer: int = option("index of the backbone's layer, from -1 backwards", default=-1)


# --------------------------------------------------------------------------- data
@config
class ImagesAndMasksConfig(DatasetConfig):
    """A folder of images and one of masks, PNG files of class ids with the images' names.

    A sample's ``label`` is the commonest class of its mask besides class 0.
    """

    images: str = option("folder of the images")
    masks: str = option("folder of the masks")
    classes: tuple[str, ...] = option("names of the classes, by id")
    ignore_index: int = option("id of pixels that count for nothing", default=255)


@config
class TarStreamConfig(DatasetConfig):
    """Images from tar archives, read from end to end again and again, without labels."""

    archives: tuple[str, ...] = option("paths of tar files; each part of the stream has some")


@config
class SquareConfig(TransformConfig):
    """Images resized to a square and normalized; masks to the nearest value."""

    size: int = option("pixels along the side", default=28, check=positive)
    flip: float = option("probability of a mirror image", default=0.0, check=fraction)


@config
class TwoCropsConfig(AugmentationConfig):
    """Two random crops of each image, and no masks."""

    size: int = option("pixels along the side of a crop", default=28, check=positive)
    smallest: float = option("smallest share of the image's area", default=0.3, check=fraction)


# --------------------------------------------------------------------------- measuring and running
@config
class AgreementConfig(EvaluationConfig):
    """How often a head is right: accuracy of a class, mean IoU of a mask, in percent."""

    dataset: DatasetConfig = option("what is predicted")
    transform: TransformConfig = option("what becomes of images and targets on their way")
    target: str = option("name of the class or mask", default="label")
    batch_size: int = option("images at a time", default=64, check=positive)


@config
class RmsPropConfig(OptimizerConfig):
    """RMSprop."""

    smoothing: float = option("share of old squared gradients", default=0.99, check=fraction)


@config
class BackgroundConfig(LauncherConfig):
    """One process in the background, with its output in a file; the caller does not wait."""

    suffix: str = option("what the file's name has after that of the run's folder", default=".log")


@config
class JournalConfig(ObserverConfig):
    """Writes what happens in a run to ``journal.txt``, a line each."""


@config
class ContrastiveConfig(TrainingConfig):
    """SimCLR: tells two views of an image from those of other images."""

    backbone: BackboneConfig = option("the network that is trained")
    output_dim: int = option("width of the embeddings", default=128, check=positive)
    temperature: float = option("temperature of the similarities", default=0.2, check=positive)
    size: int = option("pixels along the side of a view", default=28, check=positive)
    smallest: float = option("smallest share of the image's area", default=0.3, check=fraction)


# --------------------------------------------------------------------------- hooks
def _component(name: str, config: type, where: str) -> list[Component]:
    return [Component(name, config, f"dinov3_example_plugin.{where}")]


@hookimpl
def dinov3_backbones() -> list[Component]:
    return _component("conv_mixer", ConvMixerConfig, "conv_mixer:ConvMixer")


@hookimpl
def dinov3_losses() -> list[Component]:
    return _component("vicreg", VicRegConfig, "vicreg:VicReg")


@hookimpl
def dinov3_heads() -> list[Component]:
    return [
        *_component("linear_class", LinearClassConfig, "heads:LinearClass"),
        *_component("linear_mask", LinearMaskConfig, "heads:LinearMask"),
    ]


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [
        *_component("images_and_masks", ImagesAndMasksConfig, "data:ImagesAndMasks"),
        *_component("tar_stream", TarStreamConfig, "data:TarStream"),
    ]


@hookimpl
def dinov3_transforms() -> list[Component]:
    return _component("square", SquareConfig, "data:Square")


@hookimpl
def dinov3_augmentations() -> list[Component]:
    return _component("two_crops", TwoCropsConfig, "data:TwoCrops")


@hookimpl
def dinov3_evaluations() -> list[Component]:
    return _component("agreement", AgreementConfig, "agreement:Agreement")


@hookimpl
def dinov3_optimizers() -> list[Component]:
    return _component("rmsprop", RmsPropConfig, "running:RmsProp")


@hookimpl
def dinov3_launchers() -> list[Component]:
    return _component("background", BackgroundConfig, "running:Background")


@hookimpl
def dinov3_observers() -> list[Component]:
    return _component("journal", JournalConfig, "running:Journal")


@hookimpl
def dinov3_tasks() -> list[Component]:
    return _component("contrastive", ContrastiveConfig, "contrastive:Contrastive.task")
