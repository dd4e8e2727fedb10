"""What self-supervised trainings can be told; light to import."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import attrs

from dinov3_framework.configs import (
    InvalidOption,
    config,
    fraction,
    option,
    positive,
    replace,
    throughout,
)
from dinov3_framework.kinds import (
    AugmentationConfig,
    BackboneConfig,
    LossConfig,
    ObserverConfig,
    OptimizerConfig,
)
from dinov3_framework.schedules import Schedule, Span
from dinov3_framework.training import TrainingConfig


@config
class TeacherConfig:
    """The momentum teacher."""

    momentum: Schedule = option(
        "share of the old teacher that is kept: a number or a schedule", check=throughout(fraction)
    )


@config
class FrozenTeacherConfig:
    """A network that has learnt already and is only looked at."""

    weights: str = option(
        "the teacher: a file or folder of any known format, a run's folder, a URL or a published "
        "name"
    )
    network: str = option("which network of a training checkpoint is read", default="teacher")
    unused: tuple[str, ...] | None = option(
        "names, or patterns with *, of tensors of the weights that may be left over", default=None
    )
    projectors: Literal["auto", "weights", "new"] = option(
        "where its projectors come from: weights that hold them, or new ones, whose prototypes "
        "are tokens of the first batches; auto takes those of the weights if there are any",
        default="auto",
    )


@config
class AverageConfig:
    """The moving average of a student, which is what is evaluated and exported."""

    momentum: Schedule = option(
        "share of the old average that is kept: a number or a schedule", check=throughout(fraction)
    )


@config
class InitFromConfig:
    """Weights that a run starts from instead of random values.

    Names of tensors are those of a student: ``backbone.cls_token``, ``dino_head.mlp.0.weight``. A
    tensor that is both ``new`` and ``unused`` keeps its initial value though the weights have it.
    """

    weights: str = option(
        "the weights: a file or folder of any known format, a run's folder, a URL or a published "
        "name"
    )
    network: str = option("which network of a training checkpoint is read", default="teacher")
    into: Literal["both", "student", "teacher"] = option(
        "which networks of this run start from them; the other one starts at random",
        default="both",
    )
    projectors: bool = option(
        "read the losses' projectors too, which training checkpoints hold", default=False
    )
    new: tuple[str, ...] = option(
        "names, or patterns with *, of this run's tensors that the weights need not have: those "
        "they lack keep their initial values",
        default=(),
    )
    unused: tuple[str, ...] = option(
        "names, or patterns with *, of tensors of the weights that this run has no place for",
        default=(),
    )
    differing: tuple[str, ...] = option(
        "settings of the backbone, or images, in which this run may differ from the weights",
        default=(),
    )


@config
class ContinueFromConfig:
    """Another run whose training goes on here: its networks, optimizer and count of iterations.

    Names of tensors are those of a student, ``dino_head.mlp.0.weight``; its teacher and optimizer
    follow it. Anchors are not taken over: each begins as its loss says.
    """

    run: str = option("the other run's folder, its checkpoints, or one of these")
    iteration: int | None = option(
        "after which of its iterations; left out, that of its newest checkpoint",
        default=None,
        check=positive,
    )
    new: tuple[str, ...] = option(
        "names, or patterns with *, of this run's tensors that the other need not have: those it "
        "lacks keep their initial values",
        default=(),
    )
    unused: tuple[str, ...] = option(
        "names, or patterns with *, of the other's tensors that this run has no place for",
        default=(),
    )


@config
class SelfSupervisedConfig(TrainingConfig):
    """What all self-supervised trainings share: crops of images and losses."""

    augmentation: AugmentationConfig = option("how an image becomes crops and masks")
    losses: dict[str, LossConfig] = option("the objective, by names of your choice")


@config
class StudentTrainingConfig(SelfSupervisedConfig):
    """A training of one student."""

    backbone: BackboneConfig = option("the network that is trained")
    init_from: InitFromConfig | None = option(
        "weights that the networks start from; left out, they start at random", default=None
    )

    def ways_on(self, output_dir: Path) -> str:
        return f"init_from.weights={output_dir} begins with its weights"


@config
class PretrainConfig(StudentTrainingConfig):
    """Self-supervised pretraining: a student, its momentum teacher, any losses."""

    teacher: TeacherConfig = option("the momentum teacher")
    continue_from: ContinueFromConfig | None = option(
        "another run whose training goes on in this one; left out, this one begins", default=None
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.continue_from is not None and self.init_from is not None:
            raise InvalidOption(
                "continue_from",
                "and init_from both say what the networks start from; leave one of them out",
            )

    def ways_on(self, output_dir: Path) -> str:
        return f"continue_from.run={output_dir} trains on, {super().ways_on(output_dir)}"


@config
class DistillConfig(StudentTrainingConfig):
    """Distillation: a student learns from a frozen teacher, of any backbone."""

    teacher: FrozenTeacherConfig = option("the frozen teacher")
    average: AverageConfig = option("the student's moving average, which is exported")
    mask_student: bool = option(
        "hide masked patches from the student, as pretraining does; the published distillations "
        "only compare them",
        default=False,
    )


@config
class StudentConfig:
    """One of several students. What it leaves out is as the recipe says for all."""

    processes: int = option(
        "processes that train it: a number, or its part in the sum of all students' numbers where "
        "there are more or fewer processes",
        check=positive,
    )
    backbone: BackboneConfig = option("the network that is trained")
    init_from: InitFromConfig | None = option(
        "weights that it starts from; left out, it starts at random", default=None
    )
    losses: dict[str, LossConfig] | None = option(
        "its objective, whole; left out, the recipe's", default=None
    )
    optimizer: OptimizerConfig | None = option(
        "how it learns, whole; left out, the recipe's", default=None
    )
    average: AverageConfig | None = option(
        "its moving average; left out, the recipe's", default=None
    )


@config
class MultiDistillConfig(SelfSupervisedConfig):
    """Distillation of one frozen teacher into several students, each on some of the processes.

    Every student sees the whole batch.
    """

    teacher: FrozenTeacherConfig = option("the frozen teacher")
    average: AverageConfig = option("the students' moving averages, which are exported")
    mask_student: bool = option(
        "hide masked patches from the students, as pretraining does; the published distillations "
        "only compare them",
        default=False,
    )
    students: dict[str, StudentConfig] = option("who learns, by names of your choice")


@config
class RankMeConfig(ObserverConfig):
    """Watches for collapse without labels: RankMe and the deviation of class tokens.

    ``rankme`` is the effective rank of features, at most the smaller of ``images`` and the width;
    ``feature_std`` is 0 for features that are all alike, 1 for an even spread.
    """

    every: Span = option("iterations between two measurements", default=1000, check=positive)
    images: int = option(
        "samples whose first global crops are looked at", default=256, check=positive
    )
    batch_size: int = option("crops at a time", default=64, check=positive)


def of_student(config: MultiDistillConfig, name: str, output_dir: str | None) -> DistillConfig:
    """The distillation that one student of several is."""
    own = config.students[name]
    shared = {field.name: getattr(config, field.name) for field in attrs.fields(TrainingConfig)}
    if own.optimizer is not None:
        shared["optimizer"] = own.optimizer
    return DistillConfig(
        **shared | {"output_dir": output_dir, "launcher": None},
        augmentation=config.augmentation,
        losses=config.losses if own.losses is None else own.losses,
        backbone=own.backbone,
        init_from=own.init_from,
        teacher=config.teacher,
        average=config.average if own.average is None else own.average,
        mask_student=config.mask_student,
    )


def momentum(config: StudentTrainingConfig) -> Schedule:
    """What the student's moving average keeps of itself: of the momentum teacher, if it is one."""
    if isinstance(config, DistillConfig):
        return config.average.momentum
    if isinstance(config, PretrainConfig):
        return config.teacher.momentum
    raise TypeError(f"{type(config).__name__} has no moving average")


def resolved_backbone(config: StudentTrainingConfig) -> BackboneConfig:
    """The backbone's config with its input channels filled in from ``images``."""
    return replace(config.backbone, in_chans=config.images.channels)
