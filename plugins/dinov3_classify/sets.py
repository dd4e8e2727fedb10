"""Sets of labeled images that a classifier is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinov3_classify.configs_heads import ClassifiedSetsConfig
from dinov3_classify.data import class_target, seen_problems, shown_pixels
from dinov3_framework import Dataset, DatasetConfig, ImagesConfig, Model, Problem, Target
from dinov3_framework.contracts.running import Build


class ClassifiedSets:
    """Datasets by name, and how their images are seen."""

    def __init__(
        self,
        config: ClassifiedSetsConfig,
        sets: Mapping[str, DatasetConfig],
        build: Build,
        images: ImagesConfig,
    ) -> None:
        self.config = config
        self.datasets: dict[str, Dataset] = {
            name: build(each, channels=images.channels) for name, each in sets.items()
        }
        # Images of the last run, by the name of their set.
        self.skipped: dict[str, int] = {}
        self.unlabeled: dict[str, int] = {}  # of several classes an image, those without any

    def problems(self, model: Model, predicted: Target, name_of_target: str) -> list[Problem]:
        """Why the model cannot be shown these images, or does not know their classes."""
        found = seen_problems(self.config, model, self.config.size, self.config.resize)
        for name, dataset in self.datasets.items():
            where = name if name == "val" else f"sets.{name}"
            target = class_target(dataset, name_of_target)
            if target.kind != "class" or target.count is None:
                message = f"has no classes {name_of_target!r}; {dataset.describe()}"
                found.append(Problem(where, message))
            elif target.count != predicted.count:
                message = f"has {target.count} classes, the head predicts {predicted.count}"
                found.append(Problem(where, message, "the same classes in the same order"))
            elif None not in (target.classes, predicted.classes) and (
                target.classes != predicted.classes
            ):
                odd = sorted(set(target.classes or ()) ^ set(predicted.classes or ()))
                what = f"others: {', '.join(odd[:5])}" if odd else "the same in another order"
                message = f"its classes are not those that the head was trained on: {what}"
                found.append(Problem(where, message, "the same classes in the same order"))
        return found

    def shown(self, model: Model) -> dict[str, Any]:
        """How images are shown to a backbone, as ``extract_features`` takes it."""
        return {
            "images": model.images,
            "size": self.config.size or model.size,
            "resize": self.config.resize,
            "batch_size": self.config.batch_size,
            "workers": self.config.workers,
        }

    def protocol(self, model: Model) -> dict[str, Any]:
        counts = {f"unreadable in {name}": count for name, count in self.skipped.items()}
        counts |= {f"without a class in {name}": count for name, count in self.unlabeled.items()}
        shown = shown_pixels(self.config.size or model.size, self.config.resize)
        return shown | {what: count for what, count in counts.items() if count}

    def describe(self) -> str:
        """One line."""
        return "; ".join(f"{name}: {each.describe()}" for name, each in self.datasets.items())
