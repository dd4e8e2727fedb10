"""Batch normalization over all processes, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework import collectives
from dinov3_segment.draws import is_simulated


class SyncBatchNorm(nn.BatchNorm1d):
    """Normalizes channels by mean and variance of the batch of all processes; in eval mode by the
    running ones.

    Computes what ``nn.SyncBatchNorm`` does, under the same names, on CPUs too, and for processes
    whose batches differ in size.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, ...]; the same shape and type back."""
        if not (self.training and collectives.is_distributed()) or is_simulated(values):
            return self._alone(values)
        others = [axis for axis in range(values.ndim) if axis != 1]
        single = values.float()
        count = single.new_full((1,), values.numel() / values.shape[1])
        # First the mean, then squares of what differs from it: their difference would cancel.
        totals = _summed(torch.cat([single.sum(others), count]))
        mean = totals[:-1] / totals[-1]
        shape = [1, -1] + [1] * (values.ndim - 2)
        centered = single - mean.view(shape)
        variance = _summed(centered.square().sum(others)) / totals[-1]
        with torch.no_grad():
            n = float(totals[-1])
            rate = float(self.momentum or 0.0)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            unbiased = variance * (n / max(n - 1, 1))
            self.running_var.lerp_(unbiased.to(self.running_var), rate)
        scale = self.weight.float() * (variance + self.eps).rsqrt()
        return (centered * scale.view(shape) + self.bias.float().view(shape)).to(values.dtype)

    def _alone(self, values: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        normalized = F.batch_norm(
            values.float(),
            self.running_mean.float() if not self.training else self.running_mean,
            self.running_var.float() if not self.training else self.running_var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return normalized.to(values.dtype)


def _summed(values: Tensor) -> Tensor:
    """The sum of a vector over processes, with gradient."""
    return collectives.all_gather(values[None]).sum(0)
