"""The true masks of an image: one for each class in it.

The letters in shapes: N masks, P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework import DataError
from dinov3_segment.draws import is_simulated
from dinov3_segment.points import values_at

_SIMULATED = 12  # classes that an image without values is taken to have


@frozen
class Segments:
    """One mask for each class of an image, and what is not known of it."""

    classes: Sequence[int]
    masks: Tensor  # [N, H, W], float32, 0 or 1
    ignored: Tensor | None  # [H, W], the same; None where all pixels count

    def __len__(self) -> int:
        return len(self.masks)

    def weights_at(self, points: Tensor) -> Tensor | None:
        """How much the points [N, P, 2] count, [N, P] in 0..1; None where all count in full.

        What a point is interpolated from may be ignored in part: it then weighs less.
        """
        if self.ignored is None:
            return None
        maps = torch.stack([1 - self.ignored, torch.ones_like(self.ignored)])
        known, whole = values_at(maps.expand(len(points), -1, -1, -1), points).unbind(1)
        return known / whole  # less than 1 in whole: beyond the outer pixels' centers

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The masks at points, and their weights, both [N, P].

        ``points`` are [N, P, 2], each mask's own, or [1, P, 2], the same for all; the weights are
        then [1, P]. A value is interpolated among the pixels that count.
        """
        if len(points) == len(self):
            values = values_at(self.masks[:, None], points)[:, 0]
        else:
            values = values_at(self.masks[None], points)[0]
        weights = self.weights_at(points)
        if weights is None:
            return values, values.new_ones(len(points), points.shape[1])
        known = (values / weights.clamp(min=1e-6)).clamp(max=1)
        return known, weights


def segments_of(ids: Tensor, n_classes: int, ignore_index: int | None) -> Segments:
    """The masks of the classes in a mask of class ids [H, W].

    Pixels of ``ignore_index`` belong to no mask and to no background. Raises ``DataError`` for ids
    that are no class.
    """
    ids = ids.as_subclass(Tensor).long()
    if is_simulated(ids):
        present = list(range(min(n_classes, _SIMULATED)))
    else:
        present = [int(each) for each in ids.unique().tolist()]
    classes = [each for each in present if each != ignore_index]
    odd = [each for each in classes if not 0 <= each < n_classes]
    if odd:
        void = "none is ignored" if ignore_index is None else f"{ignore_index} is ignored"
        raise DataError(
            f"a mask has the class id {odd[0]}; the data's {n_classes} classes are 0 to "
            f"{n_classes - 1}, and {void}"
        )
    wanted = torch.tensor(classes, dtype=torch.int64, device=ids.device)
    masks = (ids == wanted[:, None, None]).float()
    ignored = (ids == ignore_index).float() if ignore_index in present else None
    return Segments(classes, masks, ignored)
