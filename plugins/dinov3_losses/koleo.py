"""KoLeo: keeps the class tokens of a batch apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_framework import Loss, LossResult, StepOutputs, UserError
from dinov3_framework.runtime import collectives
from dinov3_losses.configs import KoLeoConfig
from dinov3_losses.numerics import full_precision

EPSILON = 1e-8


class KoLeoLoss(Loss):
    """The Kozachenko-Leonenko estimator of differential entropy as a regularizer.

    Sablayrolles et al. 2018, "Spreading vectors for similarity search", equation 3.
    """

    sees_batch = True

    def __init__(self, config: KoLeoConfig) -> None:
        super().__init__()
        self.config = config
        self.needs = frozenset({"student.global.class"})

    def forward(self, step: StepOutputs) -> LossResult:
        """The sum over global crops; metrics: ``mean``, the mean over them."""
        tokens = step.student["global"].cls  # [G, B, D]
        with full_precision(tokens):
            tokens = F.normalize(tokens.float(), dim=-1, eps=EPSILON)
            candidates, first = self._candidates(tokens)
            mean = koleo_loss(tokens, candidates, first, self.config.topk)
        return LossResult(mean * len(tokens), {"mean": mean.detach()})

    def _candidates(self, tokens: Tensor) -> tuple[Tensor, int]:
        """Tokens [G, n, D] to look for neighbors among, and where in them our own B begin."""
        if not self.config.distributed:
            return tokens, 0
        batch = tokens.shape[1]
        everyone = collectives.all_gather(tokens.transpose(0, 1).contiguous()).transpose(0, 1)
        total = everyone.shape[1]
        size = total if self.config.group_size is None else self.config.group_size
        if size % batch or total % size:
            raise UserError(
                f"koleo: group_size = {size} must be a multiple of the {batch} samples of a "
                f"process and divide the {total} of all {total // batch}"
            )
        position = collectives.rank() * batch
        start = position - position % size
        return everyone[:, start : start + size], position - start


def koleo_loss(tokens: Tensor, candidates: Tensor, first: int = 0, topk: int = 1) -> Tensor:
    """Mean of -log(distance) between unit tokens [G, B, D] and their ``topk`` nearest candidates.

    ``candidates`` [G, n, D] holds, per crop, the tokens themselves from place ``first`` on; a token
    is not its own neighbor. Where there are fewer others than ``topk``, all of them count; where
    there is none, the loss is 0. Tokens that coincide have a large but finite loss and gradient.
    """
    crops, batch, dim = tokens.shape
    neighbors = min(topk, candidates.shape[1] - 1)
    if neighbors == 0:
        return (tokens * 0).sum()
    with torch.no_grad():
        cosines = tokens @ candidates.mT  # [G, B, n]
        own = torch.arange(batch, device=tokens.device)
        cosines[:, own, own + first] = -torch.inf
        nearest = cosines.topk(neighbors, dim=-1).indices  # [G, B, k]
    index = nearest.flatten(1)[..., None].expand(-1, -1, dim)
    chosen = candidates.gather(1, index).view(crops, batch, neighbors, dim)
    distances = F.pairwise_distance(tokens[:, :, None], chosen, eps=EPSILON)
    return -(distances + EPSILON).log().mean()
