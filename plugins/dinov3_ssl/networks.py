"""The networks of a run: student, its moving average, anchors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn

from dinov3_framework.configs import AnchorConfig
from dinov3_framework.contracts.losses import Anchor, Loss
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.parallel import sharder as parallel
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.agreement import OwnErrors, run_on_all_ranks
from dinov3_ssl.frozen import FrozenWeights, described, fill_frozen


def projector_key(loss: str) -> str:
    """The projector's name in state dicts: ``dino_head`` for the loss called ``dino``."""
    return f"{loss}_head"


@attrs.frozen
class Blueprint:
    """All networks whole, on the meta device."""

    backbone: Backbone
    projectors: Mapping[str, nn.Module]
    anchors: Mapping[str, Anchor]
    # Of anchors that come from weights; the others are like the student's backbone.
    anchor_weights: Mapping[str, FrozenWeights] = attrs.field(factory=dict)

    @classmethod
    def draw(
        cls,
        registry: Registry,
        config: BackboneConfig,
        losses: Mapping[str, Loss],
        remembered: Mapping[str, Mapping[str, str]] | None = None,
        absent: Collection[str] = (),
    ) -> Blueprint:
        """``remembered`` says what anchors are whose values a checkpoint holds.

        Weights of the anchors of losses in ``absent`` are not looked at. Raises ``RecipeError`` for
        others that are not there or not usable.
        """
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
        weights = {
            name: described(
                anchor.config.weights,
                anchor.config.network,
                f"losses.{name}.anchor.weights",
                registry,
                unused=anchor.config.unused or (),
                remembered=(remembered or {}).get(name),
            )
            for name, anchor in anchors.items()
            if anchor.config.weights is not None and name not in absent
        }
        return cls(backbone, projectors, anchors, weights)

    def anchor_backbone(self, name: str) -> Backbone:
        """What the anchor of a loss looks like."""
        own = self.anchor_weights.get(name)
        return self.backbone if own is None else own.backbone

    def student(self) -> nn.ModuleDict:
        """A new student (or teacher) by its official names."""
        heads = {projector_key(name): copy.deepcopy(p) for name, p in self.projectors.items()}
        return nn.ModuleDict({"backbone": copy.deepcopy(self.backbone), **heads})


class InitialValues(Protocol):
    """Values that networks start from instead of random ones, such as weights in a file."""

    @property
    def into(self) -> str:
        """``student``, ``teacher`` or ``both``."""
        ...

    def has(self, part: str) -> bool:
        """Whether there are values for a network's part, such as ``backbone``."""
        ...

    def fill(self, part: str, module: nn.Module, blueprint: nn.Module, seed: int) -> None:
        """Give values to every tensor of an allocated part; no process talks to another."""
        ...


class Networks:
    """Student and teacher under the official names, and one anchor backbone per loss that asks.

    To be made by every process. They start from ``first``, and what that does not have is drawn
    from ``seed``; with ``restored`` they are left without values, for a checkpoint to give them.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        sharder: Sharder,
        seed: int,
        *,
        first: InitialValues | None = None,
        restored: bool = False,
    ) -> None:
        self.blueprint, self.seed = blueprint, seed
        self.student = self._place(blueprint.student(), sharder)
        self.teacher = self._place(blueprint.student(), sharder, trains=False)
        self.anchors = self._place(
            nn.ModuleDict(
                {name: copy.deepcopy(blueprint.anchor_backbone(name)) for name in blueprint.anchors}
            ),
            sharder,
            trains=False,
        )
        # By loss: those that still are what their weights were, and see images as those did.
        self.anchors_from_weights = set(blueprint.anchor_weights)
        self.device = sharder.device
        self.frozen = nn.ModuleDict()  # the projectors of a teacher that is not one of these
        if not restored:
            self._begin(first)
        self.student.train()
        for network in (self.teacher, self.anchors):
            network.eval().requires_grad_(False)
        self.update_teacher = parallel.momentum_update(self.teacher, self.student)

    def _begin(self, first: InitialValues | None) -> None:
        into = None if first is None else first.into
        whole = self.blueprint.student()
        for name, module in self.student.items():
            # A network that is filled is not drawn: to draw one takes all of it in one process.
            if first is None or into != "both" or not first.has(name):
                parallel.initialize(module, whole[name], self._seed(name))
        if first is not None and into == "both":
            self._fill(self.student, whole, first)
        parallel.copy_network(self.student, self.teacher)
        if first is not None and into != "both":
            self._fill(self.student if into == "student" else self.teacher, whole, first)
        self.begin_anchors()

    def begin_anchors(self) -> None:
        """Give each anchor what it begins as: its weights, or else the momentum teacher's."""
        self.anchors_from_weights = set(self.blueprint.anchor_weights)
        for name, anchor in self.anchors.items():
            if name in self.blueprint.anchor_weights:
                fill_frozen(self.blueprint.anchor_weights[name], anchor)
            else:
                parallel.copy_network(self.teacher["backbone"], anchor)

    def _fill(self, network: nn.ModuleDict, whole: nn.ModuleDict, first: InitialValues) -> None:
        def fill() -> None:
            for name, module in network.items():
                if first.has(name):
                    first.fill(name, module, whole[name], self._seed(name))

        with OwnErrors():
            run_on_all_ranks(fill)

    def _seed(self, part: str) -> int:
        return keyed_seed(self.seed, f"init.{part}")

    @staticmethod
    def _place(networks: nn.ModuleDict, sharder: Sharder, trains: bool = True) -> nn.ModuleDict:
        placed = {n: sharder.place(module, trains=trains) for n, module in networks.items()}
        return nn.ModuleDict(placed)

    def start_anchors(self, iteration: int) -> list[str]:
        """Copy the teacher into each anchor that is to begin before ``iteration``."""
        return self._copy_into(
            [n for n, a in self.blueprint.anchors.items() if a.config.start == iteration]
        )

    def refresh_anchors(self, done: int) -> list[str]:
        """Copy the teacher into each anchor whose turn it is after ``done`` iterations."""
        return self._copy_into(
            [n for n, a in self.blueprint.anchors.items() if refresh_due(a.config, done)]
        )

    def _copy_into(self, anchors: list[str]) -> list[str]:
        for name in anchors:
            parallel.copy_network(self.teacher["backbone"], self.anchors[name])
        self.anchors_from_weights.difference_update(anchors)
        return anchors

    def named_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name, to save or to load in place."""
        networks = {
            "student": self.student,
            "teacher": self.teacher,
            "anchors": self.anchors,
            "frozen": self.frozen,
        }
        return {
            f"{role}.{name}": tensor.detach()
            for role, network in networks.items()
            for name, tensor in parallel.tensors_of(network)
        }

    def initial_backbone(self) -> Backbone:
        """The backbone as ``seed`` draws it, whole, on the CPU, in eval mode."""
        whole = parallel.initial_values(self.blueprint.backbone, self._seed("backbone"))
        return whole.eval().requires_grad_(False)  # type: ignore[return-value]


def is_there(anchor: AnchorConfig, iteration: int) -> bool:
    """Whether an anchor has begun before ``iteration``."""
    return anchor.weights is not None or anchor.start is None or iteration >= anchor.start


def refresh_due(anchor: AnchorConfig, done: int) -> bool:
    """Whether an anchor is copied from the teacher after ``done`` iterations (from 1)."""
    if anchor.period is None or done < anchor.first_refresh or done % anchor.period:
        return False
    if anchor.max_refreshes is None:
        return True
    first = -(-max(anchor.first_refresh, anchor.period) // anchor.period)
    return done // anchor.period - first < anchor.max_refreshes
