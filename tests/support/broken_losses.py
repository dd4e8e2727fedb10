"""Losses that each break one promise, and the words by which the checks say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3_framework import (
    Anchor,
    Loss,
    LossConfig,
    LossResult,
    Projector,
    StepOutputs,
    config,
)


@config
class ToyLossConfig(LossConfig):
    """Config of the losses below."""


class ToyProjector(Projector):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(embed_dim, 4)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.layer.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens)


class SoundLoss(Loss):
    """The student's projected class tokens are to be the teacher's, sample by sample."""

    needs = frozenset({"student.global.class", "teacher.global.class"})

    def __init__(self, config: ToyLossConfig) -> None:
        super().__init__()

    def build_projector(self, embed_dim: int) -> Projector:
        return ToyProjector(embed_dim)

    def forward(self, step: StepOutputs) -> LossResult:
        wanted = step.project_teacher(step.teacher["global"].cls)
        difference = (step.project(step.student["global"].cls) - wanted).float().square().mean()
        return LossResult(difference, {"difference": difference.detach()})


class OwnParameters(SoundLoss):
    def __init__(self, config: ToyLossConfig) -> None:
        super().__init__(config)
        self.center = nn.Parameter(torch.zeros(4))


class MisspeltNeed(SoundLoss):
    needs = frozenset({"student.global.class", "teacher.global.clas"})


class NeedWithoutAnchor(SoundLoss):
    needs = SoundLoss.needs | {"anchor.anchor.patches"}


class NoStudent(SoundLoss):
    needs = frozenset({"teacher.global.class"})


class SetOfNeeds(SoundLoss):
    needs = {"student.global.class"}  # type: ignore[assignment]  # noqa: RUF012


class NoAnchor(SoundLoss):
    def anchor(self) -> Anchor:
        return "anchor"  # type: ignore[return-value]


class ForgetfulProjector(ToyProjector):
    def init_weights(self) -> None:
        nn.init.zeros_(self.layer.weight)


class BadProjector(SoundLoss):
    def build_projector(self, embed_dim: int) -> Projector:
        return ForgetfulProjector(embed_dim)


class NoProjector(SoundLoss):
    def build_projector(self, embed_dim: int) -> None:  # type: ignore[override]
        return None


class Undeclared(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        extra = step.student["global"].patches.float().square().mean()
        return LossResult(super().forward(step).loss + extra)


class UndeclaredView(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        return LossResult(step.student["local"].cls.mean())


class NotScalar(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        return LossResult(step.student["global"].cls.mean(-1))


class BareTensor(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        return super().forward(step).loss  # type: ignore[return-value]


class Graph(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        loss = super().forward(step).loss
        return LossResult(loss, {"kept": loss})


class DetachedLoss(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        return LossResult(super().forward(step).loss.detach())


class StopsAtTokens(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        return LossResult(step.project(step.student["global"].cls.detach()).float().mean())


class UnusedProjector(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        return LossResult(step.student["global"].cls.float().square().mean())


class WritesToTeacher(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        step.teacher["global"].cls.sub_(1)
        return super().forward(step)


class DrawsElsewhere(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        noise = float(np.random.default_rng().random())
        return LossResult(super().forward(step).loss * (1 + noise))


class Normalizes(SoundLoss):
    """Divides by the spread of the batch, which is 0 where tokens coincide."""

    sees_batch = True

    def forward(self, step: StepOutputs) -> LossResult:
        tokens = step.project(step.student["global"].cls).float()
        return LossResult((tokens / tokens.std(1, keepdim=True)).mean())


class SteepRoot(SoundLoss):
    """Finite where tokens coincide, while its gradient is not."""

    sees_batch = True

    def forward(self, step: StepOutputs) -> LossResult:
        tokens = step.project(step.student["global"].cls).float()
        return LossResult((tokens - tokens[:, :1]).square().sum().sqrt())


class FloatOnly(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        tokens = step.project(step.student["global"].cls)
        return LossResult((tokens @ torch.ones(4)).mean())


class SecretlySeesBatch(SoundLoss):
    def forward(self, step: StepOutputs) -> LossResult:
        tokens = step.project(step.student["global"].cls).float()
        return LossResult(tokens.var(1).mean())


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "own parameters": (OwnParameters, "parameters of its own.*: center"),
    "misspelt need": (MisspeltNeed, "teacher.global.clas'.*outputs class"),
    "need without anchor": (NeedWithoutAnchor, "the anchor sees nothing"),
    "no student": (NoStudent, "needs nothing of the student"),
    "set of needs": (SetOfNeeds, "needs must be a frozenset"),
    "no anchor": (NoAnchor, "must give an Anchor or None"),
    "bad projector": (BadProjector, "test_parameters: .*left 'layer.bias' without"),
    "no projector": (NoProjector, r"build_projector\(\) gives no projector"),
    "undeclared": (Undeclared, "needs do not name: student.global.patches"),
    "undeclared view": (UndeclaredView, "test_reads: raised KeyError: 'local'"),
    "not scalar": (NotScalar, "floating-point scalar"),
    "bare tensor": (BareTensor, "must give a LossResult"),
    "graph": (Graph, "'kept' holds on to the graph"),
    "detached": (DetachedLoss, "no gradient flows"),
    "stops at tokens": (StopsAtTokens, "no gradient reaches the student's tokens"),
    "unused projector": (UnusedProjector, "student's projector.layer.bias, projector.layer.weight"),
    "writes to teacher": (WritesToTeacher, "writes into features.*teacher.global.class"),
    "draws elsewhere": (DrawsElsewhere, "for the same features and the same seed"),
    "normalizes": (Normalizes, "test_equal_tokens: the loss is nan"),
    "steep root": (SteepRoot, "test_equal_tokens: a gradient is not finite"),
    "float only": (FloatOnly, "test_bfloat16: raised RuntimeError"),
    "secretly sees batch": (SecretlySeesBatch, "then sees_batch must be True"),
}
