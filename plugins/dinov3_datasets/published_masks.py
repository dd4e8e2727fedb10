"""ADE20K, Cityscapes and PASCAL VOC: one dataset with a layout and a table of classes each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dinov3_datasets.class_names import ClassTable, packaged_classes
from dinov3_datasets.configs import PicturesConfig
from dinov3_datasets.dense_pairs import DensePairs, Pairs
from dinov3_datasets.listing import image_files
from dinov3_datasets.mask_configs import Ade20kConfig, CityscapesConfig, PascalVocConfig
from dinov3_datasets.mask_ids import IdTable, MaskReader
from dinov3_datasets.pairing import absent
from dinov3_datasets.text_lines import numbered_lines
from dinov3_framework import DataError, Target
from dinov3_framework.errors import first_few, printable

_IGNORED = 255
# Cityscapes' ids of the classes that its benchmark scores, in their order there.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_IDS = 34


class PublishedMasks(DensePairs):
    """Images with the target ``mask``, class ids uint8 with 255 where they are to be ignored."""

    def __init__(
        self,
        component: str,
        config: PicturesConfig,
        channels: int,
        pairs: Pairs,
        classes: ClassTable,
        ids: IdTable,
    ) -> None:
        self.component = component
        target = Target(
            "mask", classes=classes.names, ignore_index=_IGNORED, palette=classes.palette
        )
        super().__init__(config, channels, pairs, {"mask": target})
        self.ids, self.reader = ids, MaskReader(ids, config.max_pixels)

    def read_truth(self, index: int) -> Tensor:
        return self.reader(self.truth_path(index))

    def truth_options(self) -> str:
        return f"{self.ids.said}, {len(self.targets['mask'].classes or ())} classes"


# --------------------------------------------------------------------------- ADE20K
def open_ade20k(config: Ade20kConfig, *, channels: int) -> PublishedMasks:
    root = _root("ade20k", config.root)
    folder = {"train": "training", "val": "validation"}[config.split]
    listed = root / f"ADE20K_object150_{config.split}.txt"
    if listed.is_file():
        names = sorted(line for _, line in numbered_lines(listed))
    else:
        names = [f"{folder}/{name}" for name in _listing("ade20k", root, f"images/{folder}")]
    pairs = _paired(
        "ade20k",
        root,
        ((f"images/{name}", f"annotations/{_stem(name)}.png") for name in names),
    )
    classes = packaged_classes("ade20k")
    if config.reduce_zero_label:
        ids = IdTable.shifted(len(classes.names), offset=-1, ignore_index=_IGNORED)
    else:
        colors = ((0, 0, 0), *(classes.palette or ()))
        classes = ClassTable(("other", *classes.names), colors)
        ids = IdTable.shifted(len(classes.names), ignore_index=_IGNORED)
    return PublishedMasks("ade20k", config, channels, pairs, classes, ids)


# --------------------------------------------------------------------------- Cityscapes
def open_cityscapes(config: CityscapesConfig, *, channels: int) -> PublishedMasks:
    root, split = _root("cityscapes", config.root), config.split
    ending = "_leftImg8bit.png"
    images = [
        name
        for name in _listing("cityscapes", root, f"leftImg8bit/{split}")
        if name.endswith(ending)
    ]
    stems = [f"gtFine/{split}/{name.removesuffix(ending)}_gtFine" for name in images]
    kind = config.masks
    if kind == "auto":
        first = [f"{stem}_labelTrainIds.png" for stem in stems[:1]]
        kind = "label_ids" if absent(root, first) else "train_ids"
    last = {"label_ids": "labelIds", "train_ids": "labelTrainIds"}[kind]
    pairs = _paired(
        "cityscapes",
        root,
        (
            (f"leftImg8bit/{split}/{name}", f"{stem}_{last}.png")
            for name, stem in zip(images, stems, strict=True)
        ),
    )
    classes = packaged_classes("cityscapes")
    if kind == "train_ids":
        ids = IdTable.shifted(len(classes.names), ignore_index=_IGNORED)
    else:
        table = dict.fromkeys(range(_CITYSCAPES_IDS), _IGNORED)
        table |= {stored: number for number, stored in enumerate(_CITYSCAPES)}
        ids = IdTable.of(table, f"ids of Cityscapes are 0..{_CITYSCAPES_IDS - 1}")
    return PublishedMasks("cityscapes", config, channels, pairs, classes, ids)


# --------------------------------------------------------------------------- PASCAL VOC
def open_pascal_voc(config: PascalVocConfig, *, channels: int) -> PublishedMasks:
    root = _root("pascal_voc", config.root)
    within = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    root = next((each for each in within if (each / "JPEGImages").is_dir()), root)
    path = root / "ImageSets" / "Segmentation" / f"{config.split}.txt"
    if config.list_file is not None:
        path = Path(config.list_file).expanduser()
    is_wide = config.split == "trainaug" and (root / "SegmentationClassAug").is_dir()
    masks = "SegmentationClassAug" if is_wide else "SegmentationClass"
    pairs = _paired("pascal_voc", root, _voc_lines(path, masks))
    classes = packaged_classes("pascal_voc")
    ids = IdTable.shifted(len(classes.names), ignore_index=_IGNORED)
    return PublishedMasks("pascal_voc", config, channels, pairs, classes, ids)


def _voc_lines(path: Path, masks: str) -> Iterator[tuple[str, str]]:
    for number, line in numbered_lines(path):
        parts = line.split()
        if len(parts) == 1:
            yield f"JPEGImages/{parts[0]}.jpg", f"{masks}/{parts[0]}.png"
        elif len(parts) == 2:
            yield parts[0].strip("/"), parts[1].strip("/")
        else:
            raise DataError(
                f"{path}, line {number}: {printable(line)!r} is neither a name nor the paths of an "
                "image and its mask"
            )


# --------------------------------------------------------------------------- all of them
def _root(component: str, value: str) -> Path:
    root = Path(value).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{component}: root = {value!r} {what}")
    return root


def _listing(component: str, root: Path, folder: str) -> list[str]:
    """Images below a folder of the layout, sorted."""
    if not (root / folder).is_dir():
        found = sorted(each.name for each in root.iterdir())
        held = f"it holds {printable(first_few(found), kept='')}" if found else "it is empty"
        raise DataError(f"{component}: {root} has no folder {folder}; {held}")
    return list(image_files(root / folder, (".jpg", ".jpeg", ".png")))


def _stem(name: str) -> str:
    """A path without its ending."""
    return str(Path(name).with_suffix(""))


def _paired(component: str, root: Path, names: Iterable[tuple[str, str]]) -> Pairs:
    listed = list(names)
    if not listed:
        raise DataError(f"{component}: no images in {root}")
    for what, wanted in (("images", [a for a, _ in listed]), ("masks", [b for _, b in listed])):
        _complain(component, root, what, absent(root, wanted), len(listed))
    return Pairs.of(root, root, listed)


def _complain(component: str, root: Path, what: str, missing: Sequence[str], total: int) -> None:
    if missing:
        raise DataError(
            f"{component}: {len(missing):,} of {total:,} {what} are missing in {root}: "
            f"{printable(first_few(missing), kept='')}"
        )
