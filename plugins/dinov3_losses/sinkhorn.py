"""Balanced assignment of samples to prototypes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3_framework import UserError, collectives


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    temperature: float,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Probabilities [n, K], float32, of logits [n, K]: each row sums to 1, prototypes share alike.

    Sinkhorn-Knopp (Cuturi 2013) as in SwAV (Caron et al. 2020): exp(logits / temperature) is
    scaled by turns so that every prototype, then every sample, has the same mass. All processes of
    ``group`` take part; ``n`` may differ between them and may be 0.

    The first iteration is done on logarithms: after it every prototype and every sample holds at
    least 1 / (samples * K) in one place, so that nothing over- or underflows, whatever the logits.
    Constant factors (1 / K, 1 / samples) cancel, so nobody needs to know the number of samples.
    """
    if temperature <= 0:
        raise UserError(f"Sinkhorn-Knopp: the temperature must be above 0, is {temperature:g}")
    scaled = logits.float() / temperature
    scaled -= _log_sum_exp_over_samples(scaled, group)
    probabilities = torch.softmax(scaled, dim=1)
    for _ in range(iterations - 1):
        probabilities /= collectives.all_reduce_sum(probabilities.sum(dim=0), group)
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    return probabilities


def _log_sum_exp_over_samples(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp of [n, K] over the n of all processes: [K]."""
    own = torch.logsumexp(values, dim=0)  # -inf where this process has no samples
    largest = collectives.all_reduce_max(own.clone(), group)
    # Only where no process has samples is the largest -inf, and then nobody uses the result.
    return collectives.all_reduce_sum((own - largest).exp(), group).log() + largest
