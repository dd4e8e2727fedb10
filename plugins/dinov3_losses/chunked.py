"""Cross-entropies over many prototypes, without ever holding all logits.

A step has thousands of rows of logits, with a column per prototype. Here they are calculated from
their embeddings, some prototypes at a time, as often as they are needed. The gradients are
calculated together with the loss: in the backward pass there are neither logits nor, where it is
sharded, a teacher that could give them again. What the prototypes of a slice get is final when it
is done, so that no sum of [K, d] in float32 is kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov3_framework import StepOutputs
from dinov3_losses.configs import PrototypeLossConfig
from dinov3_losses.numerics import RunningLogSumExp, full_precision
from dinov3_losses.sinkhorn import balance, check_temperature


@frozen
class Side:
    """What one network says: unit embeddings of B samples and the prototypes they meet."""

    embeddings: Tensor  # [B * crops, d], sample by sample
    prototypes: Tensor  # [K, d]
    temperature: float

    def scaled_logits(self, some: slice) -> Tensor:
        """Logits over temperature with some prototypes, float32 [B * crops, k]."""
        return F.linear(self.embeddings, self.prototypes[some]).float().div_(self.temperature)


@frozen
class Gradients:
    """Of the loss with respect to the student's side, those that somebody wants."""

    slices: Sequence[slice]  # of the prototypes
    embeddings: Tensor | None  # [B * crops, d], in float32: all slices add up in it
    prototypes: Tensor | None  # [K, d], in their dtype: each is calculated once

    @classmethod
    def of(cls, side: Side, slices: Sequence[slice], wanted: tuple[bool, bool]) -> Self:
        """To be added to, slice by slice."""
        return cls(
            slices,
            torch.zeros_like(side.embeddings, dtype=torch.float32) if wanted[0] else None,
            torch.empty_like(side.prototypes) if wanted[1] else None,
        )

    @property
    def wanted(self) -> bool:
        return self.embeddings is not None or self.prototypes is not None

    def add(self, side: Side, some: slice, of_logits: Tensor) -> None:
        """What some prototypes bring, given the gradient of their logits, float32 [n, k]."""
        of_logits = of_logits.to(side.embeddings.dtype)
        if self.embeddings is not None:
            self.embeddings.add_(of_logits @ side.prototypes[some])
        if self.prototypes is not None:
            torch.mm(of_logits.T, side.embeddings, out=self.prototypes[some])

    def scale(self, factor: Tensor) -> None:
        """Multiply by a number [], in place: a copy would be as large as the prototypes."""
        if self.embeddings is not None:
            self.embeddings.mul_(factor)
        if self.prototypes is not None:
            # In float32, of which there may be a copy. A factor without dimensions would count as
            # one of the prototypes' type, and be rounded to it.
            for some in self.slices:
                self.prototypes[some].mul_(factor.view(1, 1))


