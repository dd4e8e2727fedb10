"""Squares, and how well a head finds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torchvision import tv_tensors

from dinov3_framework import (
    CorruptSampleError,
    DataError,
    Dataset,
    Evaluation,
    ImagesConfig,
    Model,
    Problem,
    Sample,
    StreamDataset,
    Target,
)
from dinov3_framework.contracts.data import target_complaints
from dinov3_framework.data.predictions import predictions
from dinov3_framework.runtime import collectives
from dinov3_framework.testing.toy_backbone import ToyBackbone
from dinov3_toy_heads import HeadScoreConfig, LastLayerConfig, SquaresConfig

IGNORED = 255


def square(config: SquaresConfig, channels: int, index: int) -> Sample:
    if index in config.corrupt:
        raise CorruptSampleError(f"square {index}", "broken on purpose")
    generator = torch.Generator().manual_seed(config.seed * 1000 + index)
    height, width = config.size, config.size + (index % 3 * 7 if config.ragged else 0)
    image = torch.randint(0, 120, (channels, height, width), generator=generator)
    label = int(torch.randint(4, (), generator=generator))
    top, left = (label // 2) * height // 2, (label % 2) * width // 2
    brightness = 30 + 35 * label  # tells the class where images are flipped, too
    image[:, top : top + height // 2, left : left + width // 2] += brightness
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[top : top + height // 2, left : left + width // 2] = 1
    mask[0] = IGNORED
    return Sample(image.to(torch.uint8), {"label": label, "mask": tv_tensors.Mask(mask)})


def schema(config: SquaresConfig) -> dict[str, Target]:
    return {
        "label": Target("class", classes=("a", "b", "c", "d")),
        "mask": Target("mask", config.classes, ignore_index=IGNORED),
    }


class Squares(Dataset):
    def __init__(self, config: SquaresConfig, channels: int) -> None:
        self.config, self.channels, self.targets = config, channels, schema(config)

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Sample:
        return square(self.config, self.channels, index)

    def describe(self) -> str:
        return f"{len(self)} squares"

    def version(self) -> str | None:
        return str(self.config) if self.config.versioned else None


class SquareStream(StreamDataset):
    """Every ``parts``-th square, over and over."""

    def __init__(self, config: SquaresConfig, channels: int) -> None:
        self.config, self.channels, self.targets = config, channels, schema(config)

    def open(
        self, *, part: int, parts: int, seed: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        done = 0 if state is None else int(state)
        while True:
            try:
                sample: Any = square(self.config, self.channels, done * parts + part)
            except CorruptSampleError as error:
                sample = error
            done += 1
            yield sample, done

    def describe(self) -> str:
        return "squares without end"


def build_squares(config: SquaresConfig, *, channels: int) -> Squares | SquareStream:
    if not config.there:
        raise DataError("squares: not on this machine")
    return (SquareStream if config.stream else Squares)(config, channels)


def build_last_layer(config: LastLayerConfig) -> ToyBackbone:
    backbone = ToyBackbone(config.in_chans or 3)
    backbone.n_layers = 2
    return backbone


class HeadScore(Evaluation):
    dataset: Dataset
    transform: Any

    def __init__(self, config: HeadScoreConfig) -> None:
        self.config = config

    def prepare(self, build: Any, images: ImagesConfig) -> None:
        self.dataset = build(self.config.dataset, channels=images.channels)
        targets = self.dataset.targets
        self.transform = build(self.config.transform, images=images, targets=targets)

    def problems(self, model: Model) -> list[Problem]:
        if model.head is None:
            return [Problem("", "measures a head, and there is none")]
        wanted = {
            name: each for name, each in model.head.targets.items() if name == self.config.target
        }
        return [Problem("dataset", c) for c in target_complaints(wanted, self.dataset.targets)]

    def run(self, model: Model) -> Mapping[str, float]:
        counts = torch.zeros(2, dtype=torch.float64)
        config = self.config
        for predicted, targets in predictions(
            model,
            self.dataset,
            self.transform,
            batch_size=config.batch_size,
            workers=config.workers,
        ):
            truth = torch.as_tensor(targets[config.target])
            found = predicted[config.target].argmax(1)
            known = truth != IGNORED
            counts += torch.stack([((found == truth) & known).sum(), known.sum()]).double().cpu()
        right, known = collectives.all_reduce_sum(counts).tolist()
        return {"accuracy": 100 * right / known, "counted": known}

    def protocol(self, model: Model) -> Mapping[str, Any]:
        return {"target": self.config.target, "size": self.transform.size}

    def data(self) -> str:
        return self.dataset.describe()
