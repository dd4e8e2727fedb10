"""Heads on backbones: their training, and evaluations of any model."""

from __future__ import annotations

from typing import ClassVar, Literal

from dinov3_framework import (
    BackboneConfig,
    BackboneTaskConfig,
    Component,
    EvaluationConfig,
    HeadConfig,
    ImagesConfig,
    ObserverConfig,
    Span,
    TransformConfig,
    config,
    hookimpl,
    option,
    positive,
)
from dinov3_framework.kinds import name_of_source
from dinov3_framework.training import TrainingConfig


@config
class TrainHeadConfig(TrainingConfig):
    """A head on a backbone that is frozen, or trained with it.

    Either ``weights`` or ``backbone`` is given. Leaves ``exports/head.safetensors``, and the
    backbone beside it if it was tuned.
    """

    weights: str | None = option(
        "weights of the backbone: a file or folder of any known format, or a published name",
        default=None,
    )
    unused: tuple[str, ...] | None = option(
        "names, or patterns with *, of tensors of the weights that may be left over", default=None
    )
    backbone: BackboneConfig | None = option(
        "a backbone as it is initialized with the recipe's seed, in place of weights", default=None
    )
    images: ImagesConfig | None = option(
        "what images are, for backbone (left out, RGB); weights know it by themselves",
        default=None,
    )
    head: HeadConfig = option("what is trained on the backbone's features")
    transform: TransformConfig = option("what becomes of images and targets on their way")
    tune_backbone: bool = option(
        "train the backbone, too; layer-wise decay of the learning rate is the optimizer's",
        default=False,
    )
    reuse_features: Literal["auto", "always", "never"] = option(
        "extract the features of each sample once, where neither the backbone changes nor the "
        "transform draws anything at random; auto: where they fit and the run makes two passes or "
        "more over the data",
        default="auto",
    )
    feature_memory: float = option(
        "GiB of memory that such features may take in each process; with feature_cache they are in "
        "files instead",
        default=4.0,
        check=positive,
    )
    feature_dtype: Literal["exact", "bf16", "fp16"] = option(
        "what such features are kept in; exact: as the backbone computes them", default="exact"
    )
    feature_cache: str | None = option(
        "folder where features of a frozen backbone are kept for other runs, those of evaluations "
        "and those that training reuses; left out, this run extracts them once",
        default=None,
    )


@config
class EvaluateConfig(BackboneTaskConfig):
    """Evaluations of a backbone with weights or as initialized, or of a head on it.

    Either ``weights`` or ``backbone`` is given. Leaves ``results.json`` and ``results.csv``, each
    number with all that changes what it means.
    """

    head: str | None = option(
        "a head that was trained on the backbone: its file, or the folder of the run", default=None
    )
    evaluations: dict[str, EvaluationConfig] = option("what is measured, by names of your choice")
    feature_cache: str | None = option(
        "folder where features are kept for other runs with these weights and data; left out, "
        "the evaluations of this run alone share them",
        default=None,
    )
    overwritten: ClassVar = ()

    def run_name(self, recipe: str) -> str:
        return "-".join([super().run_name(recipe), *name_of_source(self.head)])


@config
class EvaluateWhileTrainingConfig(ObserverConfig):
    """Evaluations of what is trained, on the way and at the end.

    Metrics have the names that the evaluation gives them; with several evaluations the name of each
    and a slash come before. At the end the trained model is compared with the same before training
    and with what any model has to beat.
    """

    every: Span = option("iterations between two evaluations", default=1000, check=positive)
    evaluations: dict[str, EvaluationConfig] = option("what is measured, by names of your choice")


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [
        Component("train_head", TrainHeadConfig, "dinov3_heads.train_head:TrainHead.task"),
        Component("evaluate", EvaluateConfig, "dinov3_heads.evaluate:Evaluate", formerly=("knn",)),
    ]


@hookimpl
def dinov3_observers() -> list[Component]:
    return [
        Component(
            "evaluate",
            EvaluateWhileTrainingConfig,
            "dinov3_heads.observer:EvaluateWhileTraining",
            formerly=("knn",),
        )
    ]
