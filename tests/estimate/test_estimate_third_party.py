"""A training that knows nothing of self-supervision can be estimated, too."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_estimate.command import estimate
from dinov3_estimate.ledger import BATCH, GRADIENTS, OPTIMIZER
from dinov3_estimate.simulated import SimulatedRank
from dinov3_estimate.step import simulate
from torch import Tensor, nn

from dinov3_framework import Component, Registry, UserError, config, option
from dinov3_framework.contracts.networks import Shardable
from dinov3_framework.contracts.running import Model
from dinov3_framework.contracts.training import Step, StepResult, TrainUnit
from dinov3_framework.data.loader import BatchMaker, Layout
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.training import TrainingConfig
from dinov3_framework.training.simulation import SimulatedBatch
from dinov3_framework.training.task import InitialState, TrainingMethod, TrainingTask

WIDE, NARROW, IMAGES = 300, 50, 64


@config
class RegressConfig(TrainingConfig):
    """Linear regression on the features of a network that does not learn."""

    simulates: bool = option("whether there are simulated batches", default=True)


class Linear(Shardable):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors @ self.weight.T


class Regression(TrainUnit):
    """Trains ``top`` on what ``bottom`` makes of vectors, and says no more than it has to."""

    def __init__(self, bottom: nn.Module, top: nn.Module) -> None:
        self.bottom, self.networks = bottom.requires_grad_(False), {"top": top}
        self.mean = torch.zeros(NARROW)

    def forward(self, batch: Any, step: Step) -> StepResult:
        outputs = self.networks["top"](self.bottom(batch.vectors))
        loss = (outputs - self.mean).square().mean()
        return StepResult(loss, {"square": loss.detach()})

    def state(self) -> dict[str, Tensor]:
        return {**self.networks["top"].state_dict(prefix="top."), "mean": self.mean}

    def model(self) -> Model:
        raise NotImplementedError


class Vectors:
    """A ``contracts.training.Batch``."""

    corrupt = ()

    def __init__(self, count: int) -> None:
        self.vectors = torch.empty(count, WIDE)

    def to(self, device: torch.device) -> Vectors:
        return self


class Regress(TrainingMethod):
    name = "regress"

    def prepare(self, *_: Any) -> Mapping[str, Linear]:
        with torch.device("meta"):
            return {"bottom": Linear(WIDE, WIDE), "top": Linear(WIDE, NARROW)}

    def shardable(self, prepared: Mapping[str, Linear]) -> Linear:
        return prepared["top"]

    def unit(
        self,
        prepared: Mapping[str, Linear],
        sharder: Sharder,
        state: InitialState,
        output_dir: Path | None,
    ) -> TrainUnit:
        assert state is InitialState.ABSENT
        return Regression(
            sharder.place(copy.deepcopy(prepared["bottom"]), trains=False),
            sharder.place(copy.deepcopy(prepared["top"])),
        )

    def batches(self, prepared: Any, dataset: Any, layout: Layout) -> BatchMaker[Any, Any]:
        raise NotImplementedError

    def simulated_batches(self, prepared: Any, layout: Layout) -> Iterator[SimulatedBatch]:
        if not self.config.simulates:
            return super().simulated_batches(prepared, layout)
        make = partial(Vectors, layout.per_micro_batch)
        return iter([SimulatedBatch(make, rows=[("width", str(WIDE))])])


def task(**values: Any) -> TrainingTask:
    registry = Registry.load()
    component = Component("regress", RegressConfig, Regress.task)
    registry.add("task", component, "regression", "somebody-else")
    recipe = {
        "iterations": 10,
        "batch_size": IMAGES,
        "dataset": {"use": "fashion_mnist"},
        "images": {"channels": 1, "mean": [0.5], "std": [0.5]},
        "optimizer": {"use": "adamw", "lr": 1e-3, "weight_decay": 0.0},
    }
    made = registry.build(
        structure_component(registry, "task", "regress", recipe | values), registry=registry
    )
    assert isinstance(made, TrainingTask)
    return made


def test_work_is_counted() -> None:
    found = simulate(task(), SimulatedRank(1), granularity=1)
    # Both forward, and the gradient of one weight; nobody asks for that of the features.
    assert found.flops == 2 * IMAGES * (WIDE * WIDE + 2 * WIDE * NARROW)
    halves = simulate(task(accumulation_steps=4), SimulatedRank(2), granularity=1)
    assert halves.flops == found.flops / 2
    assert halves.layout.per_micro_batch == 8
    names = {message.name for message in halves.tally.messages}
    assert {"all_gather", "reduce_scatter"} <= names


def test_memory_is_found_without_being_told() -> None:
    """The trained network, what it keeps besides, and one that it only uses."""
    found = simulate(task(), SimulatedRank(1), granularity=1)
    top, bottom, step_counter = 4 * WIDE * NARROW, 4 * WIDE * WIDE, 4
    assert found.parameters == {
        "top": (WIDE * NARROW, WIDE * NARROW),
        "other networks": (WIDE * WIDE, WIDE * WIDE),
    }
    rest = found.rest.bytes
    assert rest["top"] == top
    assert rest["other networks"] == bottom
    assert rest["other state"] == 4 * NARROW
    assert rest[OPTIMIZER] == 2 * top + step_counter
    assert found.rest.total == 3 * top + bottom + step_counter + 4 * NARROW
    assert found.peak.bytes[BATCH] == 4 * IMAGES * WIDE
    of_two = simulate(task(), SimulatedRank(2), granularity=1)
    assert of_two.parameters["top"] == (WIDE * NARROW, WIDE * NARROW / 2)
    assert of_two.rest.bytes[GRADIENTS] == 0


def test_the_report() -> None:
    report = estimate(task(), 4).sections
    assert dict(report["work of a step"])["width"] == str(WIDE)
    assert dict(report["parameters"])["top"] == "15,000, of which a process holds 3,900"
    assert "sorts of steps" not in report or report["sorts of steps"] == []


def test_a_training_without_simulated_batches() -> None:
    with pytest.raises(UserError, match=r"regress: .* cannot be estimated"):
        estimate(task(simulates=False), 1)
