"""The best of linear probes, chosen on one set and measured on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from dinov3_classify.configs_heads import ProbesEvaluationConfig
from dinov3_classify.findings import Findings
from dinov3_classify.metrics import Classification, check_labels
from dinov3_classify.probes import LinearProbes, Probe
from dinov3_classify.sets import ClassifiedSets
from dinov3_framework import (
    Dataset,
    Evaluation,
    Features,
    ImagesConfig,
    Model,
    Problem,
    collectives,
    extract_features,
)
from dinov3_framework.contracts.running import Build, Details

_ROWS = 4096  # images whose logits are made at once


class ProbesEvaluation(Evaluation):
    """Accuracies of the classifier that is best on ``val``."""

    sets: ClassifiedSets

    def __init__(self, config: ProbesEvaluationConfig) -> None:
        self.config = config
        self.found = Findings(None, config.seed)
        self._details = Details()
        self._chosen: Probe | None = None

    def prepare(self, build: Build, images: ImagesConfig) -> None:
        config = self.config
        self.sets = ClassifiedSets(config, {"val": config.val, **config.sets}, build, images)

    def problems(self, model: Model) -> list[Problem]:
        if not isinstance(model.head, LinearProbes):
            what = "a backbone alone" if model.head is None else type(model.head).__name__
            message = f"measures a head linear_probes, and this is {what}"
            hint = "train one (train_head), or take the evaluation classification"
            return [Problem("use", message, hint)]
        target = model.head.config.target
        if target != "label":
            message = f"measures the target 'label', and the head predicts {target!r}"
            return [Problem("use", message, "take the evaluation classification")]
        return self.sets.problems(model, model.head.targets[target], target)

    def run(self, model: Model) -> Mapping[str, float]:
        head = model.head
        if not isinstance(head, LinearProbes):
            raise TypeError("there is no head linear_probes")
        names = head.targets[head.config.target].classes
        self.found = found = Findings(
            names,
            self.config.seed,
            with_top5=self.config.top5,
            with_class_mean=self.config.class_mean,
        )
        rows: list[dict[str, Any]] = [{"classifier": probe.name} for probe in head.probes]
        results: dict[str, list[Classification]] = {}
        for name, dataset in self.sets.datasets.items():
            results[name] = self._classified(model, head, name, dataset)
            for row, result in zip(rows, results[name], strict=True):
                row[name] = round(100 * float(result.right().mean()), 4)
        accuracies = [row["val"] for row in rows]
        self._chosen = chosen = head.probes[accuracies.index(max(accuracies))]
        for name, each in results.items():
            found.add(name, "accuracy", each[chosen.index])
        details = found.details()
        for probe, row in zip(head.probes, rows, strict=True):
            row["chosen"] = "on val" if probe is chosen else ""
        self._details = Details(
            details.intervals,
            {**details.tables, "classifiers": rows},
            details.arrays,
            head.classifier(chosen),
        )
        return found.metrics

    def details(self) -> Details:
        return self._details

    def protocol(self, model: Model) -> Mapping[str, Any]:
        known: dict[str, Any] = {**self.sets.protocol(model), "chosen on": "val"}
        if isinstance(model.head, LinearProbes):
            known["classifiers"] = len(model.head.probes)
        if self._chosen is not None:
            known["chosen"] = self._chosen.name
        return known | self.found.notes

    def data(self) -> str:
        return self.sets.describe()

    # ------------------------------------------------------------------ parts
    def _classified(
        self, model: Model, head: LinearProbes, name: str, dataset: Dataset
    ) -> list[Classification]:
        """How each of the classifiers does on a set; each process looks at its share."""
        share = extract_features(
            model.backbone,
            dataset,
            **self.sets.shown(model),
            outputs=("class", "mean_patch"),
            layers=head.needs.layers,
            norm=head.needs.norm,
            gather=False,
            cache=model.cache,
        )
        labels = collectives.all_gather_object(share.labels)
        known = [each for each in labels if each is not None]
        check_labels(name, torch.cat(known) if known else None, head.classes)
        mine = _classified_share(share, head)
        shares = cast("list[_Share]", collectives.all_gather_object(mine))
        results = _whole(shares, head.classes)
        self.sets.skipped[name] = share.skipped
        self.sets.unlabeled[name] = share.total - len(results[0])
        return results


@frozen
class _Share:
    """How this process's images were classified by each of M classifiers."""

    predicted: Tensor  # int64 [M, n]
    rank: Tensor  # int64 [M, n]
    truth: Tensor  # int64 [n] or bool [n, C]


def _classified_share(share: Features, head: LinearProbes) -> _Share:
    """To be called by every process, also by one that has no images."""
    layers = [head.layer(probe) for probe in head.probes]
    if share.labels is None:
        raise TypeError("labels were looked at before")
    parts: list[list[Classification]] = [[] for _ in layers]
    for start in range(0, max(len(share), 1), _ROWS):
        rows = slice(start, start + _ROWS)
        truth = share.labels[rows]
        inputs: dict[tuple[int, bool], Tensor] = {}
        for probe, found, (weight, bias) in zip(head.probes, parts, layers, strict=True):
            key = (probe.blocks, probe.mean_patch)
            if key not in inputs:
                inputs[key] = _input(share, rows, probe).to(weight.device)
            scores = F.linear(inputs[key], weight, bias)
            found.append(Classification.of_scores([scores], truth, head.classes))
    return _Share(
        torch.stack([torch.cat([part.predicted for part in found]) for found in parts]),
        torch.stack([torch.cat([part.rank for part in found]) for found in parts]),
        torch.cat([part.truth for part in parts[0]]),
    )


def _whole(shares: Sequence[_Share], classes: int) -> list[Classification]:
    """What all processes found, by classifier."""
    predicted = torch.cat([share.predicted for share in shares], dim=1)
    rank = torch.cat([share.rank for share in shares], dim=1)
    truth = torch.cat([share.truth for share in shares])
    return [Classification(*each, truth, classes) for each in zip(predicted, rank, strict=True)]


def _input(features: Features, rows: slice, probe: Probe) -> Tensor:
    """What a classifier sees of some images, [rows, D * (blocks + 1)]."""
    classes, means = (
        [each for name, each in features.tokens.items() if name.endswith(output)]
        for output in ("class", "mean_patch")
    )
    parts = classes[-probe.blocks :] + (means[-1:] if probe.mean_patch else [])
    return torch.cat([part[rows] for part in parts], dim=1)
