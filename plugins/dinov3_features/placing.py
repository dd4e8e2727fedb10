"""The backbone of an extraction in its place: on the device, whole or sharded."""

from __future__ import annotations

import torch

from dinov3_features.configs import FeaturesTaskConfig
from dinov3_framework.parallel.sharder import DTYPES, Sharder
from dinov3_framework.registry import Registry
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.loading import load_recipe_backbone


def placed_subject(
    config: FeaturesTaskConfig, registry: Registry, device: torch.device
) -> LoadedBackbone:
    """The recipe's backbone with its values, in eval mode; to be called by every process.

    With ``sharded`` it is split over the processes, each of which reads its own shards; otherwise
    each has all of it, with parameters in ``param_dtype``.
    """
    if config.sharded:
        sharder = Sharder(config.parallel, device)
        return load_recipe_backbone(config, registry, device.type, sharder)
    subject = load_recipe_backbone(config, registry, device.type)
    for parameter in subject.backbone.parameters():
        # Buffers keep their type: a table of RoPE is not to be rounded.
        parameter.data = parameter.data.to(device, DTYPES[config.parallel.param_dtype])
    return subject
