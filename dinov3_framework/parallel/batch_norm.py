"""Batch normalization over the images of all processes, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework.runtime import collectives


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training are those of all processes' images.

    What ``nn.SyncBatchNorm`` is on CUDA, and on the CPU, too; parameters and buffers have the same
    names. Processes may have different numbers of pixels. Computes in float32 and returns the
    input's type, so that parameters may be gathered in bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]; in training to be called by every process."""
        self._check_input_dim(x)
        pixels, mean, var = x.float(), self.running_mean, self.running_var
        weight, bias = (None if each is None else each.float() for each in (self.weight, self.bias))
        if not self.training and mean is not None and var is not None:
            mean, var = mean.float(), var.float()
            return F.batch_norm(pixels, mean, var, weight, bias, eps=self.eps).to(x.dtype)
        mean, var = self._statistics(pixels)
        scale = (var + self.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        normalized = (pixels - mean[:, None, None]) * scale[:, None, None]
        return (normalized if bias is None else normalized + bias[:, None, None]).to(x.dtype)

    def _statistics(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] of all processes' pixels [B, C, H, W], with gradient."""
        count = pixels.new_full((1,), pixels.numel() / pixels.shape[1])
        var, mean = torch.var_mean(pixels, (0, 2, 3), correction=0)
        # Gathering follows gradients: what one process's pixels do to all the others' is in them.
        parts = collectives.all_gather(torch.cat([count, mean, var])[None])
        counts, means, variances = parts.split([1, len(mean), len(mean)], dim=1)
        total = counts.sum()
        shares = counts / total
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        with torch.no_grad():
            self._track(mean, var * (total / (total - 1).clamp(min=1)))
        return mean, var

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Let the running statistics follow those of a batch."""
        if self.running_mean is None or self.running_var is None:
            return
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1 / float(self.num_batches_tracked)
        if share is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(var.to(self.running_var.dtype), share)
