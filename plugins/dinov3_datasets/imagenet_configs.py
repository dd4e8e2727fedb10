"""What the datasets of ImageNet, and the task that indexes them, can be told; light to import."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import DatasetConfig, InvalidOption, config, option, positive

_MAX_PIXELS = 178_956_970  # where Pillow refuses


@config
class Imagenet1kConfig(DatasetConfig):
    """ImageNet-1k (ILSVRC 2012) in the layout of the reference, with its index files.

    ``root`` holds ``train/<class id>/<class id>_<number>.JPEG``,
    ``val/<class id>/ILSVRC2012_val_<number>.JPEG``, ``test/ILSVRC2012_test_<number>.JPEG`` and
    ``labels.txt`` (class id, name); ``dinov3-run index`` writes the index files.
    """

    root: str = option("the folder with train, val, test and labels.txt", is_place=True)
    split: Literal["train", "val", "test"] = option(
        "which images; those of test have no labels", default="train"
    )
    extra: str | None = option(
        "the folder of the index files, such as entries-TRAIN.npy; left out, extra below root",
        default=None,
        is_place=True,
    )
    scan: bool = option(
        "list the folders at each start in place of reading the index; without an index, folders "
        "of at most 50,000 files are listed anyway",
        default=False,
    )
    subset: bool = option(
        "leave out what the index names and the folders lack, with the labels of all classes; "
        "otherwise the two have to agree",
        default=False,
    )
    real: str | None = option(
        "real.json of ReaL (Beyer et al. 2020): for val, the target labels holds all classes that "
        "are right; images for which none is are left out",
        default=None,
        is_place=True,
    )
    classes: Literal["ids", "names"] = option(
        "what classes are called: by id, as in a folder of images, or by the names of labels.txt, "
        "of which some mean two classes",
        default="ids",
    )
    max_pixels: int = option(
        "pixels above which a file counts as corrupt", default=_MAX_PIXELS, check=positive
    )

    def __attrs_post_init__(self) -> None:
        if self.real is not None and self.split != "val":
            raise InvalidOption("real", f'is for split = "val", not {self.split!r}')
        if self.scan and self.subset:
            raise InvalidOption("subset", "has no effect with scan = true")


@config
class ImagenetV2Config(DatasetConfig):
    """ImageNet-V2 (Recht et al. 2019): a new test set for the classes of ImageNet-1k.

    ``root`` is the folder that holds ``0`` to ``999``, named after the labels.
    """

    root: str = option("the folder with the folders 0 to 999", is_place=True)
    imagenet: str = option(
        "where the classes are listed: the folder of imagenet_1k or of its index files (whose "
        "class-ids come first), or a labels.txt",
        is_place=True,
    )
    subset: bool = option("allow folders of classes to be missing or empty", default=False)
    classes: Literal["ids", "names"] = option(
        "what classes are called, as in imagenet_1k", default="ids"
    )
    max_pixels: int = option(
        "pixels above which a file counts as corrupt", default=_MAX_PIXELS, check=positive
    )


@config
class Imagenet22kConfig(DatasetConfig):
    """ImageNet-22k as it is published: a tar for each class, read where it lies.

    ``root`` holds ``n00004475.tar`` and so on, ``extra`` their index, which ``dinov3-run index``
    writes: ``entries.npy`` and ``class-ids.npy``, as in the reference.
    """

    root: str = option("the folder with the tar files", is_place=True)
    extra: str | None = option(
        "the folder of the index files; left out, extra below root", default=None, is_place=True
    )
    open_tars: int = option("tar files that each process keeps open", default=64, check=positive)
    max_pixels: int = option(
        "pixels above which an image counts as corrupt", default=_MAX_PIXELS, check=positive
    )
