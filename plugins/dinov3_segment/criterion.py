"""The loss of mask classification (Mask2Former, arXiv:2112.01527).

The letters in shapes: B images, Q queries, K classes, N matched masks, P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_framework import LossResult
from dinov3_segment.configs_masks import MaskClassificationConfig
from dinov3_segment.draws import image_generators, sums
from dinov3_segment.matching import Pairs, match, matching_costs
from dinov3_segment.points import uncertain_points, values_at
from dinov3_segment.segments import Segments, segments_of


class MaskCriterion:
    """Matches queries with the true masks of each image and compares each pair.

    Of every decoder layer: the cross-entropy of classes, with ``no_object_weight`` for queries
    that stand for nothing; of the matched ones the binary cross-entropy and the Dice loss of the
    mask, at points of which most lie where the mask is uncertain.

    Sums are divided by what all processes have: by the number of true masks, and the class's by
    the sum of its weights. So a batch has the same gradient on one process and on several. (The
    published loss takes each process's own weights for the class.) Ignored pixels count nowhere:
    the published one makes them background of every mask.
    """

    def __init__(self, config: MaskClassificationConfig) -> None:
        self.config = config

    def __call__(
        self, outputs: Mapping[str, Any], masks: Tensor, ignore_index: int | None
    ) -> LossResult:
        """The loss of ``outputs`` for masks of class ids [B, H, W]; every process has to call it.

        ``outputs`` has ``pred_logits`` [B, Q, K + 1], the last for nothing, ``pred_masks``
        [B, Q, h, w], logits, and perhaps ``aux_outputs``, a list of the same of earlier layers.
        The metrics ``loss_class``, ``loss_mask`` and ``loss_dice`` are the last layer's, before
        their weights. Raises ``DataError`` for ids that are no class.
        """
        config = self.config
        layers = [*outputs.get("aux_outputs", ()), outputs]
        queries, classes = outputs["pred_logits"].shape[1:]
        truth = [segments_of(ids, classes - 1, ignore_index) for ids in masks]
        generators = image_generators(outputs["pred_masks"], "mask points")
        pairs = self._matched(layers, truth, generators)
        world, n_masks, matched, images = sums(
            [1, sum(map(len, truth)), sum(min(queries, len(t)) for t in truth), len(truth)],
            outputs["pred_masks"],
        )
        unmatched = config.no_object_weight * (images * queries - matched)
        weighed = max((matched + unmatched) / world, 1e-6)
        normal = max(n_masks / world, 1.0)
        totals = []
        for layer, found in zip(layers, pairs, strict=True):
            of_class = self._class_loss(layer["pred_logits"], truth, found) / weighed
            of_mask, of_dice = self._mask_losses(layer["pred_masks"], truth, found, generators)
            totals.append((of_class, of_mask / normal, of_dice / normal))
        weights = (config.class_weight, config.mask_weight, config.dice_weight)
        loss = torch.stack([w * each for t in totals for w, each in zip(weights, t, strict=True)])
        names = ("loss_class", "loss_mask", "loss_dice")
        last = zip(names, totals[-1], strict=True)
        return LossResult(loss.sum(), {name: value.detach() for name, value in last})

    def _matched(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        truth: Sequence[Segments],
        generators: Sequence[torch.Generator],
    ) -> list[list[Pairs]]:
        """The pairs of each image, by layer."""
        costs = [
            matching_costs(self.config, *given, segments, generator)
            for layer in layers
            for *given, segments, generator in zip(
                layer["pred_logits"], layer["pred_masks"], truth, generators, strict=True
            )
        ]
        pairs, size = match(costs), len(truth)
        return [pairs[first : first + size] for first in range(0, len(pairs), size)]

    def _class_loss(
        self, logits: Tensor, truth: Sequence[Segments], pairs: Sequence[Pairs]
    ) -> Tensor:
        """The weighed cross-entropy of classes, summed over queries [B, Q, K + 1]."""
        nothing = logits.shape[2] - 1
        wanted = torch.full(logits.shape[:2], nothing, device=logits.device)
        for row, segments, (queries, masks) in zip(wanted, truth, pairs, strict=True):
            row[queries] = torch.tensor(segments.classes, dtype=row.dtype, device=row.device)[masks]
        weights = torch.ones(nothing + 1, device=logits.device)
        weights[nothing] = self.config.no_object_weight
        return F.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), weights, reduction="sum"
        )

    def _mask_losses(
        self,
        logits: Tensor,
        truth: Sequence[Segments],
        pairs: Sequence[Pairs],
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and Dice loss of matched masks, summed over them; logits [B, Q, h, w]."""
        if not any(map(len, truth)):  # gradients are 0, and reach what they do with masks
            nothing = logits.float().sum() * 0
            return nothing, nothing
        entropies, dices = [], []
        for given, segments, (queries, masks), generator in zip(
            logits, truth, pairs, generators, strict=True
        ):
            if len(segments):
                queries = queries[masks.argsort()]  # in the order of the masks, which are larger
                known = segments.masks
                if len(masks) < len(segments):  # there are too few queries
                    known = known[masks.sort().values]
                chosen = Segments(segments.classes, known, segments.ignored)
                entropy, dice = self._compare(given[queries], chosen, generator)
                entropies.append(entropy)
                dices.append(dice)
        return torch.stack(entropies).sum(), torch.stack(dices).sum()

    def _compare(
        self, logits: Tensor, truth: Segments, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The two losses of masks' logits [N, h, w] and as many true masks, summed."""
        config = self.config
        points = uncertain_points(
            logits.detach(),
            truth.weights_at,
            generator,
            count=config.points,
            oversample=config.oversample,
            importance=config.importance,
        )
        wanted, weights = truth.at(points)
        given = values_at(logits[:, None], points)[:, 0]  # [N, P]
        entropy = F.binary_cross_entropy_with_logits(given, wanted, reduction="none") * weights
        entropy = entropy.sum(1) / weights.sum(1).clamp(min=1e-6)
        probable, true = given.sigmoid() * weights, wanted * weights
        dice = 1 - (2 * (probable * wanted).sum(1) + 1) / (probable.sum(1) + true.sum(1) + 1)
        return entropy.sum(), dice.sum()
