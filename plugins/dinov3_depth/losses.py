"""Losses of predicted depth, by the pixels whose truth is known.

The letters in shapes: B images. All is computed in float32, and without branches on values, so that
an estimate can run it. Where no truth is known at all, a loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_depth.configs_losses import DepthHeadConfig
from dinov3_framework.contracts.networks import LossResult

Term = Callable[[Tensor, Tensor, Tensor], Tensor]

_EPS = 1e-3  # added before logarithms
_SIGMA_MEAN = 0.15  # weight of the squared mean beside the variance
_STEPS = (1, 2, 4, 6)  # of the scales at which gradients are compared: each n-th pixel


def depth_loss(config: DepthHeadConfig, prediction: Tensor, truth: Tensor) -> LossResult:
    """The weighted sum of the losses that ``config`` asks for; each of them is logged by name.

    ``prediction`` is [B, h, w], resized to the truth if need be; ``truth`` [B, H, W] is NaN where
    it is not known.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, truth = prediction.float(), truth.float()
        if prediction.shape[-2:] != truth.shape[-2:]:
            size = (truth.shape[-2], truth.shape[-1])
            prediction = F.interpolate(prediction[:, None], size, mode="bilinear")[:, 0]
        valid = truth > config.min_truth  # not so for NaN
        if config.max_truth is not None:
            valid &= truth < config.max_truth
        # Any value above 0 would do: what is computed of it is left out.
        truth = torch.where(valid, truth, 1.0)
        weights = {
            "sigma": (config.sigma, sigma_loss),
            "gradient": (config.gradient, gradient_loss),
            "gradient_log": (config.gradient_log, gradient_log_loss),
            "l1": (config.l1, l1_loss),
        }
        total = prediction.new_zeros(())
        metrics = {}
        for name, (weight, term) in weights.items():
            if weight:
                value = _mean_of_groups(term, config.together, prediction, truth, valid)
                total = total + weight * value
                metrics[name] = value.detach()
        error = (prediction.detach() - truth).abs() / truth
        metrics["abs_rel"] = _mean(error, valid)
    return LossResult(total, metrics)


def _mean_of_groups(term: Term, together: int | None, *images: Tensor) -> Tensor:
    """The mean of a loss over groups of images, each weighed by how many it has."""
    count = len(images[0])
    size = count if together is None else min(together, count)
    parts = zip(*(each.split(size) for each in images), strict=True)
    return torch.stack([term(*part) * (len(part[0]) / count) for part in parts]).sum()


# --------------------------------------------------------------------------- terms
def sigma_loss(prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) with g = log(prediction) - log(truth), over all valid pixels.

    The scale-invariant error of Eigen et al. 2014 (arXiv:1406.2283, equation 4) with the mean's
    share at 1 - 0.85, under a root, as AdaBins has it (arXiv:2011.14141, equation 2).
    """
    g = _log(prediction) - _log(truth)
    mean = _mean(g, valid)
    count = valid.sum()
    squares = ((g - mean) ** 2).where(valid, 0.0).sum()
    value = squares / (count - 1).clamp(min=1) + _SIGMA_MEAN * mean**2
    # The root's slope is infinite at 0.
    return torch.where(value > 0, torch.where(value > 0, value, 1.0).sqrt(), value)


def gradient_loss(prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Differences of the error between pixels two apart, summed over scales.

    After MiDaS (arXiv:1907.01341, equation 11), as published with DINOv3: of pixels two apart, of
    every 1st, 2nd, 4th and 6th row and column, the sums of both directions over the number of valid
    pixels.
    """
    return _gradients(prediction - truth, valid)


def gradient_log_loss(prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """The same of logarithms, after MegaDepth (arXiv:1804.00607, equation 5)."""
    return _gradients(_log(prediction) - _log(truth), valid)


def l1_loss(prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """The mean absolute error."""
    return _mean((prediction - truth).abs(), valid)


def _gradients(error: Tensor, valid: Tensor) -> Tensor:
    error = error.where(valid, 0.0)
    total = error.new_zeros(())
    for step in _STEPS:
        part, known = error[..., ::step, ::step], valid[..., ::step, ::step]
        count = known.sum().clamp(min=1)
        down = (part[..., 2:, :] - part[..., :-2, :]).abs()
        across = (part[..., 2:] - part[..., :-2]).abs()
        down = down.where(known[..., 2:, :] & known[..., :-2, :], 0.0)
        across = across.where(known[..., 2:] & known[..., :-2], 0.0)
        total = total + (down.sum() + across.sum()) / count
    return total


def _log(values: Tensor) -> Tensor:
    return (values.clamp(min=0) + _EPS).log()


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return values.where(valid, 0.0).sum() / valid.sum().clamp(min=1)
