"""A training run as the observer sees it, without any training; and pictures read back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3_framework import Backbone, CorruptSampleError, Dataset, ImagesConfig, Sample
from dinov3_framework.contracts.running import Model


class BlockMeans(Backbone):
    """Patch tokens are the pixels' means within each patch; any image size."""

    def __init__(self, in_chans: int, patch_size: int) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.in_chans = in_chans, patch_size, in_chans
        self.scale = nn.Parameter(torch.ones(()))
        self.sizes: list[int] = []

    def init_weights(self) -> None:
        nn.init.ones_(self.scale)

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        self.sizes.append(images.shape[-1])
        means = nn.functional.avg_pool2d(images, self.patch_size) * self.scale
        return {"x_norm_patchtokens": means.flatten(2).transpose(1, 2)}


class Gradients(Dataset):
    """Ten images, each brighter than the one before; the first cannot be decoded."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Sample:
        if index == 0:
            raise CorruptSampleError("0.png", "half a file")
        return Sample(torch.full((self.channels, 28, 28), index, dtype=torch.uint8))


@attrs.define
class FakeRun:
    """Implements ``contracts.Run`` with random crops and :class:`BlockMeans` for a teacher."""

    output_dir: Path
    images: ImagesConfig = attrs.field(factory=ImagesConfig)
    total_iterations: int = 100
    is_main: bool = True
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    patch_size: int = 7
    teacher: BlockMeans = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.teacher = BlockMeans(self.images.channels, self.patch_size)

    def build(self, config: Any, **runtime: Any) -> Any:
        return Gradients(**runtime)

    @property
    def config(self) -> Any:
        raise AssertionError("the plots need not know the recipe")

    def model(self) -> Model:
        return Model(self.teacher, self.images)

    def initial_model(self) -> Model:
        return self.model()

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        return make_batch(count, self.images.channels)


def make_batch(count: int, channels: int) -> dict[str, Tensor]:
    """Two global crops of 28 px with 4 x 4 masks and six local ones of 14 px, uint8."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    masks = torch.from_numpy(rng.random((2, count, 16)) < 0.4)
    return {
        "global": draw(2, count, channels, 28, 28),
        "local": draw(6, count, channels, 14, 14),
        "masks": masks,
    }


def read_png(path: Path) -> np.ndarray:
    """A whole PNG file as uint8 [H, W, 3]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@attrs.frozen(eq=False)
class Drawn:
    """A picture on a figure, as it was drawn."""

    left: int
    top: int
    pixels: np.ndarray  # uint8 [H, W, 3]


def drawn_on(figure: Any) -> list[list[Drawn]]:
    """All pictures of a figure: rows from the top, each from the left."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    whole = np.asarray(Image.open(buffer).convert("RGB"))
    rows: dict[int, list[Drawn]] = {}
    for axes in figure.axes:
        for image in axes.images:
            box = image.get_window_extent()
            left, top = round(box.x0), round(len(whole) - box.y1)
            pixels = whole[top : top + round(box.height), left : left + round(box.width)]
            rows.setdefault(top, []).append(Drawn(left, top, pixels))
    return [sorted(rows[top], key=lambda tile: tile.left) for top in sorted(rows)]


def texts_on(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]
