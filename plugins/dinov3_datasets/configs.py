"""What the datasets can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from dinov3_framework import (
    DatasetConfig,
    InvalidOption,
    TaskConfig,
    config,
    not_negative,
    option,
    positive,
)

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif", ".bmp", ".gif", ".tga",
    ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".npy",
)  # fmt: skip


def extensions_complaint(value: tuple[str, ...]) -> str | None:
    if not value:
        return "must name at least one extension"
    wrong = [name for name in value if not name.startswith(".") or name != name.lower()]
    return f"must be lower case and start with a dot, not {wrong}" if wrong else None


def _classes(value: tuple[str, ...]) -> str | None:
    if not value:
        return "must name at least one folder"
    wrong = [name for name in value if not name or "/" in name or name.startswith(".")]
    if wrong:
        return f"must be names of folders right below root, not {wrong}"
    repeated = sorted({name for name in value if value.count(name) > 1})
    return f"names {repeated} more than once" if repeated else None


def _bits(value: int) -> str | None:
    return None if 1 <= value <= 32 else f"must be 1 to 32, not {value}"


def _inner_fraction(value: float) -> str | None:
    return None if 0 < value < 1 else f"must lie between 0 and 1, is {value:g}"


def _color(value: tuple[int, int, int]) -> str | None:
    return None if all(0 <= part <= 255 for part in value) else "takes three numbers of 0 to 255"


@config
class PicturesConfig(DatasetConfig):
    """Base of datasets that decode image files: how their values become 8 bits."""

    max_pixels: int = option(
        "pixels above which an image counts as corrupt, told from its header before decoding; the "
        "default is where Pillow refuses, about 0.5 GB once decoded",
        default=178_956_970,
        check=positive,
    )
    bits: int | None = option(
        "bits that the values of wider files really have, such as 10 or 12; left out, 16 of 16",
        default=None,
        check=_bits,
    )
    low: float | None = option("in place of bits, the value that becomes black", default=None)
    high: float | None = option("and the value that becomes white", default=None)
    background: tuple[int, int, int] = option(
        "what shows through where images are transparent, RGB",
        default=(255, 255, 255),
        check=_color,
    )

    @property
    def values(self) -> tuple[float, float] | None:
        """The values that become 0 and 255, if they are stated."""
        if self.bits is not None:
            return 0.0, 2.0**self.bits - 1
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __attrs_post_init__(self) -> None:
        ends = (self.low is None) + (self.high is None)
        if ends == 1 or (ends == 0 and self.bits is not None):
            raise InvalidOption("low", "low and high go together, in place of bits")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise InvalidOption("low", f"is {self.low:g}, not below high = {self.high:g}")


@config
class ImageFolderConfig(PicturesConfig):
    """All images below a folder, at any depth; with labels where class folders give them.

    Files and folders whose names start with a dot are ignored, links are followed. The order is
    that of the names, so every machine sees the same dataset.
    """

    root: str = option("the folder", is_place=True)
    labels: Literal["auto", "folders", "none"] = option(
        "where labels come from: the name of the folder right below root (folders), nowhere "
        "(none), or folders if every image lies in one (auto)",
        default="auto",
    )
    classes: tuple[str, ...] | None = option(
        "class folders in the order of their labels, to the exclusion of all else; left out, "
        "every folder, sorted by name",
        default=None,
        check=_classes,
    )
    sort: Literal["name", "number"] = option(
        "order of files and class folders: by name (10 before 2), or with digits in a row as one "
        "number (2 before 10), as class folders 0, 1, ..., 999 need it",
        default="name",
    )
    split: Literal["all", "train", "val"] = option(
        "all images, or those for training or validation: of the subfolders train and val (or "
        "valid, validation, test) of root, with the classes of train; where there are none, a "
        "seeded share of each class",
        default="all",
    )
    val_fraction: float = option(
        "the share of each class that is for validation, where split has no subfolders",
        default=0.2,
        check=_inner_fraction,
    )
    split_seed: int = option("seed of that choice", default=0, check=not_negative)
    extensions: tuple[str, ...] = option(
        "endings of image files, upper case included",
        default=IMAGE_EXTENSIONS,
        check=extensions_complaint,
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.classes is not None and self.labels == "none":
            raise InvalidOption("classes", 'needs labels = "folders" or "auto", is with "none"')


@config
class FashionMnistConfig(DatasetConfig):
    """Small Fashion-MNIST: 28 x 28 gray images of clothes in 10 classes, part of this package.

    The first 500 images per class of the training set and the first 100 of the test set. Built
    for 3 channels, the gray value is repeated.
    """

    split: Literal["train", "test"] = option(
        "train (5,000 images) or test (1,000 images)", default="train"
    )


@config
class IndexConfig(TaskConfig):
    """Writes the index files that a dataset needs beside its data, once for all runs.

    For datasets of a kind that has them, such as imagenet_1k. The run's folder holds its log
    alone; the index goes where the dataset looks for it.
    """

    dataset: DatasetConfig = option("the dataset that gets an index")
    replace: bool = option("write index files anew that are there already", default=False)
    overwritten: ClassVar = ()

    def run_name(self, recipe: str) -> str:
        """The recipe's name with the dataset's folder and split, as far as it has them."""
        naming = (getattr(self.dataset, name, None) for name in ("root", "split"))
        return "-".join([recipe, *(Path(value).name for value in naming if value)])
