"""The ``rankme`` observer: whether features still fill their space, without labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov3_framework import Observer, Run, StepRecord, normalize
from dinov3_framework.data.inference import evaluating
from dinov3_ssl.configs import RankMeConfig


class RankMe(Observer):
    """Adds ``rankme`` and ``feature_std`` to the metrics.

    Both are of class tokens of the moving average, for the first global crops of the run's first
    samples: always the same crops, made once.
    """

    def __init__(self, config: RankMeConfig) -> None:
        self.config = config
        self._crops: Tensor | None = None

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        return self._measure(run) if iteration == 0 else None

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float] | None:
        return self._measure(run)

    @torch.no_grad()
    def _measure(self, run: Run) -> Mapping[str, float]:
        if self._crops is None:
            self._crops = run.sample_batch(self.config.images)["global"][0].clone()
        backbone, tokens = run.model().backbone, []
        with evaluating(backbone):
            for crops in self._crops.split(self.config.batch_size):
                output = backbone.forward_features(normalize(crops.to(run.device), run.images))
                tokens.append(output["x_norm_clstoken"].float())
        features = torch.cat(tokens)
        return {"rankme": rankme(features), "feature_std": feature_std(features)}


def rankme(features: Tensor) -> float:
    """The effective rank of features [N, D], from 1 to min(N, D).

    The exponential of the entropy of their singular values, RankMe (arXiv:2210.02885, equation 2).
    """
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp_min(1e-30) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_std(features: Tensor) -> float:
    """The deviation of normalized features [N, D]: 0 if all are alike, 1 if spread evenly.

    Of each dimension, averaged, in units of 1/sqrt(D), as SimSiam watches (arXiv:2011.10566, 4.1).
    """
    unit = torch.nn.functional.normalize(features, dim=1)
    return float(unit.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5)
