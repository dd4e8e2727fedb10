"""Scenes with a subject that is known, and a backbone that says what is in a patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dinov3_figures.configs import VisualizeConfig
from dinov3_figures.task import Visualize
from torch import Tensor, nn

from dinov3_framework import (
    Backbone,
    BackboneConfig,
    Component,
    CorruptSampleError,
    DataError,
    Dataset,
    DatasetConfig,
    ImagesConfig,
    Registry,
    Sample,
    UserError,
    config,
    option,
)

PATCH = 4
SIZES = ((32, 48), (40, 32), (32, 32), (24, 64))  # height and width of the scenes
SQUARE = slice(8, 20)  # rows and columns of every scene's subject


@config
class PixelsConfig(BackboneConfig):
    """The pixels of each patch, shifted, as its features; two layers."""


class Pixels(Backbone):
    """Layer 0 gives the pixels of each patch, layer 1 the pixels with a constant beside them."""

    patch_size, n_layers = PATCH, 2

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.in_chans = config.in_chans or 3
        self.embed_dim = self.in_chans * PATCH**2 + 1
        self.shift = nn.Parameter(torch.empty(()))

    def init_weights(self) -> None:
        nn.init.ones_(self.shift)

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        raise UserError("the intermediate layers alone are asked for")

    def get_intermediate_layers(
        self, images: Tensor, *, n: int | Sequence[int] = 1, reshape: bool = False, **_: Any
    ) -> tuple[Tensor, ...]:
        height, width = (side // PATCH for side in images.shape[-2:])
        pixels = nn.functional.unfold(images, PATCH, stride=PATCH) + self.shift
        layers = pixels, torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
        wanted = [n] if isinstance(n, int) else n
        return tuple(layers[index].unflatten(2, (height, width)) for index in wanted)


@config
class LastOnlyConfig(BackboneConfig):
    """A backbone that knows of no layers but its last."""


class LastOnly(Backbone):
    """Means of the patches; what a backbone must offer and no more."""

    embed_dim, patch_size, n_layers = 3, PATCH, 3

    def __init__(self, config: LastOnlyConfig) -> None:
        super().__init__()
        self.in_chans = config.in_chans or 3

    def init_weights(self) -> None:
        """There are no parameters."""

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        means = nn.functional.avg_pool2d(images, PATCH)
        return {"x_norm_patchtokens": means.flatten(2).transpose(1, 2)}


@config
class ScenesConfig(DatasetConfig):
    """Textured squares on a dark ground."""

    count: int = option("scenes", default=4)
    corrupt: tuple[int, ...] = option("those that cannot be decoded", default=())
    there: bool = option("whether this machine has them", default=True)
    bright: bool = option("whether the square is brighter than the ground", default=True)


class Scenes(Dataset):
    """Scene i has the i-th of ``SIZES`` and the name ``dir <i>/scene&<i>.png``."""

    classes = ("tops", "shoes")

    def __init__(self, config: ScenesConfig, *, channels: int) -> None:
        if not config.there:
            raise DataError("scenes: not on this machine")
        self.config, self.channels = config, channels

    def __len__(self) -> int:
        return self.config.count

    def name(self, index: int) -> str:
        return f"dir {index}/scene&{index}.png"

    def describe(self) -> str:
        return f"scenes, {len(self)} images"

    def __getitem__(self, index: int) -> Sample:
        if index in self.config.corrupt:
            raise CorruptSampleError(self.name(index), "half a file")
        height, width = SIZES[index % len(SIZES)]
        generator = torch.Generator().manual_seed(index)
        shape = (self.channels, height, width)
        image = torch.randint(0, 20, shape, generator=generator, dtype=torch.uint8)
        image[:, SQUARE, SQUARE] += 180
        return Sample(image if self.config.bright else 255 - image, {"label": index % 2})


def registry() -> Registry:
    made = Registry()
    for kind, name, given, factory in (
        ("backbone", "pixels", PixelsConfig, Pixels),
        ("backbone", "last_only", LastOnlyConfig, LastOnly),
        ("dataset", "scenes", ScenesConfig, Scenes),
        ("task", "visualize", VisualizeConfig, Visualize),
    ):
        made.add(kind, Component(name, given, factory), "tests", "tests")
    return made


def spec(channels: int) -> ImagesConfig:
    return ImagesConfig(channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)


def settings(**options: Any) -> VisualizeConfig:
    given = {"backbone": PixelsConfig(), "dataset": ScenesConfig(), "images": spec(3)}
    return VisualizeConfig(**{**given, **options})


def task(**options: Any) -> Visualize:
    return Visualize(settings(**options), registry=registry())


def subject_mask(height: int, width: int) -> Tensor:
    """Which patches [h, w] of a scene of that size, seen as it is, show its square."""
    mask = torch.zeros(height // PATCH, width // PATCH, dtype=torch.bool)
    mask[SQUARE.start // PATCH : SQUARE.stop // PATCH, 2:5] = True
    return mask
