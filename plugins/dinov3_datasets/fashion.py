"""The embedded Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747)."""

from __future__ import annotations

from functools import cache
from importlib import resources
from types import MappingProxyType

import numpy as np
import torch

from dinov3_datasets.configs import FashionMnistConfig
from dinov3_framework import DataError, Dataset, Sample, Target

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@cache
def _arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 28, 28] and labels uint8 [n]; decompressed once per process."""
    path = resources.files("dinov3_datasets") / "fashion_mnist" / f"{split}.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


class FashionMnist(Dataset):
    """5,000 training or 1,000 test images, uint8 [channels, 28, 28], in 10 balanced classes."""

    targets = MappingProxyType({"label": Target("class", classes=CLASSES)})

    def __init__(self, config: FashionMnistConfig, *, channels: int) -> None:
        if channels not in (1, 3):
            raise DataError(
                f"fashion_mnist gives images of 1 or 3 channels, images.channels is {channels}"
            )
        self.split, self.channels = config.split, channels

    def __len__(self) -> int:
        return len(_arrays(self.split)[0])

    def __getitem__(self, index: int) -> Sample:
        images, labels = _arrays(self.split)
        # repeat copies, so that nobody can write into the shared array
        image = torch.from_numpy(images[index]).repeat(self.channels, 1, 1)
        return Sample(image, {"label": int(labels[index])})

    def label(self, index: int) -> int:
        return int(_arrays(self.split)[1][index])

    def version(self) -> str:
        return f"{self.split} split"

    def describe(self) -> str:
        return (
            f"fashion_mnist, {self.split} split: {len(self):,} images of 28 x 28 in "
            f"{self.n_classes} classes"
        )
