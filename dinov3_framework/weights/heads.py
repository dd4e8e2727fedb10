"""Heads in files: what these say of them, and how they are loaded onto a backbone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Target
from dinov3_framework.contracts.networks import Backbone, Head
from dinov3_framework.errors import CheckpointError
from dinov3_framework.parallel.state_dicts import fingerprint, is_same
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.durable import parse_json
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.source import WeightSource

log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint of the backbone"  # in the provenance of a head
TRAINED_ON = "trained on"  # the name of that backbone's weights there


@attrs.frozen
class LoadedHead:
    """A head with what it was trained on."""

    head: Head
    images: ImagesConfig
    size: int | None  # pixels, of the images it was trained on, where that is known
    provenance: Mapping[str, str]
    name: str  # what it was loaded from
    component: str
    config: Mapping[str, Any]  # plain values, as in a recipe

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What to tell a person of it, (label, value)."""
        known = [(key, value) for key, value in self.provenance.items() if key != FINGERPRINT]
        return [("head", self.name), *known]


def load_head(
    source: str | Path,
    backbone: Backbone,
    *,
    device: torch.device | str = "cpu",
    registry: Registry | None = None,
) -> LoadedHead:
    """Load a head that was trained on ``backbone``: strictly filled, in eval mode.

    ``source`` is its file or the folder of the run that trained it. Raises ``CheckpointError``
    where it is missing or damaged, of no plugin, or does not fit the backbone.
    """
    with _opened(source, backbone, registry) as (weights, head, provenance):
        weights.load_state(head, device=device)
        return _loaded(weights, head, provenance, source, registry)


def describe_head(
    source: str | Path, backbone: Backbone, *, registry: Registry | None = None
) -> LoadedHead:
    """As :func:`load_head`, with the head on the meta device: values are not read."""
    with _opened(source, backbone, registry) as (weights, head, provenance):
        weights.check_fit(head)
        return _loaded(weights, head, provenance, source, registry)


def _loaded(
    weights: WeightSource,
    head: Any,
    provenance: Mapping[str, str],
    source: str | Path,
    registry: Registry | None,
) -> LoadedHead:
    registry = registry if registry is not None else Registry.load()
    component, values = registry.values_of(weights.config)
    return LoadedHead(
        head=head.eval(),
        images=weights.images,
        size=weights.size or None,
        provenance=provenance,
        name=str(source),
        component=component,
        config=values,
    )


def warn_of_another_backbone(head: LoadedHead, backbone: LoadedBackbone) -> None:
    """Log a warning where the head was trained on other weights; to be called by every process."""
    before, now = head.provenance.get(FINGERPRINT), fingerprint(backbone.backbone)
    if before is not None and not is_same(float(before), now) and collectives.is_main():
        trained_on = head.provenance.get(TRAINED_ON, "unknown")
        log.warning("%s was trained on %s, not on %s", head.name, trained_on, backbone.name)


@contextmanager
def _opened(
    source: str | Path, backbone: Backbone, registry: Registry | None
) -> Iterator[tuple[WeightSource, Any, Mapping[str, str]]]:
    registry = registry if registry is not None else Registry.load()
    with WeightSource.open(source, registry, kind="head") as weights:
        provenance = dict(weights.provenance)
        targets = _targets(weights, provenance, source)
        try:
            head = weights.build(features=backbone.feature_info, targets=targets)
        except IndexError as error:
            layers = len(backbone.feature_info)
            raise CheckpointError(
                f"{source}: its head needs a layer that the backbone, which has {layers}, lacks"
            ) from error
        yield weights, head, provenance


def head_info(
    component: str,
    config: Mapping[str, Any],
    images: ImagesConfig,
    size: int | None,
    targets: Mapping[str, Target],
    provenance: Mapping[str, str],
) -> ComponentInfo:
    """What the file of a head says of it."""
    schema = json.dumps({name: attrs.asdict(target) for name, target in targets.items()})
    known = {**provenance, "targets": schema}
    return ComponentInfo(component, config, images, size or 0, known, kind="head")


def _targets(
    weights: WeightSource, provenance: dict[str, str], source: str | Path
) -> Mapping[str, Target]:
    """What the head predicts: as its file says, or of another's format its layout."""
    try:
        if weights.layout is not None:
            return weights.layout.targets(weights.content)
        found = parse_json(provenance.pop("targets"))
        return {name: _target(values) for name, values in found.items()}
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} does not say what its head predicts") from error


def _target(values: Mapping[str, Any]) -> Target:
    tuples = {"classes": values["classes"] and tuple(values["classes"])}
    if values["palette"] is not None:
        tuples["palette"] = tuple(map(tuple, values["palette"]))
    return Target(**{**values, **tuples})
