"""A training method with its train unit, and such that each break one promise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from broken_backbones import SoundBackbone, ToyBackboneConfig
from broken_data import SoundDataset, ToyDatasetConfig
from broken_optimizers import SoundOptimizer, ToyOptimizerConfig
from torch import Tensor

from dinov3_framework import (
    Component,
    Dataset,
    Model,
    Registry,
    Sample,
    Step,
    StepResult,
    StreamDataset,
    TrainUnit,
    Transform,
    config,
)
from dinov3_framework.data.loader import Layout, TransformedBatches
from dinov3_framework.parallel.sharder import Sharder, initialize
from dinov3_framework.schedules import Constant
from dinov3_framework.training import TrainingConfig
from dinov3_framework.training.task import InitialState, TrainingMethod


@config
class ToyTrainingConfig(TrainingConfig):
    """Config of the trainings below."""


TRAINING = ToyTrainingConfig(
    iterations=4,
    batch_size=6,
    dataset=ToyDatasetConfig(),
    optimizer=ToyOptimizerConfig(lr=Constant(value=0.1), weight_decay=Constant(value=0.0)),
)


def toy_registry() -> Registry:
    """What the trainings below build."""
    registry = Registry()
    for kind, name, cls, factory in (
        ("dataset", "toy", ToyDatasetConfig, SoundDataset),
        ("optimizer", "toy", ToyOptimizerConfig, SoundOptimizer),
        ("task", "toy", ToyTrainingConfig, SoundMethod.task),
    ):
        registry.add(kind, Component(name, cls, factory), "toys", "toy-box")
    return registry


class Network(SoundBackbone):
    """Counts what it has seen."""

    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(config)
        self.mask_token.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def init_weights(self) -> None:
        super().init_weights()
        if hasattr(self, "seen"):
            self.seen.zero_()


class Gray(Transform):
    """4 by 4 pixels, all of the sample's mean."""

    def __call__(self, sample: Sample) -> Sample:
        return Sample(sample.image.float().mean().expand(3, 4, 4) / 20, sample.targets)


class SoundUnit(TrainUnit):
    """The class token is to be the image's label; a moving average of weights is evaluated."""

    def __init__(self, network: Network, average: Network, images: Any) -> None:
        self.networks = {"backbone": network}
        self.network, self.average, self.images = network, average.eval(), images

    def forward(self, batch: Any, step: Step) -> StepResult:
        self.network.seen += len(batch.samples)
        tokens = self.network(batch.samples.images)
        noise = 0.01 * torch.randn(())
        labels = batch.samples.targets["label"].float()[:, None]
        loss = (tokens - labels + noise).square().mean()
        return StepResult(loss, {"fit": loss.detach()}, {"noise": float(noise)})

    @torch.no_grad()
    def after_step(self, step: Step, applied: bool) -> None:
        if applied:
            for ours, theirs in zip(
                self.average.parameters(), self.network.parameters(), strict=True
            ):
                ours.lerp_(theirs, 0.5)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{role}.backbone.{name}": tensor
            for role, network in (("student", self.network), ("teacher", self.average))
            for name, tensor in network.state_dict().items()
        }

    def model(self) -> Model:
        return Model(self.average, self.images)


class SoundMethod(TrainingMethod):
    name = "toy"
    unit_class = SoundUnit

    def prepare(self, dataset: Any = None) -> Network:
        with torch.device("meta"):
            return Network(ToyBackboneConfig())

    def shardable(self, prepared: Network) -> Network:
        return prepared

    def unit(
        self, prepared: Network, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> TrainUnit:
        placed: list[Any] = []
        for _ in range(2):
            network = sharder.place(self.prepare())
            if state is InitialState.INITIAL:
                initialize(network, prepared, self.config.seed)
            placed.append(network)
        return self.unit_class(*placed, self.config.images)

    def batches(
        self, prepared: Network, dataset: Dataset | StreamDataset, layout: Layout
    ) -> TransformedBatches:
        return TransformedBatches(dataset, Gray(), layout, self.config.seed, 0)


def _method(unit: type[SoundUnit]) -> Callable[..., Any]:
    """The task of a method that trains such units."""
    return type(unit.__name__, (SoundMethod,), {"unit_class": unit}).task


class NoResult(SoundUnit):
    def forward(self, batch: Any, step: Step) -> Any:
        return super().forward(batch, step).total


class NotFinite(SoundUnit):
    def forward(self, batch: Any, step: Step) -> StepResult:
        return StepResult(super().forward(batch, step).total / 0)


class Graph(SoundUnit):
    def forward(self, batch: Any, step: Step) -> StepResult:
        total = super().forward(batch, step).total
        return StepResult(total, {"fit": total})


class Idle(SoundUnit):
    def forward(self, batch: Any, step: Step) -> StepResult:
        return StepResult(torch.zeros((), requires_grad=True))


class NoBuffer(SoundUnit):
    def state(self) -> dict[str, Tensor]:
        return {n: t for n, t in super().state().items() if n != "student.backbone.seen"}


class Copies(SoundUnit):
    """Hands out copies of the teacher."""

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        copied = [name for name in state if name.startswith("teacher.")]
        self.kept = [state | {name: state[name].clone() for name in copied}, *self.kept]
        return self.kept[0]

    kept: list[dict[str, Tensor]] = []  # noqa: RUF012  (so that no memory is used again)


class TakenNames(SoundUnit):
    def state(self) -> dict[str, Tensor]:
        return super().state() | {"optimizer.count": self.network.seen}


class LateNames(SoundUnit):
    def state(self) -> dict[str, Tensor]:
        state = super().state()
        is_meta = self.network.seen.is_meta
        return {n: t for n, t in state.items() if not (is_meta and n.startswith("teacher."))}


class HiddenChange(SoundUnit):
    """Does not say that forward counts."""

    def changed_by_forward(self) -> Iterator[Tensor]:
        return iter(())


class NoRole(SoundUnit):
    def memory_roles(self) -> Mapping[str, Iterable[Tensor]]:
        return {"student": self.network.parameters()}


class Trains(SoundUnit):
    def model(self) -> Model:
        return Model(self.network, self.images)


class Forgets(SoundUnit):
    """Goes on with a count of its own that no checkpoint holds."""

    count = 0

    def forward(self, batch: Any, step: Step) -> StepResult:
        self.count += 1
        result = super().forward(batch, step)
        return StepResult(result.total * self.count)


class Secrets(SoundUnit):
    def notes(self) -> Mapping[str, Any]:
        return {"network": self.network}


UNITS: dict[str, tuple[Callable[..., Any], str]] = {
    "no result": (_method(NoResult), "must give a StepResult"),
    "not finite": (_method(NotFinite), "total must be a finite scalar"),
    "graph": (_method(Graph), "'fit' holds on to the graph"),
    "idle": (_method(Idle), "no gradient reaches the network 'backbone'"),
    "no buffer": (_method(NoBuffer), "leaves out of its networks: backbone.seen"),
    "copies": (_method(Copies), "gives copies.*teacher.backbone"),
    "taken names": (_method(TakenNames), "the optimizer's: optimizer.count"),
    "late names": (_method(LateNames), "on the meta device.*teacher.backbone"),
    "hidden change": (_method(HiddenChange), "nothing puts back: student.backbone.seen"),
    "no role": (_method(NoRole), "leaves out of .*student.backbone.seen"),
    "trains": (_method(Trains), "in training mode"),
    "forgets": (_method(Forgets), "a resumed run has other values of student.backbone"),
    "secrets": (_method(Secrets), "test_resuming: raised TypeError"),
}
