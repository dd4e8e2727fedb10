"""Data of every sort: by index, as a stream, transformed with their targets, as crops."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_dtype

from dinov3_example_plugin import (
    ImagesAndMasksConfig,
    SquareConfig,
    TarStreamConfig,
    TwoCropsConfig,
)
from dinov3_framework import (
    Augmentation,
    CorruptSampleError,
    DataError,
    Dataset,
    ImagesConfig,
    Sample,
    StreamDataset,
    Target,
    Transform,
    View,
)

_MODES = {1: "L", 3: "RGB"}


def _picture(file: Any, name: str, mode: str) -> Tensor:
    """The picture in a file, uint8 [C, H, W]."""
    try:
        with Image.open(file) as opened:
            pixels = np.array(opened if mode == "id" else opened.convert(mode))
    except OSError as error:
        raise CorruptSampleError(name, str(error)) from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).movedim(-1, 0).contiguous()


class ImagesAndMasks(Dataset):
    """Images with a mask, and a label that follows from the mask."""

    def __init__(self, config: ImagesAndMasksConfig, *, channels: int) -> None:
        self.config, self.mode = config, _mode(channels)
        self.files = sorted(path for path in Path(config.images).glob("*.*") if path.is_file())
        if not self.files:
            raise DataError(f"images_and_masks: there are no images in {config.images!r}")
        for path in map(self._mask, self.files):
            if not path.is_file():
                raise DataError(f"images_and_masks: an image has no mask: {path} does not exist")
        self.targets = {
            "label": Target("class", classes=config.classes),
            "mask": Target("mask", classes=config.classes, ignore_index=config.ignore_index),
        }

    def _mask(self, image: Path) -> Path:
        return Path(self.config.masks) / f"{image.stem}.png"

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index].name

    def __getitem__(self, index: int) -> Sample:
        path = self.files[range(len(self))[index]]
        mask = _picture(self._mask(path), path.name, "id")[0]
        counts = torch.bincount(mask.flatten(), minlength=256)
        counts[0] = counts[self.config.ignore_index] = 0
        if counts[len(self.config.classes) :].any():
            wrong = int(counts[len(self.config.classes) :].nonzero()[0]) + len(self.config.classes)
            raise DataError(f"the mask of {path.name} has class {wrong}, which has no name")
        return Sample(
            _picture(path, path.name, self.mode),
            {"label": int(counts.argmax()), "mask": tv_tensors.Mask(mask)},
        )


class TarStream(StreamDataset):
    """The images in tar archives, one after the other.

    A part of the stream has every so many-th image of all archives. Order is that of the archives,
    again and again; a resumed run goes on after the last image it was given.
    """

    def __init__(self, config: TarStreamConfig, *, channels: int) -> None:
        self.config, self.mode = config, _mode(channels)
        for archive in config.archives:
            if not Path(archive).is_file():
                raise DataError(f"tar_stream: there is no archive {archive!r}")

    def open(
        self, *, part: int, parts: int, seed: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        done = -1 if state is None else int(state)
        while True:
            number = -1
            for number, (name, content) in enumerate(self._members()):
                if number % parts == part and number > done:
                    yield self._sample(name, content), number
            if number < part:
                raise DataError(f"tar_stream: {number + 1} images for {parts} parts")
            done = -1  # from the first image again

    def _members(self) -> Iterator[tuple[str, Any]]:
        for archive in self.config.archives:
            with tarfile.open(archive) as opened:
                for member in opened:
                    if member.isfile():
                        yield f"{archive}:{member.name}", opened.extractfile(member)

    def _sample(self, name: str, content: Any) -> Sample | CorruptSampleError:
        try:
            return Sample(_picture(content, name, self.mode))
        except CorruptSampleError as error:
            return error

    def describe(self) -> str:
        count = len(self.config.archives)
        return f"tar_stream: {count} archives in their order; a resumed run goes on where it was"


def _mode(channels: int) -> str:
    if channels not in _MODES:
        raise DataError(f"pictures have 1 or 3 channels, not {channels}")
    return _MODES[channels]


class Square(Transform):
    """Resized to a square, flipped, normalized."""

    def __init__(
        self, config: SquareConfig, *, images: ImagesConfig, targets: Mapping[str, Target]
    ) -> None:
        self.targets, self.size = dict(targets), (config.size, config.size)
        resized = v2.Resize(self.size, antialias=True)  # of masks, to the nearest value
        self.change = v2.Compose([resized, v2.RandomHorizontalFlip(config.flip)])
        self.normalize = v2.Normalize(list(images.mean), list(images.std))

    def __call__(self, sample: Sample) -> Sample:
        image = to_dtype(tv_tensors.Image(sample.image), torch.float32, scale=True)
        image, targets = self.change((image, dict(sample.targets)))
        return Sample(self.normalize(image).as_subclass(Tensor), targets)


class TwoCrops(Augmentation):
    """Two random crops of an image."""

    def __init__(self, config: TwoCropsConfig, *, channels: int, patch_size: int) -> None:
        self.views = {"global": View(2, config.size)}
        self.crop = v2.RandomResizedCrop(config.size, (config.smallest, 1), antialias=True)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            return {"global": torch.stack([self.crop(image), self.crop(image)])}
