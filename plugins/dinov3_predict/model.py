"""A head and the backbone under it, from what says where the head is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from attrs import frozen

from dinov3_framework import (
    CheckpointError,
    ImagesConfig,
    LoadedBackbone,
    Model,
    Problem,
    RecipeError,
    Registry,
    describe_backbone,
    load_backbone,
)
from dinov3_framework.contracts.layouts import Published, PublishedFile
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.weights.heads import (
    TRAINED_ON,
    LoadedHead,
    describe_head,
    load_head,
    warn_of_another_backbone,
)
from dinov3_framework.weights.locations import TUNED
from dinov3_framework.weights.source import WeightSource
from dinov3_predict import PredictConfig


@frozen
class LoadedModel:
    """A head on its backbone."""

    backbone: LoadedBackbone
    head: LoadedHead
    images: ImagesConfig

    @property
    def model(self) -> Model:
        size = self.head.size or self.backbone.size
        return Model(self.backbone.backbone, self.images, self.head.head, size, self.head.name)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What to tell a person, (label, value)."""
        return [("backbone", self.backbone.name), *self.head.rows]


def describe(config: PredictConfig, registry: Registry) -> LoadedModel:
    """Both on the meta device.

    Raises ``CheckpointError`` where they cannot be read or do not fit, ``RecipeError`` where
    nothing says which backbone it is.
    """
    source = _backbone(config, registry)
    with _naming_the_key(config):
        backbone = describe_backbone(source, registry=registry)
    head = describe_head(config.weights, backbone.backbone, registry=registry)
    return LoadedModel(backbone, head, _images(config, backbone, head, registry))


def load(config: PredictConfig, registry: Registry) -> LoadedModel:
    """Both with their values, on this process's device; errors as of :func:`describe`."""
    device, source = pick_device("auto"), _backbone(config, registry)
    with _naming_the_key(config):
        backbone = load_backbone(source, device=device, registry=registry)
    head = load_head(config.weights, backbone.backbone, device=device, registry=registry)
    warn_of_another_backbone(head, backbone)
    return LoadedModel(backbone, head, _images(config, backbone, head, registry))


def _images(
    config: PredictConfig, backbone: LoadedBackbone, head: LoadedHead, registry: Registry
) -> ImagesConfig:
    """What the model sees: a published head may want other means than its backbone was given."""
    return backbone.images if _published(config.weights, registry) is None else head.images


@contextmanager
def _naming_the_key(config: PredictConfig) -> Iterator[None]:
    """Say of weights that nobody gave, and that cannot be had, how to give them."""
    try:
        yield
    except CheckpointError as error:
        if config.backbone is not None:
            raise
        message = f"{error}\n    or give the backbone under {config.weights} as backbone=PATH"
        raise CheckpointError(message) from error


def _backbone(config: PredictConfig, registry: Registry) -> str:
    """Where the weights of the backbone are."""
    if config.backbone is not None:
        return config.backbone
    path = Path(config.weights).expanduser()
    if (path / TUNED).is_file():
        return config.weights
    if (published := _published(config.weights, registry)) is not None:
        return published
    with WeightSource.open(config.weights, registry, kind="head") as weights:
        if path.is_dir() and weights.layout is not None and (path / "config.json").is_file():
            return config.weights  # of Hugging Face, with both in it
        name = dict(weights.provenance).get(TRAINED_ON)
    if name is None:
        what = "does not say which backbone it was trained on"
    elif name.partition("@")[0] in registry.published or Path(name).expanduser().exists():
        return name
    else:
        what = f"was trained on {name}, which is not here"
    message = f"the head {config.weights} {what}"
    raise RecipeError([Problem("backbone", message, "give that backbone's weights as backbone")])


def _published(source: str, registry: Registry) -> str | None:
    """The published backbone under a published head, given by its name or by its file."""
    name, last = source.partition("@")[0], PurePosixPath(source.partition("?")[0]).name
    for head in registry.published.values():
        files = [file for file in head.files.values() if file.file == last]
        if head.kind == "head" and (head.name == name or files):
            file = files[0] if files else head.default
            return _backbone_below(head, file.images, registry)
    return None


def _backbone_below(head: Published, images: ImagesConfig, registry: Registry) -> str | None:
    """That whose name the head's begins with, with the weights of the most similar images."""

    def difference(file: PublishedFile) -> float:
        pairs = zip(file.images.mean, images.mean, strict=False)
        return sum(abs(one - other) for one, other in pairs)

    known = [each for each in registry.published.values() if each.kind == "backbone"]
    for backbone in sorted(known, key=lambda each: -len(each.name)):
        if head.name.startswith(f"{backbone.name}_"):
            files = backbone.files
            return f"{backbone.name}@{min(files, key=lambda name: difference(files[name]))}"
    return None
