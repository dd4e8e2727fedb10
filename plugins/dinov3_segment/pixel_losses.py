"""Losses of logits by pixel.

Means are over all pixels, ignored ones included, as in the reference: processes with equally many
images then have the loss of one process, however many pixels each of them ignores.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_NONE = -100  # an id that no pixel has
_SMOOTH = 1.0  # added to both sides of the fraction


def pixel_cross_entropy(logits: Tensor, mask: Tensor, ignored: int | None) -> Tensor:
    """Mean cross entropy of logits [B, C, H, W] and ids [B, H, W]; ignored pixels count as 0."""
    index = _NONE if ignored is None else ignored
    total = F.cross_entropy(logits, mask, ignore_index=index, reduction="sum")
    return total / mask.numel()


def dice_loss(logits: Tensor, mask: Tensor, ignored: int | None) -> Tensor:
    """1 - (2 * sum(p t) + 1) / (sum(p^2 + t^2) + 1), averaged over images and classes.

    Of the probability p (sigmoid) and the truth t of each class, summed over the pixels of an image
    that are not ignored (Milletari et al. 2016, arXiv:1606.04797, section 3).
    """
    shares = logits.sigmoid()
    if ignored is not None:
        known = (mask != ignored)[:, None]
        shares = shares * known
        mask = mask.masked_fill(mask == ignored, 0)
    truth = F.one_hot(mask, logits.shape[1]).movedim(-1, 1).to(shares.dtype)
    if ignored is not None:
        truth = truth * known
    overlap = (shares * truth).sum((2, 3))
    sizes = (shares.square() + truth).sum((2, 3))
    return (1 - (2 * overlap + _SMOOTH) / (sizes + _SMOOTH)).mean()
