"""The settings of a training run that belong to the engine; light to import."""

from __future__ import annotations

import re
from typing import Literal

from dinov3_framework.configs import (
    AugmentationConfig,
    BackboneConfig,
    DatasetConfig,
    ImagesConfig,
    InvalidOption,
    LossConfig,
    ObserverConfig,
    TaskConfig,
    config,
    fraction,
    not_negative,
    option,
    positive,
    replace,
)
from dinov3_framework.schedules import Schedule


@config
class OptimizerConfig:
    """AdamW and its schedules."""

    lr: Schedule = option("learning rate, before scaling: a number or a schedule")
    lr_scaling: Literal["none", "sqrt_wrt_1024", "linear_wrt_256"] = option(
        "how the learning rate grows with the global batch: 4 sqrt(batch / 1024), batch / 256",
        default="none",
    )
    freeze_last_layer: int = option(
        "iterations in which prototypes do not learn", default=0, check=not_negative
    )
    weight_decay: Schedule = option("weight decay: a number or a schedule")
    betas: tuple[float, float] = option("AdamW's betas", default=(0.9, 0.999))
    clip_grad: float | None = option(
        'largest gradient norm of each network; "none": no clipping', default=3.0, check=positive
    )
    layerwise_decay: float = option(
        "factor of the learning rate from a layer to the one below", default=0.9, check=fraction
    )
    patch_embed_lr_mult: float = option(
        "factor of the patch embedding's learning rate", default=0.2, check=not_negative
    )


@config
class TeacherConfig:
    """The momentum teacher."""

    momentum: Schedule = option("share of the old teacher that is kept: a number or a schedule")


@config
class FrozenTeacherConfig:
    """A network that has learnt already and is only looked at."""

    weights: str = option(
        "the teacher: a file or folder of any known format, a run's folder, a URL or a published "
        "name"
    )
    network: Literal["teacher", "student"] = option(
        "which network of a training checkpoint is read", default="teacher"
    )
    projectors: Literal["auto", "weights", "new"] = option(
        "where its projectors come from: weights that hold them, or new ones, whose prototypes "
        "are tokens of the first batches; auto takes those of the weights if there are any",
        default="auto",
    )


@config
class AverageConfig:
    """The moving average of a student, which is what is evaluated and exported."""

    momentum: Schedule = option("share of the old average that is kept: a number or a schedule")


@config
class LoaderConfig:
    """How batches are made."""

    workers: int = option("loader processes per training process", default=8, check=not_negative)
    prefetch: int = option("batches that each worker makes ahead", default=2, check=positive)
    timeout: float = option(
        "seconds to wait for a batch before the run ends", default=300.0, check=positive
    )
    max_corrupt: int = option(
        "undecodable samples, counted per process, after which the run ends",
        default=1000,
        check=not_negative,
    )


def _expression(value: str) -> str | None:
    try:
        re.compile(value)
    except re.error as error:
        return f"is no regular expression ({error}): {value!r}"
    return None


