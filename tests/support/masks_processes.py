"""What the processes of a test of mask classification do, and its made-up batch."""

from __future__ import annotations

from typing import Any

import torch
from dinov3_segment.configs_masks import MaskClassificationConfig
from dinov3_segment.criterion import MaskCriterion
from torch import Tensor

from dinov3_framework import collectives

CLASSES, QUERIES = 5, 7
_PARTS = (2, 1)  # images of each process


def made_up_outputs(batch: int = 2, side: int = 8, layers: int = 3, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return (3 * torch.randn(shape, generator=generator)).requires_grad_()

    made = [
        {
            "pred_logits": drawn(batch, QUERIES, CLASSES + 1),
            "pred_masks": drawn(batch, QUERIES, side, side),
        }
        for _ in range(layers)
    ]
    return {**made[-1], "aux_outputs": made[:-1]}


def made_up_masks(batch: int = 2, side: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, CLASSES, (batch, 4, 4), generator=generator)
    return coarse.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)


def leaves(outputs: Any) -> list[Tensor]:
    layers = [*outputs["aux_outputs"], outputs]
    return [layer[name] for layer in layers for name in ("pred_logits", "pred_masks")]


def loss_of_part() -> dict[str, Any]:
    """The loss of this process's part of three images, and the gradient of it."""
    rank = collectives.rank()
    outputs, masks = made_up_outputs(sum(_PARTS)), made_up_masks(sum(_PARTS))
    masks[0] = 2  # one mask, where others have several
    first = sum(_PARTS[:rank])
    rows = slice(first, first + _PARTS[rank]) if collectives.is_distributed() else slice(None)
    torch.manual_seed(11 + rank)  # as the trainer does, by rank
    criterion = MaskCriterion(MaskClassificationConfig(points=200))
    result = criterion(_rows(outputs, rows), masks[rows], 255)
    result.loss.backward()
    return {
        "loss": result.loss.detach(),
        "metrics": dict(result.metrics),
        "gradients": [each.grad for each in leaves(outputs)],
    }


def _rows(outputs: Any, rows: slice) -> Any:
    parts = {name: outputs[name][rows] for name in ("pred_logits", "pred_masks")}
    earlier = outputs.get("aux_outputs")
    return parts if earlier is None else {**parts, "aux_outputs": [_rows(e, rows) for e in earlier]}
