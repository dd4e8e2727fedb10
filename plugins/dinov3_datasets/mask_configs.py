"""What datasets with masks can be told."""

from __future__ import annotations

from typing import Literal

from dinov3_datasets.configs import IMAGE_EXTENSIONS, PicturesConfig
from dinov3_datasets.configs import extensions_complaint as _extensions
from dinov3_framework import InvalidOption, config, option, positive

_MASKS = (".png", ".tif", ".tiff", ".npy", ".bmp", ".gif", ".pgm")
_HIGHEST = 65_535  # id

Color = tuple[int, int, int]


def _colors(value: tuple[Color, ...]) -> str | None:
    if wrong := [list(color) for color in value if not all(0 <= part <= 255 for part in color)]:
        return f"takes red, green and blue of 0 to 255, not {wrong[0]}"
    if repeated := [list(color) for color in dict.fromkeys(value) if value.count(color) > 1]:
        return f"has {repeated[0]} more than once"
    return None


def _names(value: tuple[str, ...]) -> str | None:
    if not value:
        return "must name at least one class"
    repeated = sorted({name for name in value if value.count(name) > 1})
    return f"names {repeated} more than once" if repeated else None


def _id(value: int) -> str | None:
    return None if abs(value) <= _HIGHEST else f"must lie in -65535..65535, is {value}"


def _ids(value: tuple[int, ...]) -> str | None:
    return next(filter(None, map(_id, value)), None)


def _stored_ids(value: tuple[int, ...]) -> str | None:
    repeated = sorted({number for number in value if value.count(number) > 1})
    return f"has {repeated} more than once" if repeated else _ids(value)


@config
class MaskFolderConfig(PicturesConfig):
    """Images and their masks in two folders, paired by equal paths without the endings.

    Masks are PNG, TIFF, BMP, GIF, PGM or .npy with a class id for each pixel (of a palette, its
    index), or PNGs with a color for each class. ``classes``, ``classes_file``, a ``classes.txt`` or
    ``labelmap.txt`` in the folder of the masks or beside it, ``palette`` or ``n_classes``, the
    first that is there, says which classes there are. The target is ``mask``.
    """

    images: str = option("the folder of the images, at any depth", is_place=True)
    masks: str = option("the folder of the masks", is_place=True)
    image_suffix: str = option("what the stems of images end with, such as _image", default="")
    mask_suffix: str = option("what the stems of masks end with, such as _mask", default="")
    classes: tuple[str, ...] | None = option(
        "names of the classes in the order of their ids", default=None, check=_names
    )
    classes_file: str | None = option(
        "in place of classes, a text file with a class a line: its name, perhaps with red, green "
        "and blue between tabs, or CVAT's name:red,green,blue::",
        default=None,
        is_place=True,
    )
    n_classes: int | None = option("in place of names, how many there are", default=None)
    palette: tuple[Color, ...] | None = option(
        "RGB of each class: what colors in masks stand for, and what pictures of masks look like; "
        "left out, that of the file of classes, or a computed one for pictures alone",
        default=None,
        check=_colors,
    )
    ignore_colors: tuple[Color, ...] = option(
        "colors in masks that count for nothing", default=(), check=_colors
    )
    coding: Literal["auto", "ids", "colors"] = option(
        "what masks hold: ids, colors, or ids where there is one channel or a palette (auto)",
        default="auto",
    )
    ids: tuple[int, ...] | None = option(
        "the id in the files of each class, in their order, where these are not 0, 1, 2, ...: "
        "[0, 255] of black and white masks",
        default=None,
        check=_stored_ids,
    )
    offset: int = option(
        "what is added to the ids in the files (but ignore_index and ignore); those that fall "
        "below 0 are ignored: with -1, ids of 1 to n are classes and 0 is none "
        "(reduce_zero_label)",
        default=0,
        check=_id,
    )
    ignore_index: int = option(
        "the id of pixels that count for nothing, in the files and in the target",
        default=255,
        check=_id,
    )
    ignore: tuple[int, ...] = option(
        "more ids in the files that count for nothing", default=(), check=_ids
    )
    orientation: Literal["own", "image"] = option(
        "which EXIF orientation turns a mask: its own, if it has one, as images are turned; or its "
        "image's, for masks that were made of the unturned pixels",
        default="own",
    )
    skip_unpaired: bool = option("leave out images that have no mask", default=False)
    extensions: tuple[str, ...] = option(
        "endings of images, upper case included", default=IMAGE_EXTENSIONS, check=_extensions
    )
    mask_extensions: tuple[str, ...] = option(
        "endings of masks, upper case included", default=_MASKS, check=_extensions
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.n_classes is not None and (complaint := positive(self.n_classes)):
            raise InvalidOption("n_classes", complaint)
        if self.classes is not None and self.classes_file is not None:
            raise InvalidOption("classes_file", "is given in place of classes, and both are there")
        if self.ids is not None and self.offset:
            raise InvalidOption("offset", "is given in place of ids, and both are there")
        counts = {
            "classes": None if self.classes is None else len(self.classes),
            "palette": None if self.palette is None else len(self.palette),
            "n_classes": self.n_classes,
            "ids": None if self.ids is None else len(self.ids),
        }
        known = {name: count for name, count in counts.items() if count is not None}
        if len(set(known.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in known.items())
            raise InvalidOption(next(iter(known)), f"numbers of classes differ: {said}")


@config
class Ade20kConfig(PicturesConfig):
    """ADE20K with 150 classes, as the scene parsing challenge of 2016 published it.

    Below ``root`` lie images/training, images/validation, annotations/training and
    annotations/validation; with the reference's lists ADE20K_object150_train.txt and _val.txt, if
    they are there, those images alone. The target is ``mask``.
    """

    root: str = option("the folder ADEChallengeData2016", is_place=True)
    split: Literal["train", "val"] = option(
        "train (20,210 images) or val (2,000 images)", default="train"
    )
    reduce_zero_label: bool = option(
        "the files' ids 1 to 150 become the classes 0 to 149, and 0, which is none of them, is "
        "ignored (255), as in all published numbers; false keeps 151 classes, with 0 as other",
        default=True,
    )


@config
class CityscapesConfig(PicturesConfig):
    """Cityscapes with the 19 classes of its benchmark.

    Below ``root`` lie leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY. Ids that the benchmark does not
    score are ignored (255). The target is ``mask``.
    """

    root: str = option("the folder with leftImg8bit and gtFine", is_place=True)
    split: Literal["train", "val"] = option(
        "train (2,975 images) or val (500 images)", default="train"
    )
    masks: Literal["auto", "label_ids", "train_ids"] = option(
        "which files are read: _gtFine_labelIds.png as published, _gtFine_labelTrainIds.png as its "
        "scripts write them, or these where they are there (auto); the classes are the same",
        default="auto",
    )


@config
class PascalVocConfig(PicturesConfig):
    """PASCAL VOC 2012 segmentation: background and 20 classes.

    Below ``root`` lie JPEGImages, SegmentationClass and ImageSets/Segmentation. Edges of objects
    are ignored (255). The target is ``mask``.
    """

    root: str = option("the folder VOC2012, or VOCdevkit that holds it", is_place=True)
    split: Literal["train", "val", "trainval", "trainaug"] = option(
        "train (1,464 images), val (1,449) or trainval; trainaug is the extended list (10,582), "
        "ImageSets/Segmentation/trainaug.txt, with masks in SegmentationClassAug",
        default="train",
    )
    list_file: str | None = option(
        "in place of the split's, a file with an image a line: its name without ending, or the "
        "paths of image and mask below root",
        default=None,
        is_place=True,
    )
