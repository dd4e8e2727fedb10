"""Linear classifiers of many learning rates, trained at once on one pass of the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_classify.configs_heads import LinearClassifierConfig, LinearProbesConfig
from dinov3_classify.heads import ClassHead, LinearClassifier, linear_input, width
from dinov3_framework.contracts.data import Target
from dinov3_framework.contracts.networks import FeatureInfo, HeadFeatures, LossResult
from dinov3_framework.contracts.running import ChosenHead


@frozen
class Probe:
    """One of the classifiers."""

    index: int
    learning_rate: float  # a factor of the optimizer's
    blocks: int
    mean_patch: bool

    @property
    def name(self) -> str:
        """``lr 0.01, 1 block, mean patch``."""
        blocks = "1 block" if self.blocks == 1 else f"{self.blocks} blocks"
        pooled = ", mean patch" if self.mean_patch else ""
        return f"lr {self.learning_rate:g}, {blocks}{pooled}"


class LinearProbes(ClassHead):
    """Features to logits [B, C] of each classifier, in the order of ``probes``.

    They share no parameter, and the loss is the sum of theirs: each is trained as it would be
    alone.
    """

    config: LinearProbesConfig
    independent_parts = True

    def __init__(
        self,
        config: LinearProbesConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(config, features, targets, max(config.blocks))
        choices = [
            (rate, blocks, pooled)
            for blocks in config.blocks
            for pooled in config.mean_patch
            for rate in config.learning_rates
        ]
        self.probes = [Probe(index, *choice) for index, choice in enumerate(choices)]
        self.classifiers = nn.ModuleList(
            nn.Linear(width(features, each.blocks, each.mean_patch), self.classes)
            for each in self.probes
        )
        self._features, self._schema = tuple(features), dict(targets)

    @torch.no_grad()
    def init_weights(self) -> None:
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def lr_mult(self, name: str) -> float:
        return self.probes[int(name.split(".")[1])].learning_rate

    def forward(self, features: HeadFeatures) -> list[Tensor]:
        inputs: dict[tuple[int, bool], Tensor] = {}
        outputs = []
        for probe, classifier in zip(self.probes, self.classifiers, strict=True):
            key = (probe.blocks, probe.mean_patch)
            if key not in inputs:
                inputs[key] = linear_input(features, *key).to(classifier.weight.dtype)
            outputs.append(classifier(inputs[key]))
        return outputs

    def loss(self, outputs: Sequence[Tensor], targets: Mapping[str, Any]) -> LossResult:
        wanted = targets[self.config.target]
        losses = torch.stack([self.cross_entropy(each, wanted) for each in outputs])
        lowest = losses.detach().min()
        right = torch.stack([(each.argmax(1) == wanted).float().mean() for each in outputs])
        return LossResult(losses.sum(), {"lowest_loss": lowest, "accuracy": right.max()})

    def predict(self, outputs: Sequence[Tensor], size: tuple[int, int]) -> Mapping[str, Tensor]:
        """The mean of all classifiers' probabilities; which is best, ``linear_probes`` finds."""
        return {self.config.target: torch.stack([o.float().softmax(1) for o in outputs]).mean(0)}

    @torch.no_grad()
    def layer(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """Weight [C, D * (blocks + 1)] and bias [C] of one of them, whole and in float32.

        To be called on every process.
        """
        layer = self.classifiers[probe.index]
        return _whole(layer.weight), _whole(layer.bias)

    def classifier(self, probe: Probe) -> ChosenHead:
        """One of them as a head of its own, on the CPU; to be called on every process."""
        weight, bias = self.layer(probe)
        values = {
            "target": self.config.target,
            "label_smoothing": self.config.label_smoothing,
            "blocks": probe.blocks,
            "mean_patch": probe.mean_patch,
        }
        config = LinearClassifierConfig(**values)  # type: ignore[arg-type]
        alone = LinearClassifier(config, features=self._features, targets=self._schema)
        alone.load_state_dict({"weight": weight.cpu(), "bias": bias.cpu()})
        return ChosenHead("linear_classifier", values, alone.eval())


def _whole(value: Tensor) -> Tensor:
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.float()
