"""What the losses can be told."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import (
    AnchorConfig,
    Constant,
    InvalidOption,
    LossConfig,
    Schedule,
    config,
    not_negative,
    option,
    positive,
    throughout,
)


@config
class ProjectorConfig:
    """The projection head of DINO and iBOT."""

    n_prototypes: int = option("prototypes: the width of the logits", default=65536, check=positive)
    bottleneck_dim: int = option(
        "width of the normalized embedding that meets the prototypes", default=256, check=positive
    )
    hidden_dim: int = option("hidden width of the MLP", default=2048, check=positive)
    n_layers: int = option("linear layers of the MLP", default=3, check=positive)


@config
class PrototypeLossConfig(LossConfig):
    """What DINO and iBOT have in common: a student that predicts its teacher's prototypes."""

    head: ProjectorConfig = option("the projection head", factory=ProjectorConfig)
    teacher_head: ProjectorConfig | None = option(
        "of a frozen teacher, the projection head, where it differs from the student's",
        default=None,
    )
    teacher_temp: Schedule = option(
        "temperature of the teacher's logits", factory=lambda: Constant(value=0.07)
    )
    student_temp: float = option("temperature of the student's logits", default=0.1, check=positive)
    sinkhorn_iterations: int = option(
        "Sinkhorn-Knopp iterations on the teacher's logits", default=3, check=positive
    )
    chunk: int | None = option(
        "prototypes whose logits are held at a time; left out, all of them",
        default=None,
        check=positive,
    )

    def __attrs_post_init__(self) -> None:
        teacher = self.teacher_head
        if teacher is not None and teacher.n_prototypes != self.head.n_prototypes:
            raise InvalidOption(
                "teacher_head",
                f"has n_prototypes = {teacher.n_prototypes}, head has {self.head.n_prototypes}: "
                "both are compared prototype by prototype",
            )


@config
class DinoConfig(PrototypeLossConfig):
    """Cross-entropy of the student's class tokens against the teacher's, between crops.

    Each crop of the student (global and local) predicts the prototypes that the teacher sees in
    each global crop. The terms of global and local crops weigh as many pairs as they have.
    """

    local_weight: Schedule = option(
        "factor of the local crops' term; the number 0 means that local crops are not used at all",
        factory=lambda: Constant(value=1.0),
        check=throughout(not_negative),
    )
    ignore_diagonal: bool = option("leave out pairs of a global crop with itself", default=True)

    @property
    def uses_local_crops(self) -> bool:
        return self.local_weight != Constant(value=0.0)


@config
class IbotConfig(PrototypeLossConfig):
    """Cross-entropy of the student's masked patches against the same patches of the teacher.

    Each global crop counts alike, however many of its patches are masked.
    """


@config
class KoLeoConfig(LossConfig):
    """Spreads the class tokens of a batch: the log-distance of each to its nearest neighbor."""

    topk: int = option("nearest neighbors that each sample is held from", default=1, check=positive)
    distributed: bool = option(
        "look for neighbors among the samples of all processes", default=False
    )
    group_size: int | None = option(
        "with distributed: look in groups of this many consecutive samples of the global batch, a "
        "multiple of the batch per process; left out, the global batch",
        default=None,
        check=positive,
    )

    def __attrs_post_init__(self) -> None:
        if self.group_size is not None and not self.distributed:
            raise InvalidOption("group_size", "has no effect without distributed = true")


@config
class GramConfig(LossConfig):
    """Holds the similarities between the student's patches to those of an earlier teacher.

    The anchor, a frozen backbone such as an earlier momentum teacher, sees crops that may be larger
    than the student's; its features are then resized to the student's patches.
    """

    normalized: bool = option("compare cosines rather than dot products", default=True)
    image_level: bool = option(
        "compare patches within an image rather than within the batch of a process", default=True
    )
    remove_negative: bool = option(
        "set negative similarities to 0, in student and teacher", default=False
    )
    remove_only_teacher_negative: bool = option(
        "set the teacher's negative similarities to 0", default=False
    )
    tokens: Literal["all", "masked", "unmasked"] = option(
        "which patches take part; other than all needs image_level = false", default="all"
    )
    resize_antialias: bool = option(
        "low-pass the anchor's features where they are resized (bicubic)", default=False
    )
    compute_stats: bool = option(
        "also log the loss over masked and over unmasked patches", default=False
    )
    anchor: AnchorConfig | None = option(
        'the anchor and when it is refreshed; "none": the momentum teacher itself, as it is in '
        "each step, on the global crops",
        factory=AnchorConfig,
    )

    def __attrs_post_init__(self) -> None:
        if self.remove_negative and self.remove_only_teacher_negative:
            raise InvalidOption(
                "remove_only_teacher_negative",
                "contradicts remove_negative = true; choose one of the two",
            )
        if self.tokens != "all" and self.image_level:
            raise InvalidOption(
                "tokens",
                f"is {self.tokens!r}, which differs in number between images: set "
                "image_level = false as well",
            )

    @property
    def uses_masks(self) -> bool:
        return self.tokens != "all" or self.compute_stats
