"""A head and the backbone under it, from what says where the head is."""

from __future__ import annotations

import logging
from pathlib import Path

from attrs import frozen

from dinov3_framework import CheckpointError, LoadedBackbone, Model, Registry, describe_backbone
from dinov3_framework.parallel.state_dicts import fingerprint, is_same
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.weights.heads import LoadedHead, describe_head, load_head
from dinov3_framework.weights.loading import load_backbone
from dinov3_framework.weights.locations import TUNED
from dinov3_framework.weights.source import WeightSource
from dinov3_predict import PredictConfig

log = logging.getLogger("dinov3_framework.predict")

_FINGERPRINT = "fingerprint of the backbone"


@frozen
class Loaded:
    """A head on its backbone."""

    backbone: LoadedBackbone
    head: LoadedHead

    @property
    def model(self) -> Model:
        size = self.head.size or self.backbone.size
        return Model(
            self.backbone.backbone, self.backbone.images, self.head.head, size, self.head.name
        )

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What to tell a person, (label, value)."""
        known = [(k, v) for k, v in self.head.provenance.items() if k != _FINGERPRINT]
        return [("backbone", self.backbone.name), ("head", self.head.name), *known]


def describe(config: PredictConfig, registry: Registry) -> Loaded:
    """Both on the meta device. Raises ``CheckpointError`` where they cannot be found or fit."""
    backbone = describe_backbone(_backbone(config, registry), registry=registry)
    return Loaded(backbone, describe_head(config.weights, backbone.backbone, registry=registry))


def load(config: PredictConfig, registry: Registry) -> Loaded:
    """Both with their values, on this process's device."""
    device = pick_device("auto")
    backbone = load_backbone(_backbone(config, registry), device=device, registry=registry)
    head = load_head(config.weights, backbone.backbone, device=device, registry=registry)
    before = head.provenance.get(_FINGERPRINT)
    if before is not None and not is_same(float(before), fingerprint(backbone.backbone)):
        log.warning("%s was trained on another backbone than %s", head.name, backbone.name)
    return Loaded(backbone, head)


def _backbone(config: PredictConfig, registry: Registry) -> str:
    """Where the weights of the backbone are."""
    if config.backbone is not None:
        return config.backbone
    folder = Path(config.weights).expanduser()
    if (folder / TUNED).is_file():
        return config.weights
    if (published := _published(config.weights, registry)) is not None:
        return published
    if folder.is_dir() and (folder / "config.json").is_file():
        return config.weights  # of Hugging Face, with both in it
    with WeightSource.open(config.weights, registry, kind="head") as weights:
        name = dict(weights.provenance).get("trained on")
    if name is None:
        what = "does not say which backbone it was trained on"
    elif name.partition("@")[0] in registry.published or Path(name).expanduser().exists():
        return name
    else:
        what = f"was trained on {name!r}, which is not here"
    raise CheckpointError(f"{config.weights} {what}; give its weights as backbone = PATH")


def _published(name: str, registry: Registry) -> str | None:
    """The published backbone of a published head: whose name its own begins with."""
    head = registry.published.get(name)
    if head is None or head.kind != "head":
        return None
    images = head.default.images
    known = [p for p in registry.published.values() if p.kind == "backbone"]
    for backbone in sorted(known, key=lambda each: -len(each.name)):
        if name.startswith(f"{backbone.name}_"):
            for training_set, file in backbone.files.items():
                if file.images == images:
                    return f"{backbone.name}@{training_set}"
    return None
