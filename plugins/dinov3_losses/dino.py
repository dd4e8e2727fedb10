"""The DINO loss: class tokens of crops against the teacher's class tokens of global crops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_framework import Loss, LossResult, Projector, StepOutputs, UserError
from dinov3_losses.chunked import ChunkedCrossEntropy
from dinov3_losses.configs import DinoConfig
from dinov3_losses.numerics import full_precision
from dinov3_losses.projector import PrototypeProjector
from dinov3_losses.sinkhorn import sinkhorn_knopp

Combine = Callable[[Tensor], LossResult]


class DinoLoss(Loss):
    """Caron et al. 2021; with Sinkhorn-Knopp targets and pairs counted as in DINOv2 and DINOv3."""

    sees_batch = True  # through Sinkhorn-Knopp

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        needs = {"student.global.class", "teacher.global.class"}
        if config.uses_local_crops:
            needs.add("student.local.class")
        self.needs = frozenset(needs)

    def build_projector(self, embed_dim: int) -> Projector:
        return PrototypeProjector(self.config.head, embed_dim)

    def build_teacher_projector(self, embed_dim: int) -> Projector:
        return PrototypeProjector(self.config.teacher_head or self.config.head, embed_dim)

    def forward(self, step: StepOutputs) -> LossResult:
        """Metrics: ``global`` and ``local``, the mean cross-entropy of each kind of pair."""
        config = self.config
        seen = [step.student["global"].cls]
        if config.uses_local_crops and "local" in step.student:
            seen.append(step.student["local"].cls)
        crops = torch.cat(seen)  # [global + local crops, B, D]
        teacher = step.teacher["global"].cls  # [T, B, D]
        combine = partial(
            self._combine, n_global=len(seen[0]), local_weight=step.value(config.local_weight)
        )
        if config.chunk is not None:
            return self._chunked(step, crops, teacher, combine, config.chunk)
        logits = step.project(crops.flatten(0, 1)).view(*crops.shape[:2], -1)
        targets = sinkhorn_knopp(
            step.project_teacher(teacher.flatten(0, 1)),
            step.value(config.teacher_temp),
            config.sinkhorn_iterations,
        ).view(*teacher.shape[:2], -1)
        with full_precision(logits):
            return combine(cross_entropies(logits, targets, config.student_temp) / crops.shape[1])

    def _chunked(
        self, step: StepOutputs, crops: Tensor, teacher: Tensor, combine: Combine, chunk: int
    ) -> LossResult:
        """The same with the logits of ``chunk`` prototypes at a time."""
        # The loss is linear in its pairs, so that its gradient anywhere is how much each weighs.
        with torch.enable_grad():
            pairs = torch.zeros(len(crops), len(teacher), device=crops.device, requires_grad=True)
            (weights,) = torch.autograd.grad(combine(pairs).loss, pairs)
        n_samples = crops.shape[1]
        each = torch.full((n_samples,), 1 / n_samples, device=crops.device)
        entropy = ChunkedCrossEntropy(self.config, chunk, weights, each)
        loss, pairs = entropy(step, crops, teacher)
        return LossResult(loss, combine(pairs).metrics)

    def _combine(self, pairs: Tensor, n_global: int, local_weight: float) -> LossResult:
        """The loss from the mean cross-entropies of (student crop, teacher crop) pairs."""
        global_pairs, local_pairs = pairs[:n_global], pairs[n_global:]
        n_global_pairs, n_local_pairs = global_pairs.numel(), local_pairs.numel()
        if self.config.ignore_diagonal:
            same = torch.eye(*global_pairs.shape, dtype=torch.bool, device=pairs.device)
            global_pairs = global_pairs.masked_fill(same, 0)
            n_global_pairs -= min(global_pairs.shape)
        n_pairs = n_global_pairs + n_local_pairs
        if n_pairs == 0:
            raise UserError(
                "the dino loss has no pair of crops to compare: give the augmentation at least two "
                "global crops or some local crops, or set ignore_diagonal = false"
            )
        loss = (global_pairs.sum() + local_weight * local_pairs.sum()) / n_pairs
        metrics = {}
        if n_global_pairs:
            metrics["global"] = global_pairs.detach().sum() / n_global_pairs
        if n_local_pairs:
            metrics["local"] = local_pairs.detach().sum() / n_local_pairs
        return LossResult(loss, metrics)


def cross_entropies(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each (student crop, teacher crop) pair, summed over samples: [S, T].

    ``logits`` are the student's [S, B, K], ``targets`` the teacher's probabilities [T, B, K].
    """
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    return -log_probabilities.flatten(1) @ targets.flatten(1).T
