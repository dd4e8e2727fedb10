"""Augmentations and datasets that each break one promise, and how the checks say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, Mask

from dinov3_framework import (
    Augmentation,
    AugmentationConfig,
    CorruptSampleError,
    Dataset,
    DatasetConfig,
    Sample,
    Target,
    View,
    config,
)


@config
class ToyAugmentationConfig(AugmentationConfig):
    """Config of the augmentations below."""


class SoundAugmentation(Augmentation):
    """Crops of random brightness; masks half of each crop, by turns."""

    views: Mapping[str, View] = {"global": View(2, 8), "local": View(1, 4)}
    makes_masks = True

    def __init__(self, config: ToyAugmentationConfig, *, channels: int, patch_size: int) -> None:
        self.channels = channels

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        level = int(image.float().mean())
        return {
            name: torch.from_numpy(
                rng.integers(0, 1 + level, (v.crops, self.channels, v.size, v.size), np.uint8)
            )
            for name, v in self.views.items()
        }

    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        return torch.tensor([[(row + step) % 2 == 0] * 2 + [False] * 2 for row in rows])


class NoGlobal(SoundAugmentation):
    views = {"local": View(1, 4)}  # noqa: RUF012


class OddSize(SoundAugmentation):
    views = {"global": View(2, 10)}  # noqa: RUF012


class OtherViews(SoundAugmentation):
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        crops = dict(super().__call__(image, rng))
        return {"global": crops["global"]}


class OtherCount(SoundAugmentation):
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        return {name: crops[:1] for name, crops in super().__call__(image, rng).items()}


class Integers(SoundAugmentation):
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        return {name: crops.long() for name, crops in super().__call__(image, rng).items()}


class GlobalGenerator(SoundAugmentation):
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        crops = super().__call__(image, rng)
        return {name: torch.randint_like(value, 200) for name, value in crops.items()}


class Remembers(SoundAugmentation):
    calls = 0

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        self.calls += 1
        return {name: crops + self.calls for name, crops in super().__call__(image, rng).items()}


class WritesToImage(SoundAugmentation):
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        return super().__call__(image.fill_(7), rng)


class NoTinyImages(SoundAugmentation):
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        image.unfold(1, 8, 1)
        return super().__call__(image, rng)


class Unpicklable(SoundAugmentation):
    def __init__(self, config: ToyAugmentationConfig, *, channels: int, patch_size: int) -> None:
        super().__init__(config, channels=channels, patch_size=patch_size)
        self.function = lambda image: image


class FloatMasks(SoundAugmentation):
    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        return super().masks(rows=rows, total=total, seed=seed, step=step).float()


class MasksByPlace(SoundAugmentation):
    """Depends on where in the request a row stands."""

    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        return super().masks(rows=range(len(rows)), total=total, seed=seed, step=step)


class MasksAll(SoundAugmentation):
    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        return torch.ones(len(rows), 4, dtype=torch.bool)


class TeacherApart(SoundAugmentation):
    views = {"global": View(2, 8), "local": View(1, 4), "teacher": View(1, 6)}  # noqa: RUF012


class Small(SoundAugmentation):
    """A variant of a quarter of the steps."""

    views = {"global": View(2, 4), "local": View(1, 4)}  # noqa: RUF012
    makes_masks = False
    share = 0.25


class Large(Small):
    views = {"global": View(2, 8), "local": View(1, 4)}  # noqa: RUF012
    share = 0.75


class SoundVariants(Large):
    """By turns small and large."""

    share = 1.0
    kinds: tuple[type[SoundAugmentation], ...] = (Small, Large)

    def __init__(self, config: ToyAugmentationConfig, *, channels: int, patch_size: int) -> None:
        super().__init__(config, channels=channels, patch_size=patch_size)
        self.each = [kind(config, channels=channels, patch_size=patch_size) for kind in self.kinds]

    def variants(self) -> Sequence[Augmentation]:
        return self.each

    def at(self, seed: int, step: int) -> Augmentation:
        return self.each[(seed + step) % 2]


class NoVariants(SoundVariants):
    kinds = ()


class ForeignVariant(SoundVariants):
    def at(self, seed: int, step: int) -> Augmentation:
        return TeacherApart(ToyAugmentationConfig(), channels=self.channels, patch_size=4)


class VariantsByTheClock(SoundVariants):
    """Counts how often it was asked."""

    asked = 0

    def at(self, seed: int, step: int) -> Augmentation:
        self.asked += 1
        return self.each[self.asked // 3 % 2]


class ByRank(SoundVariants):
    """Knows whether it was sent to another process."""

    rank = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rank = 1

    def at(self, seed: int, step: int) -> Augmentation:
        return self.each[(step + self.rank) % 2]


class NoLocal(Small):
    views = {"global": View(2, 4)}  # noqa: RUF012


class OtherViewsByVariant(SoundVariants):
    kinds = (NoLocal, Large)


class OddVariant(SoundVariants):
    class Odd(Small):
        views = {"global": View(2, 6), "local": View(1, 4)}  # noqa: RUF012

    kinds = (Odd, Large)


class ViewsOfTheSmallest(SoundVariants):
    views = Small.views


class SharesOverOne(SoundVariants):
    kinds = (Large, Large)


class Nested(SoundVariants):
    kinds = (SoundVariants, Large)


class VariantNotAsDeclared(SoundVariants):
    class Fewer(Small):
        def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
            return {name: crops[:1] for name, crops in super().__call__(image, rng).items()}

    kinds = (Fewer, Large)


AUGMENTATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "no global": (NoGlobal, "no global crops"),
    "odd size": (OddSize, "a multiple of the patch size 4"),
    "other views": (OtherViews, r"makes the views \['global'\]"),
    "other count": (OtherCount, r"global crops of an image \[3, 40, 40\] are \[1, 3, 8, 8\]"),
    "integers": (Integers, "uint8 or finite floats, are torch.int64"),
    "global generator": (GlobalGenerator, "other crops for the same rng"),
    "remembers": (Remembers, "other crops for the same rng"),
    "writes to image": (WritesToImage, "writes into the image"),
    "no tiny images": (NoTinyImages, "test_crops: raised RuntimeError"),
    "unpicklable": (Unpicklable, "raised .*pickle"),
    "float masks": (FloatMasks, "masks are torch.float32"),
    "masks by place": (MasksByPlace, "masks depend on which rows"),
    "masks all": (MasksAll, "leaves no patch"),
    "teacher apart": (TeacherApart, "teacher's version of the global ones, but not as many"),
    "no variants": (NoVariants, "must give one or more augmentations"),
    "foreign variant": (ForeignVariant, "which no variant has"),
    "variants by the clock": (VariantsByTheClock, "when asked again, or once pickled"),
    "variants by rank": (ByRank, "when asked again, or once pickled"),
    "other views by variant": (OtherViewsByVariant, "in more than sizes"),
    "odd variant": (OddVariant, "a multiple of the patch size 4"),
    "views of the smallest": (ViewsOfTheSmallest, "must be those of the largest"),
    "shares over one": (SharesOverOne, "sum to 1, are"),
    "nested variants": (Nested, "a variant has variants of its own"),
    "variant not as declared": (VariantNotAsDeclared, "are \\[1, 3, 4, 4\\], declared"),
}


# --------------------------------------------------------------------------- datasets
@config
class ToyDatasetConfig(DatasetConfig):
    """Config of the datasets below."""


class SoundDataset(Dataset):
    """Gray levels by index; every third image is corrupt."""

    targets = {"label": Target("class", n_classes=4)}  # noqa: RUF012

    def __init__(self, config: ToyDatasetConfig, *, channels: int) -> None:
        self.channels = channels

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Sample:
        if index % 3 == 2:
            raise CorruptSampleError(f"image {index}", "as every third")
        return Sample(
            torch.full((self.channels, 5, 6), index, dtype=torch.uint8), {"label": index % 4}
        )


class Empty(SoundDataset):
    def __len__(self) -> int:
        return 0


class AllCorrupt(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        raise CorruptSampleError("image", "as all are")


class Floats(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        return Sample(super().__getitem__(index).image.float())


class Gray(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        return Sample(super().__getitem__(index).image[:1])


class TensorLabel(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        return Sample(super().__getitem__(index).image, {"label": torch.tensor(1)})


class HighLabel(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        return Sample(super().__getitem__(index).image, {"label": 4})


class ToldLabel(SoundDataset):
    """Tells another label than the sample has."""

    def label(self, index: int) -> int:
        return (index + 1) % 4


class Tuples(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index).image, 1  # type: ignore[return-value]


class Shares(SoundDataset):
    """Hands out its own memory."""

    def __init__(self, config: ToyDatasetConfig, *, channels: int) -> None:
        self.images = torch.full((20, channels, 5, 6), 3, dtype=torch.uint8)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index])


class OpenFile(SoundDataset):
    def __init__(self, config: ToyDatasetConfig, *, channels: int) -> None:
        super().__init__(config, channels=channels)
        self.reader = iter(lambda: 0, 1)


class Chatty(SoundDataset):
    def describe(self) -> str:
        return "images\nof mine"


class OtherTarget(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        return Sample(super().__getitem__(index).image, {"depth": 0.5})


class Maps(SoundDataset):
    """Targets of every kind, as they should be."""

    targets = {  # noqa: RUF012
        "mask": Target("mask", n_classes=3, ignore_index=255),
        "depth": Target("map", unit="m"),
        "boxes": Target("boxes"),
        "objects": Target("instances"),
        "age": Target("number"),
        "caption": Target("text"),
    }

    def __getitem__(self, index: int) -> Sample:
        return Sample(super().__getitem__(index).image, self.made())

    def made(self) -> dict[str, Any]:
        boxes = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        return {
            "mask": Mask(torch.tensor([[0, 1, 2, 255, 0, 0]] * 5)),
            "depth": Mask(torch.full((5, 6), torch.nan)),
            "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=(5, 6)),
            "objects": Mask(torch.ones(1, 5, 6, dtype=torch.bool)),
            "age": 3,
            "caption": "a cat",
        }


class BadMask(Maps):
    def made(self) -> dict[str, Any]:
        return super().made() | {"mask": Mask(torch.full((5, 6), 3))}


class PlainMask(Maps):
    def made(self) -> dict[str, Any]:
        return super().made() | {"mask": torch.zeros(5, 6, dtype=torch.int64)}


class SmallMap(Maps):
    def made(self) -> dict[str, Any]:
        return super().made() | {"depth": Mask(torch.zeros(5, 5))}


class CornerAndSize(Maps):
    def made(self) -> dict[str, Any]:
        boxes = BoundingBoxes(torch.zeros(1, 4), format="XYWH", canvas_size=(5, 6))
        return super().made() | {"boxes": boxes}


class Crashes(SoundDataset):
    def __getitem__(self, index: int) -> Sample:
        raise OSError("no such file")


DATASETS: dict[str, tuple[Callable[..., Any], str]] = {
    "empty": (Empty, "holds no image"),
    "all corrupt": (AllCorrupt, "not one of 16 samples"),
    "floats": (Floats, "torch.float32, neither"),
    "gray": (Gray, r"\[1, 5, 6\], not \[3, H, W\]"),
    "tensor label": (TensorLabel, "'label' of sample 0 is a Tensor"),
    "told label": (ToldLabel, r"label\(0\) is 1, the sample has 0"),
    "high label": (HighLabel, "'label' of sample 0 is 4, no class, 4 classes"),
    "other target": (OtherTarget, "has a target 'depth'"),
    "bad mask": (BadMask, "'mask' of sample 0 is a Mask"),
    "plain mask": (PlainMask, "'mask' of sample 0 is a Tensor"),
    "small map": (SmallMap, "'depth' of sample 0"),
    "corner and size": (CornerAndSize, "'boxes' of sample 0"),
    "tuples": (Tuples, "must be a Sample, is tuple"),
    "shares": (Shares, "when its image is written to"),
    "open file": (OpenFile, "test_repeatable: raised .*pickle"),
    "chatty": (Chatty, r"describe\(\) must give one line"),
    "crashes": (Crashes, "test_samples: raised OSError"),
}
