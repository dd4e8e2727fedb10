"""Small stand-ins: a dataset in memory, a backbone of one layer, a run to observe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from attrs import frozen
from dinov3_classify.configs import KnnConfig, LogisticRegressionConfig
from dinov3_classify.knn_evaluation import KnnEvaluation
from dinov3_classify.logistic_evaluation import LogisticRegressionEvaluation
from dinov3_datasets.configs import FashionMnistConfig
from dinov3_datasets.fashion import FashionMnist
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig, config, option
from dinov3_framework.contracts.data import Dataset, Sample, Target
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.contracts.running import Model
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.kinds import BackboneConfig, Component, DatasetConfig
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives

GRAY = ImagesConfig(channels=1, mean=(0.5,), std=(0.25,))


class Memory(Dataset):
    """Images given as a list; None is one that cannot be decoded."""

    def __init__(
        self, images: Sequence[Tensor | None], labels: Sequence[int | None] | None = None
    ) -> None:
        self.images = images
        self.labels = labels if labels is not None else [None] * len(images)
        known = [label for label in self.labels if label is not None]
        if known:
            self.targets = {"label": Target("class", n_classes=max(known) + 1)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        if image is None:
            raise CorruptSampleError(f"image {index}", "half of it is missing")
        label = self.labels[index]
        return Sample(image, {} if label is None else {"label": label})


def gray_images(count: int, seed: int = 0, size: int = 4) -> list[Tensor | None]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 1, size, size)).astype(np.uint8)
    return list(torch.from_numpy(pixels))


@config
class TinyConfig(BackboneConfig):
    """One linear layer on all pixels."""

    size: int = option("side of an image in pixels", default=4)


class Tiny(Backbone):
    """Class tokens that are a linear map of the pixels; counts its calls."""

    embed_dim, patch_size = 6, 2

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.in_chans = config.in_chans or 1
        self.linear = nn.Linear(self.in_chans * config.size**2, self.embed_dim, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.calls: list[int] = []

    def init_weights(self) -> None:
        nn.init.normal_(self.linear.weight)

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        self.calls.append(len(images))
        # As in a sharded network, no process gets on without the others.
        collectives.all_reduce_sum(torch.zeros(1))
        cls = self.dropout(self.linear(images.flatten(1)))
        patches = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        return {"x_norm_clstoken": cls, "x_norm_patchtokens": cls[:, None].expand(-1, patches, -1)}


def tiny(seed: int = 0, **options: Any) -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Tiny(TinyConfig(**options))
        backbone.init_weights()
    return backbone


@config
class ClustersConfig(DatasetConfig):
    """Gray images of four classes, each noise around a pattern of its own."""

    count: int = option("images", default=40)
    seed: int = option("seed of the noise", default=0)
    noise: float = option("deviation of the noise", default=40.0)
    labeled: bool = option("whether there are labels", default=True)
    several: bool = option("whether each image is of the next class, too", default=False)
    there: bool = option("whether this machine has it", default=True)
    names: tuple[str, ...] = option("names of the classes", default=("a", "b", "c", "d"))


class Clusters(Dataset):
    """Built from the config above; classes are easily told apart."""

    def __init__(self, config: ClustersConfig, *, channels: int) -> None:
        if not config.there:
            raise DataError("clusters: not on this machine")
        patterns = np.random.default_rng(123).integers(0, 256, (4, channels, 4, 4))
        rng = np.random.default_rng(config.seed)
        self.labels = [index % 4 for index in range(config.count)]
        noise = rng.normal(0, config.noise, (config.count, channels, 4, 4))
        pixels = (patterns[self.labels] + noise).clip(0, 255).astype(np.uint8)
        self.images = torch.from_numpy(pixels)
        self.labeled = config.labeled
        self.several = config.several
        if config.labeled:
            target = Target("class", classes=config.names, per_object=config.several)
            self.targets = {"labels" if config.several else "label": target}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        label = self.labels[index]
        if self.several:
            return Sample(self.images[index], {"labels": torch.tensor([label, (label + 1) % 4])})
        return Sample(self.images[index], {"label": label} if self.labeled else {})

    def describe(self) -> str:
        return f"clusters, {len(self)} images"


def registry() -> Registry:
    made = Registry()
    made.add("backbone", Component("tiny", TinyConfig, Tiny), "tests", "tests")
    made.add("dataset", Component("clusters", ClustersConfig, Clusters), "tests", "tests")
    for name, evaluation, factory in (
        ("knn", KnnConfig, KnnEvaluation),
        ("logistic_regression", LogisticRegressionConfig, LogisticRegressionEvaluation),
    ):
        made.add("evaluation", Component(name, evaluation, factory), "tests", "tests")
    return made


def knn(**options: Any) -> KnnConfig:
    """k-NN on 40 and 20 clusters."""
    given = {"train": ClustersConfig(count=40), "test": ClustersConfig(count=20, seed=1)}
    return KnnConfig(**{**given, "k": (1, 5), **options})


def regression(**options: Any) -> LogisticRegressionConfig:
    """Logistic regression on 40 and 20 clusters, which it takes as they are."""
    given = {"train": ClustersConfig(count=40), "test": ClustersConfig(count=20, seed=1)}
    return LogisticRegressionConfig(**{**given, "size": 0, "c": (1e-3, 1.0), **options})


@frozen
class Labels:
    """Features [n, D] and labels, int64 [n] or bool [n, classes]."""

    features: Tensor
    labels: Tensor


def labeled(features: Any, labels: Any) -> Labels:
    return Labels(torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(labels))


def clouds(count: int, seed: int, classes: int = 5, dim: int = 8) -> Labels:
    """Overlapping clouds, so that votes are contested."""
    centers = np.random.default_rng(0).normal(0, 1, (classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return labeled(centers[labels] + rng.normal(0, 1.2, (count, dim)), labels)


def clothes(split: str, count: int) -> Labels:
    """Raw pixels of the first images of Fashion-MNIST, in 0..1."""
    data = FashionMnist(FashionMnistConfig(split=split), channels=1)
    samples = [data[index] for index in range(count)]
    pixels = torch.stack([sample.image.flatten() for sample in samples]).float() / 255
    return Labels(pixels, torch.tensor([sample.label for sample in samples]))


class FakeRun:
    """A run of four iterations whose teacher can be exchanged."""

    def __init__(self, output_dir: Path, teacher: Backbone, initial: Backbone) -> None:
        self.output_dir, self.images, self.total_iterations = output_dir, GRAY, 4
        self.is_main, self.device, self.patch_size = True, torch.device("cpu"), 2
        self.teacher, self.initial = teacher, initial
        self.built = 0
        self.config = SimpleNamespace(seed=3)

    def build(self, config: Any, **runtime: Any) -> Any:
        self.built += 1
        return registry().build(config, **runtime)

    def model(self) -> Model:
        return Model(self.teacher, GRAY, name="trained teacher")

    def initial_model(self) -> Model:
        return Model(self.initial, GRAY, name="backbone before training")
