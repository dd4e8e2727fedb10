"""Small datasets in memory, to make others of: a plugin's, as a test registers it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from dinov3_framework import (
    Component,
    CorruptSampleError,
    Dataset,
    DatasetConfig,
    Registry,
    Sample,
    StreamDataset,
    Target,
    config,
    option,
)


@config
class GraysConfig(DatasetConfig):
    """Images of one gray level each, which is their index."""

    count: int = option("images", default=10)
    label_count: int = option("classes; 0 for no labels", default=2)
    named: bool = option("whether classes have names", default=True)
    versioned: bool = option("whether it says what tells it from others", default=True)
    corrupt: int = option("index of an image that is corrupt", default=-1)
    unlabeled: int = option("index of an image without a label", default=-1)
    shade: int = option("gray of the first image", default=0)


class Grays(Dataset):
    """Counts how often an image was read."""

    def __init__(self, config: GraysConfig, *, channels: int) -> None:
        self.config, self.channels, self.reads = config, channels, 0
        names = tuple("abcdefgh"[: config.label_count])
        if config.label_count:
            self.targets = {
                "label": Target("class", classes=names)
                if config.named
                else Target("class", n_classes=config.label_count)
            }

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        if index == self.config.corrupt:
            raise CorruptSampleError(f"image {index}", "broken")
        image = torch.full((self.channels, 2, 2), self.config.shade + index, dtype=torch.uint8)
        label = self.label(index)
        return Sample(image, {} if label is None else {"label": label})

    def label(self, index: int) -> int | None:
        count = self.config.label_count
        return None if not count or index == self.config.unlabeled else index % count

    def name(self, index: int) -> str:
        return f"folder{index % 2}/image{index}"

    def version(self) -> str | None:
        return repr(self.config) if self.config.versioned else None


@config
class CountsConfig(DatasetConfig):
    """A stream of gray levels from 100 on, each part its own."""

    depth: bool = option("whether there is a target besides the label", default=False)


class Counts(StreamDataset):
    def __init__(self, config: CountsConfig, *, channels: int) -> None:
        self.channels = channels
        self.targets = {"label": Target("class", classes=("a", "b"))}
        if config.depth:
            self.targets["size"] = Target("number", unit="m")

    def open(
        self, *, part: int, parts: int, seed: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        place = 0 if state is None else state["place"]
        while True:
            level = 100 + (place * parts + part) % 100
            place += 1
            targets: dict[str, Any] = {"label": level % 2}
            if "size" in self.targets:
                targets["size"] = 1.0
            image = torch.full((self.channels, 2, 2), level, dtype=torch.uint8)
            found: Any = Sample(image, targets)
            if level == 107:
                found = CorruptSampleError("number 107", "broken")
            yield found, {"place": place}

    def describe(self) -> str:
        return "counts without end"


@cache
def registry() -> Registry:
    """The installed plugins, and the datasets above."""
    found = Registry.load()
    found.add("dataset", Component("grays", GraysConfig, Grays), "tests", "tests")
    found.add("dataset", Component("counts", CountsConfig, Counts), "tests", "tests")
    return found


def build(name: str, channels: int = 3, **values: Any) -> Any:
    return registry().build("dataset", name, channels=channels, **values)


def grays(**values: Any) -> dict[str, Any]:
    return {"use": "grays", **values}
