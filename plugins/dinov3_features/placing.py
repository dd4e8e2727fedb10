"""The backbone of an extraction in its place: on the device, whole or sharded."""

from __future__ import annotations

import copy

import attrs
import torch

from dinov3_features.configs import FeaturesTaskConfig
from dinov3_framework.parallel.sharder import DTYPES, Sharder, initialise
from dinov3_framework.registry import Registry
from dinov3_framework.weights.loading import load_placed
from dinov3_framework.weights.subject import Subject


def placed_subject(config: FeaturesTaskConfig, registry: Registry, device: torch.device) -> Subject:
    """The recipe's backbone with its values, in eval mode; to be called by every process.

    With ``sharded`` it is split over the processes, each of which reads its own shards; otherwise
    each has all of it, with parameters in ``param_dtype``.
    """
    if config.sharded:
        return _sharded(config, registry, Sharder(config.parallel, device))
    subject = Subject.opened(config, registry, device=device.type)
    for parameter in subject.backbone.parameters():
        # Buffers keep their type: a table of RoPE is not to be rounded.
        parameter.data = parameter.data.to(device, DTYPES[config.parallel.param_dtype])
    return subject


def _sharded(config: FeaturesTaskConfig, registry: Registry, sharder: Sharder) -> Subject:
    if config.weights is not None:
        loaded = load_placed(config.weights, sharder=sharder, registry=registry)
        return Subject.of_weights(config.weights, loaded)
    subject = Subject.described(config, registry)
    backbone = sharder.place(copy.deepcopy(subject.backbone), trains=False)
    initialise(backbone, subject.backbone, Subject.seed(config))
    return attrs.evolve(subject, backbone=backbone.eval())  # type: ignore[arg-type]
