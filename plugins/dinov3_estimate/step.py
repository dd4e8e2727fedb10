"""A step of the trainer, taken by one simulated process; what it does and what it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3_estimate.ledger import GRADIENTS, OPTIMIZER, Ledger, Moment, local
from dinov3_estimate.recorder import OpRecorder
from dinov3_estimate.simulated import CPU, SimulatedRank, SimulatedSharder, fake_process_group
from dinov3_estimate.tally import Tally
from dinov3_framework.contracts.running import Rows
from dinov3_framework.contracts.training import TrainUnit
from dinov3_framework.data.loader import Layout
from dinov3_framework.errors import UserError
from dinov3_framework.runtime import collectives
from dinov3_framework.training import TrainingConfig
from dinov3_framework.training.clock import StepClock
from dinov3_framework.training.coordination import NullCoordinator
from dinov3_framework.training.metrics import FiniteCheck
from dinov3_framework.training.simulation import NEEDS_VALUES, SimulatedBatch, reason
from dinov3_framework.training.task import InitialState, TrainingTask
from dinov3_framework.training.trainer import Trainer

# CUDA's allocator gives memory in blocks of so many bytes.
GRANULARITY = 512


@frozen
class StepEstimate:
    """What one process has to do in a step of one sort, and what it takes."""

    batch: SimulatedBatch
    peak: Moment
    tally: Tally

    @property
    def flops(self) -> int:
        return sum(self.tally.flops().values())


@frozen
class Estimate:
    """What one process has to do in a step, and what it takes.

    ``peak``, ``tally`` and ``rows`` are those of the sort of steps that takes most memory.
    """

    config: TrainingConfig
    world_size: int  # all processes there are
    layout: Layout  # of those that share this training
    steps: Sequence[StepEstimate]
    rest: Moment  # between two steps
    parameters: Mapping[str, tuple[int, int]]  # by role: all, and those of this process
    trained_bytes: int  # of the parameters that this process updates
    sections: Mapping[str, Rows]  # what the unit reports

    @property
    def largest(self) -> StepEstimate:
        return max(self.steps, key=lambda each: each.peak.total)

    @property
    def peak(self) -> Moment:
        return self.largest.peak

    @property
    def tally(self) -> Tally:
        return self.largest.tally

    @property
    def flops(self) -> float:
        """Of this process in a mean step."""
        return sum(each.batch.share * each.flops for each in self.steps)


def simulate(task: TrainingTask, rank: SimulatedRank, granularity: int = GRANULARITY) -> Estimate:
    """Take a step of each sort as one of many processes; raises ``UserError`` if it cannot.

    Sizes are rounded up to ``granularity`` bytes.
    """
    config, method, span = task.config, task.method, rank.span
    method.simulated = True
    layout = Layout(
        world_size=len(span),
        rank=rank.rank - span.start,
        accumulation_steps=config.accumulation_steps,
        batch_size=config.batch_size,
    )
    prepared = task.prepare()
    recorder = OpRecorder(granularity)
    with fake_process_group(rank) as tensors:
        sharder = SimulatedSharder(config.parallel, tensors, collectives.current_group())
        try:
            unit = method.unit(prepared, sharder, InitialState.ABSENT, None)
            with tensors:
                trainer = _trainer(task, unit, recorder)
                _warm_up(trainer)
                roles = register_static(recorder.ledger, trainer, sharder.placed)
            steps = []
            for batch in method.simulated_batches(prepared, layout):
                with tensors:
                    steps.append(_step(trainer, recorder, batch, config.accumulation_steps))
        except NEEDS_VALUES as error:
            raise UserError(f"this recipe cannot be estimated: {reason(error)}") from error
        trained = [p for network in unit.networks.values() for p in network.parameters()]
        return Estimate(
            config=config,
            world_size=rank.world_size,
            layout=layout,
            steps=steps,
            rest=recorder.ledger.now(),
            parameters=_parameters(roles),
            trained_bytes=sum(local(p).numel() * p.element_size() for p in trained),
            sections=unit.simulation_sections(),
        )


# --------------------------------------------------------------------------- the trainer
class _Hooks(StepClock, NullCoordinator):
    """A trainer's clock and coordinator, which tell a recorder what goes on and ask no values.

    ``micro_batches`` count one micro-batch each, ``around`` what comes before and after them.
    """

    def __init__(self, recorder: OpRecorder) -> None:
        super().__init__(CPU)
        self.recorder = recorder
        self.networks: Sequence[nn.Module] = ()
        self.micro_batches: list[Tally] = []
        self.around = Tally()

    def begin(self) -> None:
        self.micro_batches, self.around = [], Tally()
        self._outside()

    def _outside(self) -> None:
        self.recorder.phase, self.recorder.tally = "optimizer", self.around

    def next(self, items: Iterator[Any]) -> Any:
        self.micro_batches.append(Tally())
        self.recorder.phase, self.recorder.tally = "batch", self.micro_batches[-1]
        batch = next(items)
        self.recorder.phase = "forward"
        return batch

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name != "backward":
            yield
            return
        self.recorder.phase = name
        yield
        for network in self.networks:
            self.recorder.ledger.assign(_gradients(network.parameters()), GRADIENTS)
        # The sums of metrics that follow belong to no micro-batch; the next one begins with
        # its batch.
        self._outside()

    def reduce(self, *_: Any) -> FiniteCheck:
        """Say that all is finite, of values that there are not."""
        return FiniteCheck({}, {}, False)


def _trainer(task: TrainingTask, unit: TrainUnit, recorder: OpRecorder) -> Trainer:
    """The trainer of a task, without data, checkpoints and observers."""
    hooks, config = _Hooks(recorder), task.config
    hooks.networks = list(unit.networks.values())
    absent: Any = None
    run: Any = SimpleNamespace(device=CPU)
    return Trainer(
        # From the second micro-batch on all are alike: gradients are there to be added to.
        config=evolve(config, accumulation_steps=min(config.accumulation_steps, 2)),
        unit=unit,
        optimizer=task.optimizer(unit),
        maker=absent,
        store=absent,
        observers={},
        run=run,
        clock=hooks,
        coordinator=hooks,
        reduce=hooks.reduce,
    )


def _warm_up(trainer: Trainer) -> None:
    """Let sharded tensors see each operation of the optimizer once, off the record.

    They learn what an operation gives by trying it on whole tensors without memory, and remember
    it. A recorder cannot tell those from the step's own: it would find whole networks in a process.
    """
    optimizer = trainer.optimizer
    optimizer.set_values(optimizer.values(0, trainer.config.iterations))
    for network in optimizer.networks.values():
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
    optimizer.clip(optimizer.gradient_norms())
    optimizer.step()
    optimizer.zero_grad()


def _step(
    trainer: Trainer, recorder: OpRecorder, batch: SimulatedBatch, micro_batches: int
) -> StepEstimate:
    hooks: Any = trainer.clock
    recorder.ledger.forget_peak()
    trainer.done = batch.iteration
    with recorder:
        trainer.step(batch.make() for _ in range(2))
    total, (first, *further) = hooks.around, hooks.micro_batches
    total.add(first)
    for each in further:
        total.add(each, micro_batches - 1)
    return StepEstimate(batch, recorder.ledger.peak(), total)


def register_static(
    ledger: Ledger, trainer: Trainer, placed: Sequence[nn.Module] = ()
) -> Mapping[str, Sequence[Tensor]]:
    """Tell a ledger what there is before a step, by role; ``placed`` are networks of any role."""
    unit = trainer.unit
    roles = {role: list(tensors) for role, tensors in unit.memory_roles().items()}
    roles["other networks"] = [t for each in placed for t in (*each.parameters(), *each.buffers())]
    for role, tensors in [*roles.items(), (OPTIMIZER, trainer.optimizer.state().values())]:
        ledger.assign((t for t in tensors if ledger.kind_of(t) is None), role)
    for network in unit.networks.values():
        for parameter in network.parameters():
            # Gradients of shards are known by how they come.
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(
                    lambda found: ledger.assign(_gradients([found]), GRADIENTS)
                )
    ledger.forget_peak()
    return roles


def _gradients(parameters: Any) -> Iterator[Tensor]:
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad


def _parameters(roles: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[int, int]]:
    """All parameters of each role, and those that this process holds; each counts once."""
    seen: set[int] = set()
    found = {}
    for role, tensors in roles.items():
        own = [t for t in tensors if isinstance(t, nn.Parameter) and id(t) not in seen]
        seen.update(map(id, own))
        if own:
            found[role] = (sum(t.numel() for t in own), sum(local(t).numel() for t in own))
    return found
