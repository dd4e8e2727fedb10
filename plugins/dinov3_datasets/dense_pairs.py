"""Datasets of images that have a file of values by pixel: masks, depth."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from pathlib import Path

from attrs import frozen
from torch import Tensor
from torchvision import tv_tensors

from dinov3_datasets.configs import PicturesConfig
from dinov3_datasets.decoding import pixel_options
from dinov3_datasets.file_stamps import files_stamp
from dinov3_datasets.listing import FileList
from dinov3_framework import Dataset, Sample, Target
from dinov3_framework.data.masks import orientation_of
from dinov3_framework.data.pictures import lost, read_image
from dinov3_framework.errors import WrongTargetError

_LOOKED_AT = 8  # images, by a check
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


@frozen(eq=False)
class Pairs:
    """Images and what belongs to each, as paths below two folders, which may be one."""

    image_root: Path
    images: FileList
    truth_root: Path
    truths: FileList
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        image_root: Path,
        truth_root: Path,
        names: Iterable[tuple[str, str]],
        notes: Iterable[str] = (),
    ) -> Pairs:
        """From (image, truth) below their folders."""
        listed = list(names)
        images, truths = FileList(a for a, _ in listed), FileList(b for _, b in listed)
        return cls(image_root, images, truth_root, truths, tuple(notes))


class DensePairs(Dataset):
    """Images uint8 [channels, H, W] with one target [H, W], all read from files when asked for.

    ``name`` is the component's; ``targets`` hold the one target that :meth:`read_truth` reads.
    """

    component: str

    def __init__(
        self, config: PicturesConfig, channels: int, pairs: Pairs, targets: dict[str, Target]
    ) -> None:
        self.config, self.channels, self.pairs, self.targets = config, channels, pairs, targets

    @abc.abstractmethod
    def read_truth(self, index: int) -> Tensor:
        """The target of a sample, [H, W]; raises ``CorruptSampleError``."""

    def truth_options(self) -> str:
        """The options that decide on the values of the target, in words."""
        return ""

    def __len__(self) -> int:
        return len(self.pairs.images)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]  # negative ones, and IndexError past the end
        config, path = self.config, self.image_path(index)
        image = read_image(
            path,
            self.channels,
            config.max_pixels,
            values=config.values,
            background=config.background,
        )
        truth = self.read_truth(index)
        if truth.shape != image.shape[1:]:
            self._complain_of_sizes(index, image, truth)
        (name,) = self.targets
        return Sample(image, {name: tv_tensors.Mask(truth)})

    def image_path(self, index: int) -> Path:
        return self.pairs.image_root / self.pairs.images[index]

    def truth_path(self, index: int) -> Path:
        return self.pairs.truth_root / self.pairs.truths[index]

    def name(self, index: int) -> str:
        return self.pairs.images[range(len(self))[index]]

    def describe(self) -> str:
        ((name, target),) = self.targets.items()
        return (
            f"{self.component} {self.pairs.image_root}: {len(self):,} images; {name}: {target}"
            f"{f' in {target.unit}' if target.unit else ''}"
        )

    def digest(self) -> str:
        pairs = self.pairs
        return f"{len(self):,} images, their names {pairs.images.digest}, {pairs.truths.digest}"

    def version(self) -> str:
        """The digest, sizes and times of all files, and what decides on pixels and targets."""
        pairs = self.pairs
        stamps = (
            files_stamp(root, iter(files))
            for root, files in (
                (pairs.image_root, pairs.images),
                (pairs.truth_root, pairs.truths),
            )
        )
        options = f"{pixel_options(self.config, self.channels)}, {self.truth_options()}"
        return f"{self.digest()}, files {' '.join(stamps)}, {options}"

    def notes(self) -> list[str]:
        """What has no partner, and values and bands of the first images that are lost."""
        paths = [str(self.image_path(i)) for i in range(min(_LOOKED_AT, len(self)))]
        given = self.config.values
        return [*self.pairs.notes, *lost(paths, self.channels, self.config.max_pixels, given)]

    def _complain_of_sizes(self, index: int, image: Tensor, truth: Tensor) -> None:
        (what,) = self.targets
        (height, width), (rows, columns) = image.shape[1:], truth.shape
        reason = (
            f"is {columns} x {rows} pixels, its image {self.name(index)} {width} x {height}; both "
            "must be of one size"
        )
        path = self.image_path(index)
        if (rows, columns) == (width, height) and orientation_of(path) in _TURNED:
            reason += (
                f" (the image is turned by the orientation in its EXIF data; was the {what} made "
                "of the unturned pixels?)"
            )
        raise WrongTargetError(str(self.truth_path(index)), reason)
