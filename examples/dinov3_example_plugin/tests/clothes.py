"""Real pictures with masks: Fashion-MNIST, where what is not black is of the picture's class."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dinov3_framework import Registry

CLASSES = ("nothing", "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
           "sneaker", "bag", "boot")  # fmt: skip


def write_clothes(folder: Path, count: int = 60) -> None:
    """``images/000.png`` and so on, ``masks`` of the same names, and two archives of the images."""
    registry = Registry.load()
    dataset = registry.build(registry.config_of("dataset", "fashion_mnist", {}), channels=1)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        sample = dataset[index]
        pixels = sample.image[0].numpy()
        ids = np.where(pixels > 0, sample.label + 1, 0).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:03}.png")
        Image.fromarray(ids).save(folder / "masks" / f"{index:03}.png")
    images = sorted((folder / "images").iterdir())
    for name, part in (("a.tar", images[: count // 2]), ("b.tar", images[count // 2 :])):
        with tarfile.open(folder / name, "w") as archive:
            for image in part:
                archive.add(image, arcname=image.name)


if __name__ == "__main__":
    write_clothes(Path(sys.argv[1]))
