"""Balanced assignment of samples to prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from attrs import frozen
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
    check_temperature(temperature)
    scaled = logits.float() / temperature
    scaled -= _log_sum_exp_over_processes(torch.logsumexp(scaled, dim=0), group)
    probabilities = torch.softmax(scaled, dim=1)
    for _ in range(iterations - 1):
        probabilities /= collectives.all_reduce_sum(probabilities.sum(dim=0), group)
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    return probabilities


@frozen
class Balance:
    """The result of Sinkhorn-Knopp without the probabilities: one number per prototype, [K].

    In two summands: the first takes logits of any size down to where the second matters, which
    would be lost in the rounding of their sum.
    """

    first: Tensor
    later: Tensor

    def assign(self, scaled: Tensor) -> Tensor:
        """Probabilities [n, K] of some rows of logits over temperature, which are written to."""
        return torch.softmax(scaled.sub_(self.first).sub_(self.later), dim=1)


@torch.no_grad()
def balance(
    slices: Callable[[], Iterable[Tensor]],
    n_prototypes: int,
    device: torch.device,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Balance:
    """Sinkhorn-Knopp as in ``sinkhorn_knopp``, on a slice of the logits at a time.

    ``slices`` gives the rows of this process one slice after the other, float32 logits over
    temperature that may be written to; it is called once per iteration. The number of slices may
    differ between processes and may be 0.
    """
    largest = torch.full((n_prototypes,), -torch.inf, device=device)
    total = torch.zeros_like(largest)
    for scaled in slices():
        now = torch.maximum(largest, scaled.amax(dim=0))
        total *= (largest - now).exp()
        total += scaled.sub_(now).exp_().sum(dim=0)
        largest = now
    first = _log_sum_exp_over_processes(total.log() + largest, group)
    found = Balance(first, torch.zeros_like(first))
    for _ in range(iterations - 1):
        mass = torch.zeros_like(first)
        for scaled in slices():
            mass += found.assign(scaled).sum(dim=0)
        found = Balance(first, found.later + collectives.all_reduce_sum(mass, group).log())
    return found


def check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise UserError(f"Sinkhorn-Knopp: the temperature must be above 0, is {temperature:g}")


def _log_sum_exp_over_processes(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp over all samples, [K], of that over each process's; -inf where it has none."""
    largest = collectives.all_reduce_max(own.clone(), group)
    # Only where no process has samples is the largest -inf, and then nobody uses the result.
    return collectives.all_reduce_sum((own - largest).exp(), group).log() + largest
