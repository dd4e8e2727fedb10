"""How well a trained head tells the classes of the pictures that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from heads_support import registry
from run_support import HERE

from dinov3_framework import Model, load_recipe_backbone
from dinov3_framework.data.predictions import predictions
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.weights.heads import load_head

RECIPE = HERE / "tiny_masks.toml"


def mean_iou(output: Path) -> float:
    """Of a run's exported head on its own pictures, in percent, over the classes and all pixels."""
    known = registry()
    config: Any = structure_recipe(known, compose(output / "recipe.toml"))
    backbone = load_recipe_backbone(config, known)
    dataset = known.build(config.dataset, channels=backbone.images.channels)
    transform = known.build(config.transform, images=backbone.images, targets=dataset.targets)
    head = load_head(output, backbone.backbone, registry=known).head
    (target,) = head.targets.values()
    counts = torch.zeros(target.count, target.count)
    model = Model(backbone.backbone.eval(), backbone.images, head=head.eval())
    for found, truth in predictions(model, dataset, transform):
        ids, chosen = truth["mask"].long(), found["mask"].argmax(1)
        counted = ids != target.ignore_index
        pairs = ids[counted] * target.count + chosen[counted]
        counts += torch.bincount(pairs, minlength=counts.numel()).view_as(counts)
    overlap = counts.diagonal()
    return float(100 * (overlap / (counts.sum(0) + counts.sum(1) - overlap)).mean())
