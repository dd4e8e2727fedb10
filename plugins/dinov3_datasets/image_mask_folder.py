"""Folders of images and of their masks as a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from dinov3_datasets.class_names import ClassTable, read_classes
from dinov3_datasets.dense_pairs import DensePairs
from dinov3_datasets.mask_configs import MaskFolderConfig
from dinov3_datasets.mask_ids import ColorTable, IdTable, MaskReader
from dinov3_datasets.pairing import Pairing
from dinov3_framework import CorruptSampleError, DataError, Target
from dinov3_framework.data.masks import read_mask
from dinov3_framework.data.palettes import palette

_FILES = ("classes.txt", "labelmap.txt")  # looked for with the masks and beside their folder
_LOOKED_AT = 8  # masks, by a check
_REMEDY = ": is offset, ignore, ignore_index or n_classes meant?"


class ImageMaskFolder(DensePairs):
    """Images with the target ``mask``, class ids, uint8 where they fit and int32 otherwise."""

    component = "image_mask_folder"
    config: MaskFolderConfig

    def __init__(self, config: MaskFolderConfig, *, channels: int) -> None:
        pairing = Pairing(
            component=self.component,
            truth="masks",
            image_extensions=config.extensions,
            truth_extensions=config.mask_extensions,
            image_suffix=config.image_suffix,
            truth_suffix=config.mask_suffix,
            skip_unpaired=config.skip_unpaired,
        )
        pairs = pairing.pairs(config.images, config.masks)
        names, colors, count = _classes(config)
        void = config.ignore_index
        stored_too = config.ids is None and 0 <= void + config.offset < count
        if 0 <= void < count or stored_too:
            raise DataError(
                f"image_mask_folder: ignore_index = {void} is an id of one of the {count} classes; "
                "take another, such as 65535"
            )
        target = Target(
            "mask",
            n_classes=count,
            classes=names,
            ignore_index=void,
            palette=colors or palette(count),
        )
        super().__init__(config, channels, pairs, {"mask": target})
        if config.ids is not None:
            table = IdTable.listed(config.ids, ignored=config.ignore, ignore_index=void)
        else:
            table = IdTable.shifted(
                count, offset=config.offset, ignored=config.ignore, ignore_index=void
            )
        by_color = None if colors is None else ColorTable.of(colors, config.ignore_colors, void)
        if by_color is None and config.coding == "colors":
            raise DataError(
                'image_mask_folder: coding = "colors" needs palette, or a file of classes with '
                "colors"
            )
        self.reader = MaskReader(table, config.max_pixels, _REMEDY, by_color, config.coding)

    def read_truth(self, index: int) -> Tensor:
        turned = self.config.orientation == "image"
        return self.reader(self.truth_path(index), self.image_path(index) if turned else None)

    def notes(self) -> list[str]:
        """What has no partner, what is lost of images, and black and white masks that are void."""
        found, config = super().notes(), self.config
        if config.ids is None and config.ignore_index == 255 and self._is_black_and_white():
            found.append(
                "the first masks hold 0 and 255 alone, and 255 is ignored; if it is a class, state "
                "ids = [0, 255]"
            )
        return found

    def _is_black_and_white(self) -> bool:
        seen: set[int] = set()
        for index in range(min(_LOOKED_AT, len(self))):
            try:
                stored = read_mask(self.truth_path(index), self.config.max_pixels)
            except CorruptSampleError:  # counted when it is read
                continue
            seen.update(np.unique(stored).tolist() if stored.ndim == 2 else [-1])
        return seen == {0, 255}

    def truth_options(self) -> str:
        config, target = self.config, self.targets["mask"]
        void = [config.ignore_index, *config.ignore, *config.ignore_colors]
        return (
            f"masks {config.coding} {config.orientation}, ids {config.ids}, offset "
            f"{config.offset}, ignored {void}, classes {target.classes or target.count}, colors "
            f"{target.palette}"
        )


def _classes(
    config: MaskFolderConfig,
) -> tuple[tuple[str, ...] | None, tuple[tuple[int, int, int], ...] | None, int]:
    """Names and colors of the classes, each None where unknown, and how many there are."""
    table = _listed(config)
    colors = config.palette or (table.palette if table is not None else None)
    names = table.names if table is not None else None
    counts = {
        "names of classes": None if names is None else len(names),
        "colors in palette": None if colors is None else len(colors),
        "n_classes": config.n_classes,
        "ids": None if config.ids is None else len(config.ids),
    }
    known = {what: count for what, count in counts.items() if count is not None}
    if not known:
        raise DataError(
            "image_mask_folder: which classes there are is not known: state n_classes, or their "
            "names (classes, classes_file, or a classes.txt in the folder of the masks, a name a "
            "line in the order of the ids), or palette where masks are colors"
        )
    if len(set(known.values())) > 1:
        said = ", ".join(f"{what}: {count}" for what, count in known.items())
        raise DataError(f"image_mask_folder: numbers of classes differ: {said}")
    return names, colors, next(iter(known.values()))


def _listed(config: MaskFolderConfig) -> ClassTable | None:
    """The names that the recipe states, or a file does."""
    if config.classes is not None:
        return ClassTable(config.classes)
    if config.classes_file is not None:
        return read_classes(Path(config.classes_file).expanduser())
    masks = Path(config.masks).expanduser()
    places = (folder / name for folder in (masks, masks.parent) for name in _FILES)
    found = next((place for place in places if place.is_file()), None)
    # One beside the folder may be of something else where the recipe says all there is to say.
    if found is not None and found.parent != masks and config.n_classes is not None:
        return None
    return None if found is None else read_classes(found)
