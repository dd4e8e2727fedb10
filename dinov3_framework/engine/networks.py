"""The networks of a run: student, momentum teacher, anchors."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn

from dinov3_framework.configs import BackboneConfig
from dinov3_framework.contracts import Anchor, Backbone, Loss
from dinov3_framework.engine import parallel
from dinov3_framework.engine.parallel import Sharder
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.registry import Registry


def head_name(loss: str) -> str:
    """The projector's name in state dicts: ``dino_head`` for the loss called ``dino``."""
    return f"{loss}_head"


@attrs.frozen
class Blueprint:
    """All networks whole, on the meta device."""

    backbone: Backbone
    projectors: Mapping[str, nn.Module]
    anchors: Mapping[str, Anchor]

    @classmethod
    def draw(
        cls, registry: Registry, config: BackboneConfig, losses: Mapping[str, Loss]
    ) -> Blueprint:
        with torch.device("meta"):
            backbone = registry.build(config)
            projectors = {
                name: projector
                for name, loss in losses.items()
                if (projector := loss.build_projector(backbone.embed_dim)) is not None
            }
        anchors = {
            name: anchor for name, loss in losses.items() if (anchor := loss.anchor()) is not None
        }
        return cls(backbone, projectors, anchors)

    def student(self) -> nn.ModuleDict:
        """A new student (or teacher) by its official names."""
        heads = {head_name(name): copy.deepcopy(p) for name, p in self.projectors.items()}
        return nn.ModuleDict({"backbone": copy.deepcopy(self.backbone), **heads})


class Networks:
    """Student and teacher under the official names, and one anchor backbone per loss that asks."""

    def __init__(self, blueprint: Blueprint, sharder: Sharder, seed: int) -> None:
        self.blueprint, self.seed = blueprint, seed
        self.student = self._place(blueprint.student(), sharder)
        self.teacher = self._place(blueprint.student(), sharder)
        self.anchors = self._place(
            nn.ModuleDict({name: copy.deepcopy(blueprint.backbone) for name in blueprint.anchors}),
            sharder,
        )
        whole = blueprint.student()
        for name, module in self.student.items():
            parallel.initialise(module, whole[name], keyed_seed(seed, f"init.{name}"))
        parallel.copy_network(self.student, self.teacher)
        for anchor in self.anchors.values():
            parallel.copy_network(self.teacher["backbone"], anchor)
        self.student.train()
        for network in (self.teacher, self.anchors):
            network.eval().requires_grad_(False)
        self.update_teacher = parallel.momentum_update(self.teacher, self.student)

    @staticmethod
    def _place(networks: nn.ModuleDict, sharder: Sharder) -> nn.ModuleDict:
        return nn.ModuleDict({name: sharder.place(module) for name, module in networks.items()})

    def refresh_anchors(self, done: int) -> list[str]:
        """Copy the teacher into each anchor whose turn it is after ``done`` iterations."""
        due = [name for name, a in self.blueprint.anchors.items() if refresh_due(a, done)]
        for name in due:
            parallel.copy_network(self.teacher["backbone"], self.anchors[name])
        return due

    def named_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name, to save or to load in place."""
        networks = {"student": self.student, "teacher": self.teacher, "anchors": self.anchors}
        return {
            f"{role}.{name}": tensor.detach()
            for role, network in networks.items()
            for name, tensor in parallel.tensors_of(network)
        }

    def initial_backbone(self) -> Backbone:
        """The backbone as it was before the first iteration, whole, on the CPU, in eval mode."""
        seed = keyed_seed(self.seed, "init.backbone")
        whole = parallel.initial_values(self.blueprint.backbone, seed)
        return whole.eval().requires_grad_(False)  # type: ignore[return-value]


def refresh_due(anchor: Anchor, done: int) -> bool:
    """Whether an anchor is copied from the teacher after ``done`` iterations (from 1)."""
    if anchor.period is None or done < anchor.first_refresh or done % anchor.period:
        return False
    if anchor.max_refreshes is None:
        return True
    first = -(-max(anchor.first_refresh, anchor.period) // anchor.period)
    return done // anchor.period - first < anchor.max_refreshes
