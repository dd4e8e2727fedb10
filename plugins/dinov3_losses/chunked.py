"""Cross-entropies over many prototypes, without ever holding all logits.

A row of logits has a column per prototype, and a step has thousands of rows. Here they are
calculated from their embeddings a slice at a time, as often as they are needed. The gradients are
calculated together with the loss: in the backward pass there are neither logits nor, where it is
sharded, a teacher that could give them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov3_framework import StepOutputs
from dinov3_losses.configs import PrototypeLossConfig
from dinov3_losses.precision import full_precision
from dinov3_losses.sinkhorn import balance, check_temperature


@frozen
class Side:
    """What one network says: unit embeddings of B samples and the prototypes they meet."""

    embeddings: Tensor  # [B, crops, d]
    prototypes: Tensor  # [K, d]
    temperature: float

    @classmethod
    def of(cls, tokens: Tensor, embeddings: Tensor, prototypes: Tensor, temperature: float) -> Self:
        """Of what a projector made of tokens [crops, B, D]."""
        by_sample = embeddings.unflatten(0, tokens.shape[:2]).transpose(0, 1)
        return cls(by_sample, prototypes, temperature)

    def scaled_logits(self, embeddings: Tensor) -> Tensor:
        """Logits over temperature of some embeddings [n, d], float32 [n, K]."""
        return F.linear(embeddings, self.prototypes).float().div_(self.temperature)

    def slices(self, rows: int) -> Iterator[Tensor]:
        """The same of all embeddings, so many rows at a time."""
        for some in self.embeddings.flatten(0, 1).split(rows):
            if len(some):
                yield self.scaled_logits(some)


@frozen
class Gradients:
    """Of the loss with respect to the student's side, those that somebody wants."""

    embeddings: Tensor | None  # [B, crops, d], in their dtype: each row is calculated once
    prototypes: Tensor | None  # [K, d], in float32: all slices add up in it

    @classmethod
    def zeros(cls, side: Side, wanted: tuple[bool, bool]) -> Gradients:
        return cls(
            torch.zeros_like(side.embeddings) if wanted[0] else None,
            torch.zeros_like(side.prototypes, dtype=torch.float32) if wanted[1] else None,
        )

    @property
    def wanted(self) -> bool:
        return self.embeddings is not None or self.prototypes is not None

    def add(self, side: Side, where: tuple[slice, slice], of_logits: Tensor) -> None:
        """What some rows bring, given the gradient of their logits, float32 [n, K]."""
        embeddings = side.embeddings[where]
        if self.embeddings is not None:
            gradient = of_logits.to(embeddings.dtype) @ side.prototypes
            self.embeddings[where] = gradient.view(embeddings.shape)
        if self.prototypes is not None:
            self.prototypes.addmm_(of_logits.T, embeddings.flatten(0, 1).float())


@frozen
class ChunkedCrossEntropy:
    """sum_st pair_weights[s, t] sum_b sample_weights[b] H(teacher's crop t of b, student's s of b).

    H is the cross-entropy against Sinkhorn-Knopp targets. Whatever has a column per prototype is
    at most ``chunk`` rows high (or as many as the teacher has crops, if that is more).
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
            ours = Side.of(student, embeddings, prototypes, student_temp)
            gradients = Gradients.zeros(ours, wanted)

            def against(embeddings: Tensor, prototypes: Tensor) -> Tensor:
                theirs = Side.of(teacher, embeddings, prototypes, teacher_temp)
                with full_precision(embeddings):
                    return self._compare(ours, theirs, gradients)

            pairs = step.project_teacher(teacher.flatten(0, 1), against)
            found.append(pairs)
            return (self.pair_weights * pairs).sum(), gradients

        def reduce(embeddings: Tensor, prototypes: Tensor) -> Tensor:
            learns = torch.is_grad_enabled()  # what needs_input_grad does not look at
            loss: Tensor = _WithGradients.apply(embeddings, prototypes, calculate, learns)
            return loss

        loss = step.project(student.flatten(0, 1), reduce)
        return loss, found[0]

    def _compare(self, ours: Side, theirs: Side, gradients: Gradients) -> Tensor:
        """The cross-entropies by pair [S, T], weighted by sample; ``gradients`` are added to."""
        targets_of = balance(
            lambda: theirs.slices(self.chunk),
            len(theirs.prototypes),
            theirs.prototypes.device,
            self.config.sinkhorn_iterations,
        ).assign
        pairs = torch.zeros_like(self.pair_weights)
        for samples, groups in self._slices():
            weights = self.sample_weights[samples, None, None]
            seen = theirs.embeddings[samples]
            targets = targets_of(theirs.scaled_logits(seen.flatten(0, 1)))
            targets = targets.view(*seen.shape[:2], -1)  # [b, T, K]
            for crops in groups:
                embeddings = ours.embeddings[samples, crops]
                logits = ours.scaled_logits(embeddings.flatten(0, 1))
                values = F.log_softmax(logits, dim=-1).view(*embeddings.shape[:2], -1)  # [b, s, K]
                del logits
                pairs[crops] -= (weights * (values @ targets.mT)).sum(dim=0)
                if gradients.wanted:
                    # Of the logits: probabilities less targets, as much as each pair counts.
                    counts = weights * self.pair_weights[crops]  # [b, s, T]
                    values.exp_().mul_(counts.sum(dim=-1, keepdim=True))
                    values.baddbmm_(counts, targets, alpha=-1).div_(ours.temperature)
                    gradients.add(ours, (samples, crops), values.flatten(0, 1))
                del values  # before the next are made
            del targets
        return pairs

    def _slices(self) -> Iterator[tuple[slice, list[slice]]]:
        """Samples whose targets are held together, and the student's crops that are, by turns."""
        crops, teacher_crops = self.pair_weights.shape
        n_samples = len(self.sample_weights)
        samples = max(1, min(self.chunk // teacher_crops, n_samples))
        group = max(1, self.chunk // samples)
        groups = [slice(first, first + group) for first in range(0, crops, group)]
        for first in range(0, n_samples, samples):
            yield slice(first, first + samples), groups


Calculate = Callable[[Tensor, Tensor, tuple[bool, bool]], tuple[Tensor, Gradients]]


class _WithGradients(torch.autograd.Function):
    """The loss of embeddings [n, d] and prototypes [K, d], and gradients that are there already."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, prototypes: Tensor, calculate: Calculate, learns: bool
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2] if learns else (False, False)
        loss, ctx.gradients = calculate(embeddings, prototypes, wanted)
        ctx.shape, ctx.dtype = embeddings.shape, prototypes.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("a chunked loss can be sent back once, even with retain_graph")
        # In place, and not kept: a copy would be as large as the prototypes.
        ctx.gradients = None
        embeddings, prototypes = gradients.embeddings, gradients.prototypes
        if embeddings is not None:
            embeddings = embeddings.mul_(upstream).transpose(0, 1).reshape(ctx.shape)
        if prototypes is not None:
            prototypes = prototypes.mul_(upstream).to(ctx.dtype)
        return embeddings, prototypes, None, None
