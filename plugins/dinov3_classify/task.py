"""k-NN on its own: an exported or a randomly initialised backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import attrs
import torch
from attrs import frozen

from dinov3_classify.configs import KnnTaskConfig
from dinov3_classify.evaluation import KnnEvaluation
from dinov3_classify.results import print_table, write_results
from dinov3_framework import (
    Backbone,
    BackboneConfig,
    DataError,
    ImagesConfig,
    Problem,
    RecipeError,
    Registry,
    Report,
    Task,
    collectives,
    keyed_seed,
    load_backbone,
)


@frozen
class Subject:
    """The backbone that is evaluated, and the images it wants."""

    name: str
    backbone: Backbone
    images: ImagesConfig
    size: int | None  # pixels, unless the recipe says otherwise
    origin: list[tuple[str, str]]  # rows for people: where it comes from


class KnnTask(Task):
    """Evaluates one backbone, beside raw pixels, and writes results.json and results.csv."""

    def __init__(self, config: KnnTaskConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Report:
        config = self.config
        _raise(_contradictions(config))
        # Loading is the only way to know that a file is sound; an evaluation that fails after
        # hours in a queue costs more than reading it twice.
        subject = self._described() if config.weights is None else self._loaded()
        _raise(_size_problems(config, subject))
        parameters = sum(parameter.numel() for parameter in subject.backbone.parameters())
        data: list[tuple[str, str]] = []
        missing: list[str] = []
        try:
            evaluation = self._evaluation(subject)
        except DataError as error:
            missing.append(str(error))
        else:
            data = [("train", evaluation.train.describe()), ("test", evaluation.test.describe())]
        size = config.size or subject.size
        return Report(
            {
                "backbone": [*subject.origin, ("parameters", f"{parameters:,}")],
                "data": [*data, ("images", f"{size} px" if size else "as they are")],
                "evaluation": [
                    ("k", ", ".join(map(str, config.k))),
                    ("temperature", f"{config.temperature:g}"),
                    ("processes", str(world_size)),
                ],
            },
            missing,
        )

    def run(self, output_dir: Path) -> None:
        subject = self._initialised() if self.config.weights is None else self._loaded()
        evaluation = self._evaluation(subject)
        pixels = evaluation.raw_pixels()
        rows = [] if pixels is None else [pixels.row("raw pixels")]
        result = evaluation.backbone(subject.backbone, device="auto")
        rows.append(result.row(subject.name))
        if not collectives.is_main():
            return
        results: dict[str, Any] = {
            "task": "knn",
            "backbone": dict(subject.origin),
            "train": evaluation.train.describe(),
            "test": evaluation.test.describe(),
            "size": evaluation.size,
            "temperature": self.config.temperature,
            "skipped": {"train": result.train_skipped, "test": result.test_skipped},
            "knn": rows,
        }
        write_results(output_dir, results, rows)
        print_table("k-NN accuracy in percent", rows)

    # ------------------------------------------------------------------ what is evaluated
    def _loaded(self) -> Subject:
        path = str(self.config.weights)
        loaded = load_backbone(path, registry=self.registry)
        origin = [("weights", path), *sorted(loaded.provenance.items())]
        return Subject(path, loaded.backbone, loaded.images, loaded.size, origin)

    def _described(self) -> Subject:
        """The backbone to initialise, without memory for it."""
        with torch.device("meta"):
            return self._built()

    def _initialised(self) -> Subject:
        subject = self._built()
        with torch.random.fork_rng():
            torch.manual_seed(keyed_seed(self.config.seed, "knn backbone"))
            subject.backbone.init_weights()
        subject.backbone.eval()
        return subject

    def _built(self) -> Subject:
        images = self.config.images or ImagesConfig()
        config: Any = attrs.evolve(cast(Any, self.config.backbone), in_chans=images.channels)
        name = self.registry.of_config(config).component.name
        origin = [("backbone", name), ("weights", f"random, seed {self.config.seed}")]
        return Subject(
            "random-init backbone", self.registry.build(config), images, size=None, origin=origin
        )

    def _evaluation(self, subject: Subject) -> KnnEvaluation:
        size = self.config.size or subject.size
        return KnnEvaluation.build(self.config, self.registry.build, subject.images, size)


def _raise(problems: list[Problem]) -> None:
    if problems:
        raise RecipeError(problems)


def _contradictions(config: KnnTaskConfig) -> list[Problem]:
    """What can be wrong with the choice of a backbone before any file is opened."""
    weights, backbone, images = config.weights, config.backbone, config.images
    if weights is None and backbone is None:
        hint = "give weights (a path) or a [backbone] to initialise at random"
        return [Problem("weights", "there is nothing to evaluate", hint)]
    if backbone is not None and weights is None:
        return _channel_problems(backbone, images or ImagesConfig())
    problems = []
    if backbone is not None:
        message = "weights bring their own backbone"
        problems.append(Problem("backbone", message, "leave one of them out"))
    if images is not None:
        message = "weights know what images they were trained on"
        problems.append(Problem("images", message, "leave [images] out"))
    if not Path(str(weights)).exists():
        hint = "the path is relative to the current folder; training writes its own into exports/"
        problems.append(Problem("weights", f"there is no file {weights}", hint))
    return problems


def _channel_problems(backbone: BackboneConfig, images: ImagesConfig) -> list[Problem]:
    if backbone.in_chans in (None, images.channels):
        return []
    message = f"is {backbone.in_chans}, but images.channels is {images.channels}"
    hint = "set images.channels alone (with mean and std) and leave in_chans out"
    return [Problem("backbone.in_chans", message, hint)]


def _size_problems(config: KnnTaskConfig, subject: Subject) -> list[Problem]:
    patch = subject.backbone.patch_size
    if config.size is None or config.size % patch == 0:
        return []
    lower = max(config.size // patch, 1) * patch
    message = f"{config.size} px are no multiple of the backbone's patch size {patch}"
    return [Problem("size", message, f"take {lower} or {lower + patch}")]