@config
class ParallelConfig:
    """Devices, precision, sharding, and what is traded between memory and speed."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "where to compute; auto takes CUDA where there is one", default="auto"
    )
    param_dtype: Literal["fp32", "bf16"] = option(
        "type that parameters are gathered in for forward and backward", default="fp32"
    )
    reduce_dtype: Literal["fp32", "bf16"] = option(
        "type that gradients are reduced in", default="fp32"
    )
    replicas: int = option(
        "groups of processes that each hold all of a network, whose parameters are spread over "
        "the processes of a group",
        default=1,
        check=positive,
    )
    checkpointing: Literal["none", "selective", "full"] = option(
        "what the backward pass computes anew of each block of the backbone, to save memory: "
        "nothing, all but matrix products, convolutions and attention, or everything",
        default="none",
    )
    compile: bool = option("compile each block of the backbone (torch.compile)", default=False)
    fp8: Literal["off", "on", "emulated"] = option(
        "multiply in float8 in linear layers of the backbone; emulated gives the same rounding "
        "on any device, slowly",
        default="off",
    )
    fp8_filter: str = option(
        "regular expression that is found in the names, within the backbone, of the linear "
        "layers that fp8 concerns",
        default="blocks",
        check=_expression,
    )
    timeout: float = option(
        "seconds after which a collective that somebody missed ends the run",
        default=600.0,
        check=positive,
    )


@config
class CheckpointConfig:
    """What is kept of a run while it goes on."""

    every: int = option("iterations between checkpoints", default=1000, check=positive)
    keep: int = option("how many of the newest to keep", default=3, check=positive)
    keep_every: int | None = option(
        "iterations between those that are kept for good", default=None, check=positive
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
    network: Literal["teacher", "student"] = option(
        "which network of a training checkpoint is read", default="teacher"
    )
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
class RunConfig(TaskConfig):
    """What all trainings share: crops of images, losses, an optimizer."""

    iterations: int = option("optimizer steps of the run", check=positive)
    batch_size: int = option("images of one optimizer step, over all processes", check=positive)
    accumulation_steps: int = option(
        "passes that a process splits its share of the batch into", default=1, check=positive
    )
    dataset: DatasetConfig = option("where the images come from")
    images: ImagesConfig = option("channels and normalisation", factory=ImagesConfig)
    augmentation: AugmentationConfig = option("how an image becomes crops and masks")
    losses: dict[str, LossConfig] = option("the objective, by names of your choice")
    optimizer: OptimizerConfig = option("how the student learns")
    loader: LoaderConfig = option("how batches are made", factory=LoaderConfig)
    parallel: ParallelConfig = option("devices, precision, sharding", factory=ParallelConfig)
    checkpoint: CheckpointConfig = option("what is saved when", factory=CheckpointConfig)
    observers: dict[str, ObserverConfig] = option(
        "what watches the run, by names of your choice", factory=dict
    )
    log_every: int = option("iterations between lines of metrics.jsonl", default=10, check=positive)
    max_nonfinite_steps: int = option(
        "steps in a row that may be skipped for a NaN or inf before the run ends",
        default=3,
        check=not_negative,
    )


@config
class TrainingConfig(RunConfig):
    """A training of one student."""

    backbone: BackboneConfig = option("the network that is trained")
    init_from: InitFromConfig | None = option(
        "weights that the networks start from; left out, they start at random", default=None
    )


@config
class PretrainConfig(TrainingConfig):
    """Self-supervised pretraining: a student, its momentum teacher, any losses."""

    teacher: TeacherConfig = option("the momentum teacher")
    continue_from: ContinueFromConfig | None = option(
        "another run whose training goes on in this one; left out, this one begins", default=None
    )

    def __attrs_post_init__(self) -> None:
        if self.continue_from is not None and self.init_from is not None:
            raise InvalidOption(
                "continue_from",
                "and init_from both say what the networks start from; leave one of them out",
            )


@config
class DistillConfig(TrainingConfig):
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
class MultiDistillConfig(RunConfig):
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


def of_student(config: MultiDistillConfig, name: str, output_dir: str | None) -> DistillConfig:
    """The distillation that one student of several is."""
    student = config.students[name]
    return DistillConfig(
        output_dir=output_dir,
        seed=config.seed,
        iterations=config.iterations,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        dataset=config.dataset,
        images=config.images,
        augmentation=config.augmentation,
        backbone=student.backbone,
        init_from=student.init_from,
        losses=config.losses if student.losses is None else student.losses,
        teacher=config.teacher,
        average=config.average if student.average is None else student.average,
        mask_student=config.mask_student,
        optimizer=config.optimizer if student.optimizer is None else student.optimizer,
        loader=config.loader,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        observers=config.observers,
        log_every=config.log_every,
        max_nonfinite_steps=config.max_nonfinite_steps,
    )


def momentum(config: TrainingConfig) -> Schedule:
    """What the student's moving average keeps of itself: of the momentum teacher, if it is one."""
    if isinstance(config, DistillConfig):
        return config.average.momentum
    if isinstance(config, PretrainConfig):
        return config.teacher.momentum
    raise TypeError(f"{type(config).__name__} has no moving average")


def resolved_backbone(config: TrainingConfig) -> BackboneConfig:
    """The backbone's config with its input channels filled in from ``images``."""
    return replace(config.backbone, in_chans=config.images.channels)