@frozen
class ChunkedCrossEntropy:
    """sum_st pair_weights[s, t] sum_b sample_weights[b] H(teacher's crop t of b, student's s of b).

    H is the cross-entropy against Sinkhorn-Knopp targets. Whatever has a row per token is at most
    ``chunk`` columns wide (or as wide as the embeddings).
    """

    config: PrototypeLossConfig
    chunk: int
    pair_weights: Tensor  # float32 [S, T]
    sample_weights: Tensor  # float32 [B]

    def __call__(
        self, step: StepOutputs, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of tokens [S, B, D] and [T, B, D]; and by pair [S, T], without pair weights.

        The teacher's projector runs within the student's: sharded prototypes are whole only as
        long as their module runs, and both are needed at once.
        """
        student_temp, teacher_temp = self.config.student_temp, step.value(self.config.teacher_temp)
        check_temperature(teacher_temp)
        found: list[Tensor] = []

        def calculate(
            embeddings: Tensor, prototypes: Tensor, wanted: tuple[bool, bool]
        ) -> tuple[Tensor, Gradients]:
            ours = Side(embeddings, prototypes, student_temp)
            gradients = Gradients.of(ours, self._slices(len(prototypes)), wanted)

            def against(embeddings: Tensor, prototypes: Tensor) -> Tensor:
                theirs = Side(by_sample(embeddings, teacher), prototypes, teacher_temp)
                with full_precision(embeddings):
                    return self._compare(ours, theirs, gradients)

            pairs = step.project_teacher(teacher.flatten(0, 1), against)
            found.append(pairs)
            return (self.pair_weights * pairs).sum(), gradients

        def reduce(embeddings: Tensor, prototypes: Tensor) -> Tensor:
            learns = torch.is_grad_enabled()  # what needs_input_grad does not look at
            rows = by_sample(embeddings, student)
            loss: Tensor = _WithGradients.apply(rows, prototypes, calculate, learns)
            return loss

        loss = step.project(student.flatten(0, 1), reduce)
        return loss, found[0]

    def _compare(self, ours: Side, theirs: Side, gradients: Gradients) -> Tensor:
        """The cross-entropies by pair [S, T], weighted by sample; ``gradients`` are added to."""
        n_samples = len(self.sample_weights)
        crops, teacher_crops = self.pair_weights.shape
        slices, device = gradients.slices, ours.prototypes.device
        targets_of = balance(
            theirs.scaled_logits,
            slices,
            n_samples * teacher_crops,
            device,
            self.config.sinkhorn_iterations,
        ).assign
        normalizers = RunningLogSumExp.of_nothing(n_samples * crops, device)
        for some in slices:
            normalizers.add(ours.scaled_logits(some))
        # Of the logits: probabilities less targets, as much as each pair counts.
        counts = self.sample_weights[:, None, None] * self.pair_weights / ours.temperature
        total = counts.sum(dim=-1, keepdim=True)  # [B, S, 1]
        entropies = torch.zeros_like(counts)  # [B, S, T]
        for some in slices:
            width = some.stop - some.start
            targets = targets_of(theirs.scaled_logits(some), some)
            targets = targets.view(n_samples, teacher_crops, width)
            values = normalizers.log_softmax(ours.scaled_logits(some))
            values = values.view(n_samples, crops, width)
            entropies -= values @ targets.mT
            if gradients.wanted:
                values.exp_().mul_(total).baddbmm_(counts, targets, alpha=-1)
                gradients.add(ours, some, values.flatten(0, 1))
            del targets, values  # before the next are made
        return (self.sample_weights[:, None, None] * entropies).sum(dim=0)

    def _slices(self, n_prototypes: int) -> list[slice]:
        return [
            slice(first, min(first + self.chunk, n_prototypes))
            for first in range(0, n_prototypes, self.chunk)
        ]


def by_sample(embeddings: Tensor, tokens: Tensor) -> Tensor:
    """What a projector made of tokens [crops, B, D], sample by sample: [B * crops, d]."""
    together = embeddings.view(*tokens.shape[:2], embeddings.shape[-1])
    return together.transpose(0, 1).flatten(0, 1)


Calculate = Callable[[Tensor, Tensor, tuple[bool, bool]], tuple[Tensor, Gradients]]


class _WithGradients(torch.autograd.Function):
    """The loss of embeddings [n, d] and prototypes [K, d], and gradients that are there already."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, prototypes: Tensor, calculate: Calculate, learns: bool
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2] if learns else (False, False)
        loss, ctx.gradients = calculate(embeddings, prototypes, wanted)
        ctx.dtype = embeddings.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("a chunked loss can be sent back once, even with retain_graph")
        ctx.gradients = None
        gradients.scale(upstream)
        of_embeddings = gradients.embeddings
        if of_embeddings is not None:
            of_embeddings = of_embeddings.to(ctx.dtype)
        return of_embeddings, gradients.prototypes, None, None
