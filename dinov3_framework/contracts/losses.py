"""Terms of a self-supervised objective.

The letters in shapes: B samples, G crops of a view, P patches, R storage tokens, D width.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping

import attrs
from torch import Tensor, nn

from dinov3_framework.configs import AnchorConfig
from dinov3_framework.contracts.data import Augmentation
from dinov3_framework.contracts.networks import LossResult, Projector
from dinov3_framework.errors import Problem
from dinov3_framework.schedules import Schedule


@attrs.frozen
class ViewFeatures:
    """What one network said of one view, crops apart from samples."""

    cls: Tensor  # [G, B, D]
    storage: Tensor  # [G, B, R, D]
    patches: Tensor  # [G, B, P, D]
    grid: tuple[int, int]  # patches along height and width


@attrs.frozen
class Anchor:
    """A frozen backbone that a loss wants to be held to.

    It sees the view ``view``; ``config`` says where it comes from and when it is refreshed: with
    ``period``, after every iteration whose number (from 1) is a multiple of it from
    ``first_refresh`` on, at most ``max_refreshes`` times. While there is none yet (``start``) the
    loss is left out.
    """

    view: str = "anchor"
    config: AnchorConfig = attrs.field(factory=AnchorConfig)


@attrs.frozen
class StepOutputs:
    """All that a loss may look at in one step."""

    iteration: int
    total_iterations: int
    student: Mapping[str, ViewFeatures]
    teacher: Mapping[str, ViewFeatures]
    anchor: ViewFeatures | None  # of the anchor that this loss asked for
    masks: Tensor | None  # bool [G, B, P], of the global crops
    # This loss's projector in the student; what else it is given goes to the projector too.
    project: Callable[..., Tensor]
    project_teacher: Callable[..., Tensor]  # and in the teacher, without gradient
    masked: Tensor | None = None  # int64 [M]: the masked ones among the G * B * P patches

    def masked_patches(self) -> Tensor:
        """The masked ones among the G * B * P patches of ``masks``, int64 [M], ascending.

        The loader counts them beforehand: to ask the device would wait for it.
        """
        if self.masks is None:
            raise ValueError("this step has no masks")
        if self.masked is not None:
            return self.masked
        return self.masks.flatten().nonzero().squeeze(1)

    def value(self, schedule: Schedule) -> float:
        """A schedule's value in this step."""
        return schedule.at(self.iteration, self.total_iterations)


class Loss(nn.Module, abc.ABC):
    """A term of the objective.

    It has no parameters of its own, only buffers, which are checkpointed: what is to be trained
    belongs into its projector. ``needs`` names what it reads, as ``network.view.output``, with
    networks student, teacher and anchor and outputs class, storage and patches, or ``masks``; the
    engine refuses a recipe that does not offer it, and computes nothing that no loss needs.
    """

    needs: frozenset[str] = frozenset()
    # Whether halves of a batch give other values than the batch (said when accumulating).
    sees_batch: bool = False

    def build_projector(self, embed_dim: int) -> Projector | None:
        """A new projector for tokens of width ``embed_dim``; the engine calls it for each network.

        In state dicts it is ``<name of the loss in the recipe>_head``.
        """
        return None

    def build_teacher_projector(self, embed_dim: int) -> Projector | None:
        """The projector of a frozen teacher of width ``embed_dim``, for a distillation."""
        return self.build_projector(embed_dim)

    def anchor(self) -> Anchor | None:
        """The anchor this loss wants, if any."""
        return None

    @abc.abstractmethod
    def forward(self, step: StepOutputs) -> LossResult: ...


OUTPUTS = ("class", "storage", "patches")
# The views each network may be asked for; anchors see the view their loss names.
STUDENT_VIEWS = ("global", "local")
TEACHER_VIEWS = ("global",)


def check_needs(losses: Mapping[str, Loss], augmentation: Augmentation) -> list[Problem]:
    """What the losses need and this augmentation does not offer."""
    problems = []
    for name, loss in losses.items():
        anchor = loss.anchor()
        offered = {"student": STUDENT_VIEWS, "teacher": TEACHER_VIEWS}
        offered["anchor"] = (anchor.view,) if anchor is not None else ()
        for need in sorted(loss.needs):
            if complaint := _unmet(need, offered, augmentation):
                problems.append(Problem(f"losses.{name}", f"needs {need!r}: {complaint}"))
    return problems


def _unmet(
    need: str, offered: Mapping[str, tuple[str, ...]], augmentation: Augmentation
) -> str | None:
    if need == "masks":
        return None if augmentation.makes_masks else "the augmentation makes no masks"
    network, _, rest = need.partition(".")
    view, _, output = rest.partition(".")
    if network not in offered or output not in OUTPUTS:
        return (
            "a need is 'masks' or network.view.output, of networks "
            f"{', '.join(offered)} and outputs {', '.join(OUTPUTS)}"
        )
    if view not in offered[network]:
        return f"the {network} sees {', '.join(offered[network]) or 'nothing'}"
    if view not in augmentation.views or augmentation.views[view].crops == 0:
        return f"the augmentation makes {', '.join(augmentation.views)} crops only"
    return None
