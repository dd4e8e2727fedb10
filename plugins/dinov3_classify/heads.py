"""Classifiers on a backbone's features.

The letters in shapes: B images, C classes, D the backbone's width, P patches, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_classify.configs_heads import (
    AttentiveProbeConfig,
    ClassHeadConfig,
    LinearClassifierConfig,
)
from dinov3_framework.contracts.data import Target, choose_target
from dinov3_framework.contracts.networks import (
    FeatureInfo,
    FeatureNeeds,
    Head,
    HeadFeatures,
    LossResult,
)
from dinov3_framework.errors import UserError

_STD = 0.01  # of the first weights of linear layers, as published


class ClassHead(Head):
    """Predicts the classes of one target by logits [B, C]."""

    def __init__(
        self,
        config: ClassHeadConfig,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
        blocks: int,
    ) -> None:
        super().__init__()
        target = choose_target(targets, config.target, "class")
        if target.count is None:
            raise UserError(f"how many classes the target {config.target!r} has is not known")
        if blocks > len(features):
            raise UserError(f"blocks = {blocks}: the backbone has {len(features)} layers")
        self.config, self.classes, self.targets = config, target.count, {config.target: target}
        self.needs = FeatureNeeds(layers=tuple(range(-blocks, 0)), class_token=True)

    def loss(self, outputs: Tensor, targets: Mapping[str, Any]) -> LossResult:
        wanted = targets[self.config.target]
        right = (outputs.argmax(1) == wanted).float().mean()
        return LossResult(self.cross_entropy(outputs, wanted), {"accuracy": right})

    def cross_entropy(self, logits: Tensor, wanted: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        return F.cross_entropy(logits.float(), wanted, label_smoothing=smoothing)

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return {self.config.target: outputs.float().softmax(1)}


def width(features: Sequence[FeatureInfo], blocks: int, mean_patch: bool) -> int:
    """Of the input of a linear layer on ``blocks`` class tokens and perhaps the mean patch."""
    tokens = sum(each.channels for each in features[-blocks:])
    return tokens + (features[-1].channels if mean_patch else 0)


def linear_input(features: HeadFeatures, blocks: int, mean_patch: bool) -> Tensor:
    """[B, D * (blocks + 1)]: class tokens of the last blocks, mean patch token of the last one."""
    tokens = list(features.cls[-blocks:])
    if mean_patch:
        tokens.append(features.maps[-1].float().mean((2, 3)).to(tokens[0].dtype))
    return torch.cat(tokens, dim=1)


class LinearClassifier(ClassHead):
    """Features to logits [B, C] by one linear layer, under the official names."""

    config: LinearClassifierConfig

    def __init__(
        self,
        config: LinearClassifierConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(config, features, targets, config.blocks)
        size = width(features, config.blocks, config.mean_patch)
        self.weight = nn.Parameter(torch.empty(self.classes, size))
        self.bias = nn.Parameter(torch.empty(self.classes))
        self.init_weights()  # for whoever builds one without the trainer, as torch.hub does

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=_STD)
        nn.init.zeros_(self.bias)

    def forward(self, features: HeadFeatures) -> Tensor:
        given = linear_input(features, self.config.blocks, self.config.mean_patch)
        return F.linear(given.to(self.weight.dtype), self.weight, self.bias)


class AttentiveProbe(ClassHead):
    """Features to logits [B, C]: learned queries attend to the tokens, as AIM probes (El-Nouby et
    al. 2024, arXiv:2401.08541, section 3.2 and appendix).

    Tokens are normalized by layer norm; keys and values are linear in them, without bias.
    """

    config: AttentiveProbeConfig

    def __init__(
        self,
        config: AttentiveProbeConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(config, features, targets, 1)
        size = features[-1].channels
        if size % config.heads:
            raise UserError(f"heads = {config.heads} do not divide the backbone's width {size}")
        self.norm = nn.LayerNorm(size)
        self.queries = nn.Parameter(torch.empty(config.queries, size))
        self.keys = nn.Linear(size, size, bias=False)
        self.values = nn.Linear(size, size, bias=False)
        self.linear = nn.Linear(size, self.classes)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.norm.reset_parameters()
        for weight in (self.queries, self.keys.weight, self.values.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.normal_(self.linear.weight, std=_STD)
        nn.init.zeros_(self.linear.bias)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return name != "queries" and super().decays(name, parameter)

    def forward(self, features: HeadFeatures) -> Tensor:
        tokens = features.maps[0].flatten(2).transpose(1, 2)  # [B, P, D]
        if self.config.class_token:
            tokens = torch.cat([features.cls[0][:, None].to(tokens.dtype), tokens], dim=1)
        tokens = self.norm(tokens.to(self.norm.weight.dtype))
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        parts = (self._by_head(each) for each in (queries, self.keys(tokens), self.values(tokens)))
        attended = F.scaled_dot_product_attention(*parts)  # [B, heads, Q, D / heads]
        pooled = attended.transpose(1, 2).flatten(2).mean(dim=1)
        logits: Tensor = self.linear(pooled)
        return logits

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.config.heads, -1)).transpose(1, 2)
