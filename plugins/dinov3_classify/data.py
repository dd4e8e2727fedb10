"""The datasets of an evaluation, and their features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dinov3_classify.configs import OUTPUTS, ClassifyConfig
from dinov3_framework import (
    CorruptSampleError,
    DataError,
    Dataset,
    DatasetConfig,
    Features,
    ImagesConfig,
    Model,
    Problem,
    RecipeError,
    Target,
    extract_features,
    raw_pixels,
)
from dinov3_framework.contracts.running import Build
from dinov3_framework.data.workers import memory_complaint
from dinov3_framework.runtime.processes import environment_world_size


class ClassifyData:
    """A training set, test sets by name ("" the first), perhaps a validation set.

    ``size`` and ``resize`` are in pixels, as ``extract_features`` takes them; a ``size`` of None
    is that of the model's training. ``uncropped``, a ``resize`` of None is the size.
    """

    def __init__(
        self,
        config: ClassifyConfig,
        build: Build,
        images: ImagesConfig,
        *,
        size: int | None,
        resize: int | None,
        val: DatasetConfig | None = None,
        uncropped: bool = False,
    ) -> None:
        self.config, self.size, self.resize = config, size, resize
        self.uncropped = uncropped
        self.train: Dataset = build(config.train, channels=images.channels)
        self.val: Dataset | None = None
        if val is not None:
            self.val = build(val, channels=images.channels)
        self.tests: dict[str, Dataset] = {
            name: build(each, channels=images.channels)
            for name, each in {"": config.test, **config.tests}.items()
        }
        self.skipped: dict[str, int] = {}  # of the last extraction, by what a set is
        if problems := list(self._misfits()):
            raise RecipeError(problems)

    def problems(self, model: Model) -> list[Problem]:
        """Why the model cannot be shown these images; ``DataError`` for what the machine lacks."""
        return seen_problems(self.config, model, self.size, self.resize)

    def size_for(self, model: Model) -> int | None:
        return self.size or model.size

    def resize_for(self, model: Model) -> int | None:
        return self.size_for(model) if self.resize is None and self.uncropped else self.resize

    def extract(
        self, model: Model, dataset: Dataset, what: str, *, gather: bool = True
    ) -> Features:
        """Features of a set, which ``what`` names; with ``gather`` off, this process's share."""
        found = extract_features(
            model.backbone,
            dataset,
            **self._shown(model),
            outputs=OUTPUTS[self.config.features],
            gather=gather,
            cache=model.cache,
        )
        self.skipped[what] = found.skipped
        return found

    def raw(self, model: Model, dataset: Dataset, *, gather: bool = True) -> Features:
        return raw_pixels(dataset, **self._shown(model), gather=gather)

    def raw_bytes(self, model: Model) -> int:
        """What the raw pixels of all sets take, float32."""
        size = self.size_for(model)
        pixels = self._first_pixels() if size is None else size**2
        images = len(self.train) + sum(map(len, self.tests.values()))
        return 4 * model.images.channels * pixels * images

    @property
    def n_classes(self) -> int:
        return max(n_classes(each) or 0 for each in (self.train, *self.tests.values()))

    def protocol(self, model: Model) -> dict[str, Any]:
        shown = shown_pixels(self.size_for(model), self.resize_for(model))
        counts = {f"unreadable in {name}": count for name, count in self.skipped.items() if count}
        return shown | {"features": self.config.features} | counts

    def describe(self) -> str:
        """One line."""
        parts = [self.train.describe()]
        if self.val is not None:
            parts.append(f"chosen on: {self.val.describe()}")
        for name, each in self.tests.items():
            parts.append(f"{name or 'classified'}: {each.describe()}")
        return "; ".join(parts)

    # ------------------------------------------------------------------ parts
    def _shown(self, model: Model) -> dict[str, Any]:
        """How images are shown to a backbone."""
        return {
            "images": model.images,
            "size": self.size_for(model),
            "resize": self.resize_for(model),
            "batch_size": self.config.batch_size,
            "workers": self.config.workers,
        }

    def _first_pixels(self) -> int:
        """Pixels of the first image that can be read."""
        for index in range(len(self.train)):
            try:
                return int(self.train[index].image[0].numel())
            except CorruptSampleError:
                continue
        return 0  # nothing is readable, which the evaluation itself will report

    def _misfits(self) -> Iterator[Problem]:
        """What makes an evaluation of these datasets impossible or meaningless."""
        learned = {"train": self.train} | ({} if self.val is None else {"val": self.val})
        tests = {f"tests.{name}" if name else "test": each for name, each in self.tests.items()}
        for where, dataset in (learned | tests).items():
            if where in tests and n_classes(dataset) is None:
                yield Problem(where, f"needs labels of known classes; {dataset.describe()}")
            elif where in learned and dataset.n_classes is None:
                yield Problem(where, f"needs labels, one of each image; {dataset.describe()}")
            ours, theirs = self.train.classes, class_target(dataset).classes
            if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
                odd = sorted(set(ours) ^ set(theirs))
                what = f"{', '.join(odd[:5])} in one of them only" if odd else "in another order"
                yield Problem(
                    where,
                    f"its classes are not those of train: {what}",
                    "list the same classes in both, so that a label means the same (image_folder: "
                    "classes)",
                )


class _Loaded(Protocol):
    """How images are loaded, as configs say it."""

    @property
    def batch_size(self) -> int: ...
    @property
    def workers(self) -> int: ...


def seen_problems(
    config: _Loaded, model: Model, size: int | None, resize: int | None
) -> list[Problem]:
    """Why a model cannot be shown images of ``size``; ``DataError`` for what the machine lacks.

    A ``size`` of None is that of the model's training.
    """
    seen, patch = size or model.size, model.backbone.patch_size
    batch = config.batch_size * model.images.channels * (seen or 0) ** 2
    processes = environment_world_size() or 1
    if lack := memory_complaint(batch, workers=config.workers, processes=processes):
        raise DataError(lack)
    if resize is not None and seen is not None and resize < seen:
        message = f"{resize} px cannot hold a square of {seen} px"
        return [Problem("resize", message, f"take at least {seen}")]
    if size is None or size % patch == 0:
        return []
    lower = max(size // patch, 1) * patch
    message = f"{size} px are no multiple of the backbone's patch size {patch}"
    return [Problem("size", message, f"take {lower} or {lower + patch}")]


def shown_pixels(size: int | None, resize: int | None) -> dict[str, Any]:
    """What a protocol says of the sizes of images."""
    if size is None:
        return {"size": "as they are"}
    return {"size": size, "resize": round(size * 256 / 224) if resize is None else resize}


def n_classes(dataset: Dataset) -> int | None:
    """Of the target ``label``, or of ``labels`` where images have several."""
    return class_target(dataset).count


def class_target(dataset: Dataset, name: str = "label") -> Target:
    """The target of a name; of ``label`` that of several classes an image, if there is one."""
    for each in ("labels", name) if name == "label" else (name,):
        if each in dataset.targets:
            return dataset.targets[each]
    return Target("class")


def vectors(features: Features) -> Tensor:
    """[n, D]: one output, or several one after the other."""
    tokens: Mapping[str, Tensor] = features.tokens
    return next(iter(tokens.values())) if len(tokens) == 1 else torch.cat([*tokens.values()], dim=1)
