"""The iBOT loss: masked patches of the student against the teacher's, who sees them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_framework import Loss, LossResult, Projector, StepOutputs, UserError
from dinov3_losses.chunked import ChunkedCrossEntropy
from dinov3_losses.configs import IbotConfig
from dinov3_losses.numerics import full_precision
from dinov3_losses.projector import PrototypeProjector
from dinov3_losses.sinkhorn import sinkhorn_knopp


class IbotLoss(Loss):
    """Zhou et al. 2022, "iBOT", with Sinkhorn-Knopp targets and a projector of its own."""

    sees_batch = True  # through Sinkhorn-Knopp

    def __init__(self, config: IbotConfig) -> None:
        super().__init__()
        self.config = config
        self.needs = frozenset({"student.global.patches", "teacher.global.patches", "masks"})

    def build_projector(self, embed_dim: int) -> Projector:
        return PrototypeProjector(self.config.head, embed_dim)

    def build_teacher_projector(self, embed_dim: int) -> Projector:
        return PrototypeProjector(self.config.teacher_head or self.config.head, embed_dim)

    def forward(self, step: StepOutputs) -> LossResult:
        """The mean over global crops of the mean cross-entropy of a crop's masked patches.

        A crop without masked patches counts as 0. A process without any runs both projectors all
        the same, as sharded ones want, and takes part in Sinkhorn-Knopp.
        """
        config, masks = self.config, step.masks
        if masks is None:
            raise UserError("the ibot loss needs masks, and the augmentation made none")
        rows = step.masked_patches()
        student = _select(step.student["global"].patches, rows)
        teacher = _select(step.teacher["global"].patches, rows)
        weights = patch_weights(masks, rows)
        if config.chunk is not None:
            # The patches are samples of which each network has one crop, so that there is one pair.
            alone = torch.ones(1, 1, device=weights.device)
            entropy = ChunkedCrossEntropy(config, config.chunk, alone, weights)
            return LossResult(entropy(step, student[None], teacher[None])[0])
        logits = step.project(student)
        targets = sinkhorn_knopp(
            step.project_teacher(teacher),
            step.value(config.teacher_temp),
            config.sinkhorn_iterations,
        )
        with full_precision(logits):
            losses = -(targets * F.log_softmax(logits.float() / config.student_temp, dim=-1)).sum(1)
            return LossResult((losses * weights).sum())


def _select(patches: Tensor, rows: Tensor) -> Tensor:
    """Some of the patches [G, B, P, D]: [M, D]."""
    return patches.flatten(0, 2).index_select(0, rows)


def patch_weights(masks: Tensor, rows: Tensor) -> Tensor:
    """The weight of each masked patch, [M], that makes all crops count alike; sum at most 1."""
    crop_of_row = rows // masks.shape[-1]
    masked = masks.flatten(0, -2).sum(dim=-1)  # [G * B]
    return 1 / (masked[crop_of_row] * masked.numel()).float()
