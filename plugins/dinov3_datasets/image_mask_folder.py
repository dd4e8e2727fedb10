"""Folders of images and of their masks as a dataset."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dinov3_datasets.class_names import ClassTable, read_classes
from dinov3_datasets.dense_pairs import DensePairs
from dinov3_datasets.mask_configs import MaskFolderConfig
from dinov3_datasets.mask_ids import ColorTable, IdTable, MaskReader
from dinov3_datasets.pairing import Pairing
from dinov3_framework import DataError, Target
from dinov3_framework.data.palettes import palette

_FILES = ("classes.txt", "labelmap.txt")  # looked for with the masks and beside their folder
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
        if 0 <= void < count or 0 <= void + config.offset < count:
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

    def truth_options(self) -> str:
        config, target = self.config, self.targets["mask"]
        return (
            f"masks {config.coding} {config.orientation}, offset {config.offset}, ignored "
            f"{config.ignore_index} {list(config.ignore)} {list(config.ignore_colors)}, classes "
            f"{target.classes or target.count}, colors {target.palette}"
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
