"""Gram anchoring: patch similarities are held to those of an earlier teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dinov3_framework import Anchor, Loss, LossResult, StepOutputs, UserError, ViewFeatures
from dinov3_losses.configs import GramConfig
from dinov3_losses.numerics import full_precision


class GramLoss(Loss):
    """The DINOv3 paper, section 4: the mean squared difference of Gram matrices of patches."""

    def __init__(self, config: GramConfig) -> None:
        super().__init__()
        self.config = config
        self.sees_batch = not config.image_level
        anchor = "teacher.global.patches" if config.anchor is None else "anchor.anchor.patches"
        needs = {"student.global.patches", anchor}
        if config.uses_masks:
            needs.add("masks")
        self.needs = frozenset(needs)

    def anchor(self) -> Anchor | None:
        return None if self.config.anchor is None else Anchor(config=self.config.anchor)

    def forward(self, step: StepOutputs) -> LossResult:
        """Metrics with ``compute_stats``: ``masked`` and ``unmasked``, over those patches alone."""
        config, masks = self.config, step.masks
        held_to = step.teacher["global"] if config.anchor is None else step.anchor
        if held_to is None:
            raise UserError("the gram loss needs an anchor, and this step has none")
        if config.uses_masks and masks is None:
            raise UserError("the gram loss as configured needs masks, and the step has none")
        student = step.student["global"]
        patches = student.patches.flatten(0, 1)  # [G * B, P, D]
        with full_precision(patches):
            anchor = fit_anchor(held_to, student, config.resize_antialias).flatten(0, 1)
            chosen: tuple[Tensor, Tensor] = (patches, anchor)
            if masks is not None and config.tokens != "all":
                rows = _rows(step, masks, config.tokens == "masked")
                chosen = (_select(patches, rows), _select(anchor, rows))
            elif not config.image_level:
                chosen = (patches.flatten(0, 1), anchor.flatten(0, 1))
            loss = self._loss(*chosen)
            metrics = {}
            if masks is not None and config.compute_stats:
                patches = patches.detach()
                for name in ("masked", "unmasked"):
                    rows = _rows(step, masks, name == "masked")
                    metrics[name] = self._loss(_select(patches, rows), _select(anchor, rows))
        return LossResult(loss, metrics)

    def _loss(self, student: Tensor, anchor: Tensor) -> Tensor:
        return gram_loss(
            student,
            anchor,
            normalized=self.config.normalized,
            remove_negative=self.config.remove_negative,
            remove_only_teacher_negative=self.config.remove_only_teacher_negative,
        )


def _rows(step: StepOutputs, masks: Tensor, masked: bool) -> Tensor:
    """The masked patches among all of the global crops, or the others: int64, ascending."""
    rows = step.masked_patches()
    if masked:
        return rows
    # A stable sort puts those that are not masked first, and asks the device for no number.
    return masks.flatten().argsort(stable=True)[: masks.numel() - len(rows)]


def _select(patches: Tensor, rows: Tensor) -> Tensor:
    """Some of the patches [G * B, P, D]: [M, D]."""
    return patches.flatten(0, 1).index_select(0, rows)


def gram_loss(
    student: Tensor,
    target: Tensor,
    *,
    normalized: bool = True,
    remove_negative: bool = False,
    remove_only_teacher_negative: bool = False,
) -> Tensor:
    """Mean squared difference of the Gram matrices of features [N, D], or of each of [B, N, D].

    Calculated in float32; without gradient to ``target``; 0 where there are no features.
    """
    student, target = student.float(), target.detach().float()
    if normalized:
        student, target = F.normalize(student, dim=-1), F.normalize(target, dim=-1)
    similarities, wanted = student @ student.mT, target @ target.mT
    if remove_negative:
        similarities = similarities.relu()
    if remove_negative or remove_only_teacher_negative:
        wanted = wanted.relu()
    return F.mse_loss(similarities, wanted, reduction="sum") / max(wanted.numel(), 1)


def fit_anchor(anchor: ViewFeatures, student: ViewFeatures, antialias: bool) -> Tensor:
    """The anchor's patches on the student's grid, resized where the grids differ: [G, B, P, D]."""
    patches = anchor.patches
    if patches.shape[:2] != student.patches.shape[:2]:
        raise UserError(
            f"the gram loss compares global crops with anchor crops of the same images: there are "
            f"{student.patches.shape[0]} global and {patches.shape[0]} anchor crops of "
            f"{student.patches.shape[1]} and {patches.shape[1]} samples"
        )
    if anchor.grid == student.grid:
        return patches
    crops, samples, _, dim = patches.shape
    maps = patches.float().mT.reshape(crops * samples, dim, *anchor.grid)
    resized = F.interpolate(
        maps, student.grid, mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized.view(crops, samples, dim, -1).mT
