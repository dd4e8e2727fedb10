"""What is trained: the unit that a trainer drives, its batches, and its optimizer."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

import attrs
import torch
from torch import Tensor, nn

from dinov3_framework.contracts.running import Model, Rows
from dinov3_framework.schedules import Schedule


class Batch(Protocol):
    """What one process sees in one micro-batch."""

    @property
    def corrupt(self) -> tuple[str, ...]:
        """What could not be decoded and was substituted."""
        ...

    def to(self, device: torch.device, /) -> Self: ...
    def pin_memory(self) -> Self: ...


def _no_phase(name: str) -> AbstractContextManager[None]:
    return nullcontext()


@attrs.frozen
class Step:
    """Where a training is: one micro-batch of one optimizer step."""

    iteration: int  # from 0
    total: int  # iterations of the run
    values: Mapping[str, float] = attrs.field(factory=dict)  # of the schedules, by name
    # Times what happens in a ``with``: ``step.phase("teacher")``.
    phase: Callable[[str], AbstractContextManager[None]] = _no_phase

    def value(self, schedule: Schedule) -> float:
        """A schedule's value in this step."""
        return schedule.at(self.iteration, self.total)


@attrs.frozen
class StepResult:
    """What a micro-batch came to: the total to minimize, its terms, and metrics to log by name.

    ``losses`` are the terms before their weights. A term or a gradient that is not finite on any
    process makes the trainer skip the step on all of them.
    """

    total: Tensor
    losses: Mapping[str, Tensor] = attrs.field(factory=dict)
    metrics: Mapping[str, Tensor | float] = attrs.field(factory=dict)


class TrainUnit(abc.ABC):
    """What a trainer trains: networks, how a batch becomes a loss, what follows a step.

    ``networks`` are trained, by the names that their parameters begin with in checkpoints; the norm
    of the gradient is clipped for each of them. ``schedules`` are those besides the optimizer's;
    their values are logged under their names and are in ``Step.values``.
    """

    networks: Mapping[str, nn.Module]
    schedules: Mapping[str, Schedule] = {}

    def before_step(self, step: Step) -> None:
        """Called once before the micro-batches of a step."""

    @abc.abstractmethod
    def forward(self, batch: Any, step: Step) -> StepResult:
        """What one micro-batch comes to; the trainer calls ``backward`` on the total."""

    def after_step(self, step: Step, applied: bool) -> None:
        """Called after the optimizer, or with ``applied`` False where the step was skipped."""

    @abc.abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds besides the optimizer's, to save or load in place.

        The trained ones are ``student.<network>.<name>`` or whatever their official names are.
        """

    def changed_by_forward(self) -> Iterator[Tensor]:
        """Tensors that a forward pass changes, to be put back where a step is skipped."""
        for network in self.networks.values():
            yield from network.buffers()

    def notes(self) -> Mapping[str, Any]:
        """JSON values that checkpoints keep besides tensors."""
        return {}

    def accept(self, notes: Mapping[str, Any]) -> None:
        """Look at the notes of a checkpoint before it is loaded; may raise ``CheckpointError``."""

    def memory_roles(self) -> Mapping[str, Iterable[Tensor]]:
        """The tensors that it holds, by what they are for, as an estimate of memory names them.

        A tensor in several counts to the first. Networks that are in none are found where they
        were placed. By default the trained networks by their names, then the rest of ``state``.
        """
        trained = {
            name: [*network.parameters(), *network.buffers()]
            for name, network in self.networks.items()
        }
        return {**trained, "other state": list(self.state().values())}

    def simulation_sections(self) -> Mapping[str, Rows]:
        """What an estimate is to report of the unit after its steps, by title."""
        return {}

    def memory_hints(self) -> Sequence[str]:
        """Changes to the recipe that save memory, for the error when it runs out."""
        return ()

    @abc.abstractmethod
    def model(self) -> Model:
        """What is evaluated and exported, in eval mode."""

    def initial_model(self) -> Model:
        """The same before the first iteration, whole; called on every process."""
        raise NotImplementedError


class OptimizerFactory(abc.ABC):
    """Makes an optimizer of torch's interface, and knows the state that it keeps.

    Learning rates and weight decays of groups are set anew before each step.
    """

    @abc.abstractmethod
    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, dicts with ``params`` as torch takes them."""

    @abc.abstractmethod
    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimizer keeps of a parameter, as it is before the first step.

        It is there from the start, so that a checkpoint is loaded in place.
        """
