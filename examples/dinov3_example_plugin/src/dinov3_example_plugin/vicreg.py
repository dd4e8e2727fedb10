"""VICReg (Bardes, Ponce and LeCun 2022, arXiv:2105.04906) between two global crops."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_example_plugin import VicRegConfig
from dinov3_framework import Loss, LossResult, Projector, StepOutputs, UserError
from dinov3_framework.runtime import collectives

EPSILON = 1e-4  # of the variance, where the root would be too steep; the paper's


class Expander(Projector):
    """Class tokens [..., D] to embeddings [..., output_dim]: an MLP.

    Its layer norms stand where the paper has batch norms, which would tie the two crops of an
    image to the rest of the batch a second time, and differ between processes.
    """

    def __init__(self, config: VicRegConfig, embed_dim: int) -> None:
        super().__init__()
        widths = [embed_dim, *[config.hidden_dim] * (config.n_layers - 1), config.output_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-2])  # the last layer is linear
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self.mlp(tokens)
        return embeddings


class VicReg(Loss):
    """Equation 6 of the paper, over the samples of all processes."""

    needs = frozenset({"student.global.class"})
    sees_batch = True  # variances and covariances are the batch's

    def __init__(self, config: VicRegConfig) -> None:
        super().__init__()
        self.config = config

    def build_projector(self, embed_dim: int) -> Projector:
        return Expander(self.config, embed_dim)

    def forward(self, step: StepOutputs) -> LossResult:
        """Metrics: ``invariance``, ``variance`` and ``covariance``, before their factors."""
        tokens = step.student["global"].cls  # [G, B, D]
        if len(tokens) != 2:
            raise UserError(
                f"vicreg compares two global crops, the augmentation makes {len(tokens)}"
            )
        embeddings = step.project(tokens).float()
        # Crops are gathered one by one, so that those of one image keep the same place.
        first, second = (collectives.all_gather(crop) for crop in embeddings)
        terms = {
            "invariance": F.mse_loss(first, second),
            "variance": (variance(first) + variance(second)) / 2,
            "covariance": covariance(first) + covariance(second),
        }
        config = self.config
        loss = (
            config.invariance * terms["invariance"]
            + config.variance * terms["variance"]
            + config.covariance * terms["covariance"]
        )
        return LossResult(loss, {name: term.detach() for name, term in terms.items()})


def variance(embeddings: Tensor) -> Tensor:
    """Equation 1: what the deviation of each channel of [n, D] lacks to 1, on average."""
    centered = embeddings - embeddings.mean(0)
    deviations = (centered.square().sum(0) / max(len(embeddings) - 1, 1) + EPSILON).sqrt()
    return F.relu(1 - deviations).mean()


def covariance(embeddings: Tensor) -> Tensor:
    """Equations 3 and 4: the squared covariances between channels of [n, D], summed, over D."""
    centered = embeddings - embeddings.mean(0)
    matrix = centered.mT @ centered / max(len(embeddings) - 1, 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / embeddings.shape[1]
