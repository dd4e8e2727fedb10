"""Networks that never learn: anchors that begin as weights, and the teacher of a distillation.

They may be of any backbone and any format. Before a run they are described: opened, built on the
meta device and compared, no value read. In a run every process reads its shards for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, Problem, RecipeError
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.parallel.state_dicts import load_tensor
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.agreement import OwnErrors, run_on_all_ranks
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.locations import published_file
from dinov3_framework.weights.source import WeightSource


@frozen
class FrozenWeights:
    """A backbone in a file or folder, and the projectors beside it."""

    weights: str
    network: str
    backbone: Backbone = field(repr=False)  # on the meta device
    info: ComponentInfo
    projectors: Mapping[str, Shape] = field(repr=False)  # dino_head.mlp.0.weight -> shape
    registry: Registry = field(repr=False)
    unused: Sequence[str] = ()  # names and patterns of tensors in it that may be left over

    @property
    def images(self) -> ImagesConfig:
        return self.info.images

    @property
    def config(self) -> BackboneConfig:
        config: BackboneConfig = self.registry.config_of(
            "backbone", self.info.component, self.info.config
        )
        return config

    def rows(self) -> list[tuple[str, str]]:
        """For people: what it is."""
        parameters = sum(p.numel() for p in self.backbone.parameters())
        told = [("weights", self.weights)]
        told.append(("backbone", f"{self.info.component}, {parameters:,} parameters"))
        told += [(k, v) for k, v in self.info.provenance.items() if k != "format"]
        return told


def described(
    weights: str,
    network: str,
    where: str,
    registry: Registry,
    *,
    projectors: bool = False,
    unused: Sequence[str] = (),
    remembered: Mapping[str, str] | None = None,
) -> FrozenWeights:
    """What ``weights`` hold, ``projectors`` too if they are wanted.

    Raises ``RecipeError`` at key ``where`` if they are of no use.
    ``remembered`` is what :func:`memory_of` gave to a checkpoint: a run that goes on from one has
    the values already, and the weights may be gone; or what :func:`published_as` tells.
    """
    if remembered is not None:
        return _remembered(weights, network, remembered, registry)
    try:
        with WeightSource.open(
            weights,
            registry,
            network=network,
            unused=unused,
            projectors=projectors,
            thorough=False,
        ) as source:
            backbone = source.build()
            source.check_fit(backbone)
            info, shapes = source.info(registry), source.projectors if projectors else {}
    except CheckpointError as error:
        raise RecipeError([Problem(where, str(error))]) from error
    return FrozenWeights(weights, network, backbone, info, shapes, registry, unused)


def published_as(weights: str, registry: Registry) -> Mapping[str, str] | None:
    """What is known of published weights by their name, or by that of their file, without them.

    As of :func:`memory_of`; None for others.
    """
    file = published_file(weights, registry)
    if file is None:
        return None
    component, values = registry.values_of(file.config)
    provenance = {"known as": f"the published {file.file}"}
    return ComponentInfo(component, values, file.images, file.size, provenance).to_metadata()


def memory_of(weights: FrozenWeights) -> dict[str, str]:
    """What a checkpoint keeps of weights whose values it holds itself."""
    return weights.info.to_metadata()


def _remembered(
    weights: str, network: str, memory: Mapping[str, str], registry: Registry
) -> FrozenWeights:
    info = ComponentInfo.from_metadata("the checkpoint", memory)
    if info is None:
        raise CheckpointError("the checkpoint does not say what its anchors are")
    with torch.device("meta"):
        backbone = registry.build(registry.config_of("backbone", info.component, info.config))
    return FrozenWeights(weights, network, backbone, info, {}, registry)


def fill_frozen(
    weights: FrozenWeights,
    backbone: nn.Module | None,
    projectors: Mapping[str, Any] | None = None,
) -> None:
    """Give allocated networks, whole or sharded, the values in the file.

    ``projectors`` are by the names that they have beside the backbone, such as ``dino_head``. To be
    called by every process of the run; what any of them raises ends all.
    """

    def fill() -> None:
        with WeightSource.open(
            weights.weights,
            weights.registry,
            network=weights.network,
            unused=weights.unused,
            projectors=bool(weights.projectors),
        ) as source:
            if backbone is not None:
                source.load_shards(backbone, weights.backbone)
            for name, module in (projectors or {}).items():
                state = {f"{name}.{inside}": t for inside, t in module.state_dict().items()}
                for inside, tensor in source.projector_tensors(state):
                    load_tensor(state[inside], tensor)

    with OwnErrors():
        run_on_all_ranks(fill)
