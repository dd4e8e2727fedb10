"""Promises of a train unit and of the method that makes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.configs import replace
from dinov3_framework.contracts.training import Step, StepResult
from dinov3_framework.data.loader import TrainingLoader
from dinov3_framework.errors import first_few
from dinov3_framework.parallel.sharder import MetaSharder
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.testing.suite import Suite
from dinov3_framework.training.task import InitialState, TrainingTask
from dinov3_framework.training.trainer import Trainer

_STEPS = 3


class TrainUnitSuite(Suite):
    """Promises of the train unit of a training task, driven by the trainer for three steps.

    ``config`` is that of the task: a recipe that is small and has no fewer iterations.
    """

    kind = "train unit of task"
    contract = TrainingTask

    def arguments(self) -> dict[str, Any]:
        return {"registry": self.known}

    def build(self) -> Any:
        task: TrainingTask = super().build()
        task.config = replace(task.config, loader=replace(task.config.loader, workers=0))
        return task

    @contextmanager
    def trainer(self, folder: Path) -> Iterator[Trainer]:
        """A trainer in ``folder``, in a process group of one, before its first step."""
        with torch.random.fork_rng(devices=[]), process_group(torch.device("cpu"), timeout=60):
            task: TrainingTask = self.build()
            plan = task.check(1)
            assert not plan.missing, f"this machine lacks: {first_few(plan.missing)}"
            prepared = plan.prepared.prepared
            trainer = task.trainer(prepared, plan.prepared.dataset, folder)
            if not trainer.resume():
                task.method.begin(trainer, prepared)
            yield trainer

    def batches(self, trainer: Trainer) -> Iterator[Any]:
        loader = trainer.config.loader
        return iter(TrainingLoader(trainer.maker, loader, trainer.done, _STEPS, False))

    def train(self, trainer: Trainer, steps: int) -> None:
        batches = self.batches(trainer)
        for _ in range(steps):
            bad = trainer.step(batches).check.nonfinite
            trainer.done += 1
            assert not bad, f"in step {trainer.done} not finite: {first_few(bad)}"

    def forward(self, trainer: Trainer) -> StepResult:
        """What ``forward`` gives for the first micro-batch of the next step."""
        unit, done, total = trainer.unit, trainer.done, trainer.config.iterations
        values = trainer.optimizer.values(done, total)
        values |= {name: s.at(done, total) for name, s in unit.schedules.items()}
        torch.manual_seed(done)
        return unit.forward(
            next(self.batches(trainer)).to(trainer.device), Step(done, total, values)
        )

    # ------------------------------------------------------------------ promises
    def test_forward(self, tmp_path: Path) -> None:
        """``forward`` gives a finite total whose gradient reaches every network, and metrics."""
        with self.trainer(tmp_path) as trainer:
            trainer.unit.before_step(Step(0, trainer.config.iterations))
            result = self.forward(trainer)
            assert isinstance(result, StepResult), (
                f"forward() must give a StepResult, gave {result!r}"
            )
            for name, loss in {"total": result.total, **result.losses}.items():
                is_scalar = isinstance(loss, Tensor) and loss.ndim == 0
                assert is_scalar and loss.isfinite(), f"{name} must be a finite scalar, is {loss!r}"
            for name, metric in {**result.losses, **result.metrics}.items():
                attached = isinstance(metric, Tensor) and metric.requires_grad
                assert not attached, f"{name!r} holds on to the graph; detach() it"
            result.total.backward()  # type: ignore[no-untyped-call]
            for name, network in trainer.unit.networks.items():
                gradients = [p.grad for p in network.parameters() if p.grad is not None]
                reached = any(bool(gradient.any()) for gradient in gradients)
                assert reached, f"no gradient reaches the network {name!r}"

    def test_state(self, tmp_path: Path) -> None:
        """``state`` holds every tensor of ``networks``, in place, under names known beforehand."""
        with self.trainer(tmp_path) as trainer:
            unit = trainer.unit
            state, again = unit.state(), unit.state()
            held = {_place(tensor) for tensor in state.values()}
            absent = [
                f"{network}.{name}"
                for network, module in unit.networks.items()
                for name, tensor in module.state_dict(keep_vars=True).items()
                if _place(tensor) not in held
            ]
            assert not absent, f"state() leaves out of its networks: {first_few(absent)}"
            moved = [n for n in state if n not in again or _place(state[n]) != _place(again[n])]
            assert not moved, f"state() gives copies, not what is loaded: {first_few(moved)}"
            taken = [name for name in state if name.startswith("optimizer.")]
            assert not taken, f"state() has names that are the optimizer's: {first_few(taken)}"
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        task: TrainingTask = self.build()
        prepared, sharder = task.check(1).prepared.prepared, MetaSharder(task.config.parallel)
        absent_unit = task.method.unit(prepared, sharder, InitialState.ABSENT, None)
        expected = {name: list(tensor.shape) for name, tensor in absent_unit.state().items()}
        odd = [n for n in shapes | expected if shapes.get(n) != expected.get(n)]
        assert not odd, f"on the meta device, names or shapes of state() differ: {first_few(odd)}"

    def test_skipped_step(self, tmp_path: Path) -> None:
        """``changed_by_forward`` names all that a forward pass changes."""
        with self.trainer(tmp_path) as trainer:
            self.train(trainer, 1)
            trainer.unit.before_step(Step(trainer.done, trainer.config.iterations))
            before = _copies(trainer.tensors())
            kept = [(tensor, tensor.clone()) for tensor in trainer.unit.changed_by_forward()]
            self.forward(trainer).total.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
            changed = _changed(before, trainer.tensors())
            assert not changed, f"forward() changes what nothing puts back: {first_few(changed)}"

    def test_memory_roles(self, tmp_path: Path) -> None:
        """``memory_roles`` has a role for every tensor of the state."""
        with self.trainer(tmp_path) as trainer:
            roles = trainer.unit.memory_roles()
            held = {_place(tensor) for tensors in roles.values() for tensor in tensors}
            absent = [n for n, t in trainer.unit.state().items() if _place(t) not in held]
            assert not absent, f"memory_roles() leaves out of state(): {first_few(absent)}"

    def test_model(self, tmp_path: Path) -> None:
        """What is evaluated is in eval mode."""
        with self.trainer(tmp_path) as trainer:
            self.train(trainer, 1)
            model = trainer.unit.model()
            for part in (model.backbone, model.head):
                assert part is None or not part.training, "model() is in training mode"

    def test_resuming(self, tmp_path: Path) -> None:
        """A run that goes on from a checkpoint gives the same bits as one that was not stopped."""
        with self.trainer(tmp_path / "whole") as trainer:
            self.train(trainer, 1)
            notes = json.loads(json.dumps(dict(trainer.unit.notes())))
            store = CheckpointStore(tmp_path / "resumed" / "checkpoints")
            store.save(trainer.done, trainer.tensors(), {"iterations": _STEPS, **notes})
            self.train(trainer, _STEPS - 1)
            whole = _copies(trainer.tensors())
        with self.trainer(tmp_path / "resumed") as trainer:
            assert trainer.done == 1, "does not go on from its checkpoint"
            self.train(trainer, _STEPS - 1)
            changed = _changed(whole, trainer.tensors())
            assert not changed, f"a resumed run has other values of {first_few(changed)}"


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """What tells whether two tensors are the same memory."""
    return tensor.data_ptr(), tensor.shape


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    return [n for n, tensor in before.items() if not torch.equal(tensor, now[n].detach())]
