"""Balanced assignment of samples to prototypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from dinov3_framework import UserError
from dinov3_framework.runtime import collectives
from dinov3_losses.numerics import RunningLogSumExp


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
    """The result of Sinkhorn-Knopp without the probabilities: a number per prototype and sample.

    Each in two summands: the first takes logits of any size down to where the second matters, which
    would be lost in the rounding of their sum.
    """

    prototypes: tuple[Tensor, Tensor]  # [K]
    samples: tuple[Tensor, Tensor]  # [n]

    def assign(self, scaled: Tensor, some: slice) -> Tensor:
        """Probabilities [n, k] of some prototypes, from logits over temperature; in place."""
        for of_prototypes, of_samples in zip(self.prototypes, self.samples, strict=True):
            scaled.sub_(of_prototypes[some]).sub_(of_samples[:, None])
        return scaled.exp_()


@torch.no_grad()
def balance(
    logits_of: Callable[[slice], Tensor],
    slices: Sequence[slice],
    n_samples: int,
    device: torch.device,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Balance:
    """Sinkhorn-Knopp as in ``sinkhorn_knopp``, with the logits of some prototypes at a time.

    ``slices`` are of all prototypes, in order, and the same on all processes: they meet in each.
    ``logits_of`` gives the logits over temperature of this process's samples with those of a slice,
    float32 [n_samples, k], which may be written to; it is called once per slice and iteration. What
    a prototype is scaled by, its own column says, so that only sums over rows wait for all slices.
    """
    n_prototypes = slices[-1].stop
    first = torch.empty(n_prototypes, device=device)
    rows = RunningLogSumExp.of_nothing(n_samples, device)
    for some in slices:
        scaled = logits_of(some)
        first[some] = _log_sum_exp_over_processes(torch.logsumexp(scaled, dim=0), group)
        rows.add(scaled.sub_(first[some]))
        del scaled  # before the next are made
    found = Balance((first, torch.zeros_like(first)), (rows.largest, rows.total.log()))
    for _ in range(iterations - 1):
        masses = torch.empty_like(first)
        shares = torch.zeros_like(rows.total)
        for some in slices:
            probabilities = found.assign(logits_of(some), some)
            masses[some] = collectives.all_reduce_sum(probabilities.sum(dim=0), group)
            shares += probabilities @ masses[some].reciprocal()
            del probabilities
        found = Balance(
            (first, found.prototypes[1] + masses.log()),
            (rows.largest, found.samples[1] + shares.log()),
        )
    return found


def check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise UserError(f"Sinkhorn-Knopp: the temperature must be above 0, is {temperature:g}")


def _log_sum_exp_over_processes(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp over all samples, [K], of that over each process's; -inf where it has none."""
    largest = collectives.all_reduce_max(own.clone(), group)
    # Only where no process has samples is the largest -inf, and then nobody uses the result.
    return collectives.all_reduce_sum((own - largest).exp(), group).log() + largest
