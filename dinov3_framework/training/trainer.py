"""The training loop. It knows no method, no network, no loss and no dataset."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from dinov3_framework.blame import blaming
from dinov3_framework.checkpoints.finite import nonfinite_tensors
from dinov3_framework.checkpoints.store import CheckpointStore, Restored
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.running import Observer, StepRecord
from dinov3_framework.contracts.training import Batch, Step, TrainUnit
from dinov3_framework.data.loader import BatchMaker, TrainingLoader
from dinov3_framework.data.workers import WorkerError
from dinov3_framework.errors import (
    DivergenceError,
    PeerError,
    UserError,
    first_few,
)
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.console import TrainingProgress
from dinov3_framework.runtime.lock import verify_held
from dinov3_framework.runtime.processes import note_place
from dinov3_framework.runtime.stopping import StopFlag
from dinov3_framework.schedules import Span, iterations_of
from dinov3_framework.training import DATA, ORIGIN, RECIPE_IDENTITY, STREAMS, TrainingConfig
from dinov3_framework.training.clock import StepClock
from dinov3_framework.training.coordination import NullCoordinator
from dinov3_framework.training.data import require_same_run
from dinov3_framework.training.metrics import (
    FiniteCheck,
    MetricsFile,
    format_metrics,
    reduce_step_metrics,
)
from dinov3_framework.training.optimizer import Optimizer
from dinov3_framework.training.run import TrainingRun

log = logging.getLogger(__name__)

Reduce = Callable[
    [Mapping[str, Tensor | float], Mapping[str, Tensor], bool, torch.device], FiniteCheck
]


class OutOfMemory(UserError):
    """A step did not fit."""


@frozen
class StepOutcome:
    """What all processes know after a step, and how long this one waited for its batches."""

    check: FiniteCheck
    wait: float  # seconds


@define
class Trainer:
    """Drives a train unit: loader, micro-batches, optimizer, checkpoints, observers."""

    config: TrainingConfig
    unit: TrainUnit
    optimizer: Optimizer
    maker: BatchMaker[Any, Any]
    store: CheckpointStore
    observers: Mapping[str, Observer]
    run: TrainingRun
    clock: StepClock
    coordinator: NullCoordinator = field(factory=NullCoordinator)
    reduce: Reduce = reduce_step_metrics
    done: int = 0  # iterations
    origin: Mapping[str, str] = {}  # of the first values, where they were not drawn
    identity: Mapping[str, Any] | None = None  # of the recipe, for checkpoints
    _skipped: int = field(default=0, init=False)  # in a row
    _streams: dict[str, Any] = field(factory=dict, init=False)  # where streams go on, by part

    @property
    def device(self) -> torch.device:
        return self.run.device

    # ------------------------------------------------------------------ state
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name, to save or to load in place."""
        return self.unit.state() | {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}

    def resume(self, step: int | None = None) -> bool:
        """Go on from the newest whole checkpoint, or that of ``step``; whether there was one."""
        restored = self.store.restore(self.tensors(), accept=self._accept, step=step)
        if restored is None:
            return False
        self.restored(restored)
        log.info("Going on after iteration %s, from %s", f"{self.done:,}", restored.path)
        return True

    def _accept(self, state: Mapping[str, Any]) -> None:
        folder = self.run.output_dir
        require_same_run(state, self.config, folder, self.identity, self.maker.dataset)
        self.unit.accept(state)

    def restored(self, restored: Restored) -> None:
        """Take over from a checkpoint what is no tensor."""
        self.done = restored.step
        self.origin = restored.state.get(ORIGIN, {})
        self._streams = restored.state.get(STREAMS, {})

    def _save(self) -> None:
        state: dict[str, Any] = {"iterations": self.config.iterations, **self.unit.notes()}
        if isinstance(self.maker.dataset, Dataset):
            state[DATA] = self.maker.dataset.digest()
        if self.identity:
            state[RECIPE_IDENTITY] = dict(self.identity)
        if self.origin:
            state[ORIGIN] = dict(self.origin)
        if self._streams:
            parts: list[Any] = collectives.all_gather_object(self._streams)
            state[STREAMS] = {name: each for part in parts for name, each in part.items()}
        tensors = self.tensors()
        if bad := nonfinite_tensors(tensors):
            raise DivergenceError(
                f"iteration {self.done:,}: not finite after the update, so not saved: "
                f"{first_few(bad)}\n    what is saved is sound, and the same command goes on from "
                "it; lower the learning rate, or look at the loss whose buffers these are"
            )
        path = self.store.save(self.done, tensors, state)
        for name, observer in self.observers.items():
            with _observing(name):
                observer.on_checkpoint(self.run, self.done, path)

    # ------------------------------------------------------------------ loop
    def train(self) -> None:
        """Run the remaining iterations; raises ``StopRequested`` after a signal, state saved."""
        total = self.config.iterations
        metrics = (
            MetricsFile(self.run.output_dir / "metrics.jsonl", self.done)
            if self.run.is_main
            else None
        )
        loader = TrainingLoader(
            self.maker,
            self.config.loader,
            self.done,
            total,
            self.device.type == "cuda",
            streams=self._streams,
        )
        batches = iter(loader)
        try:
            shown = self.run.is_main and self.coordinator.is_logging_rank
            with (
                StopFlag(self.config.parallel.timeout) as stop,
                TrainingProgress(self.done, total, shown) as bar,
            ):
                first = self._start_observers()
                if first:
                    log.info("iteration %s: %s", f"{self.done:,}", format_metrics(first))
                self._write(metrics, first)
                while self.done < total:
                    self._iterate(batches, stop, bar, metrics)
                # A signal in the last step; exports and evaluations to come may take long.
                late = torch.tensor(int(self.coordinator.any_stop(bool(stop))))
                if collectives.all_reduce_max(late).item():
                    raise stop.stopped(f"iteration {self.done:,}")
        except RuntimeError as error:
            loader.explain(error)
            raise
        finally:
            batches.close()
            if metrics is not None:
                metrics.close()

    def _iterate(
        self,
        batches: Iterator[Batch],
        stop: StopFlag,
        bar: TrainingProgress,
        metrics: MetricsFile | None,
    ) -> None:
        started = time.perf_counter()
        try:
            outcome = stop.limited(self.step, batches, self.coordinator.any_stop(bool(stop)))
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(error) from error
        except DivergenceError as error:
            self.coordinator.announce_exit(str(error))
            raise
        self.done += 1
        note_place(f"iteration {self.done}, observers and checkpoint")
        left = self.coordinator.gather_exit_reasons()
        seconds = time.perf_counter() - started
        measured = outcome.check.metrics | {
            "images_per_second": self.config.batch_size / seconds,
            "data_wait": outcome.wait,
        }
        if self._is_logged() or self.device.type != "cuda":  # it waits for the device
            measured |= self.clock.read()
        bar.update(self.done, measured["loss"], measured["images_per_second"], outcome.wait)
        observed, rare = self._call_observers(measured)
        if rare:
            log.info("iteration %s: %s", f"{self.done:,}", format_metrics(rare))
        if observed or self._is_logged():
            self._write(metrics, measured | observed)
        verify_held()
        last = self.done == self.config.iterations
        stopping = outcome.check.stop and not last
        if stopping or last or left or self._is_due(self.config.checkpoint.every):
            self._save()
        if left:
            raise PeerError(
                f"ended with others of the run, its state saved after iteration {self.done:,}\n    "
                + "\n    ".join(left)
            )
        if stopping:
            raise stop.stopped(f"iteration {self.done:,}")

    def _is_due(self, every: Span) -> bool:
        return self.done % iterations_of(every, self.config.iterations) == 0

    def _is_logged(self) -> bool:
        return self.done % self.config.log_every == 0 or self.done == self.config.iterations

    def _write(self, metrics: MetricsFile | None, values: Mapping[str, float]) -> None:
        if metrics is not None and values:
            metrics.write(self.done, values)

    # ------------------------------------------------------------------ one step
    def step(self, batches: Iterator[Batch], stop: bool = False) -> StepOutcome:
        """One optimizer step, or none if any process's losses or gradients are not finite."""
        iteration, total = self.done, self.config.iterations
        values = self.optimizer.values(iteration, total)
        self.optimizer.set_values(values)
        values |= {name: s.at(iteration, total) for name, s in self.unit.schedules.items()}
        step = Step(iteration, total, values, self.clock.phase)
        self.clock.begin()
        self.unit.before_step(step)
        before = [(tensor, tensor.clone()) for tensor in self.unit.changed_by_forward()]
        metrics, losses, wait = self._forward_backward(batches, step)
        norms = self.optimizer.gradient_norms()
        metrics |= values | {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        guarded = {f"loss {name!r}": loss for name, loss in losses.items()}
        guarded |= {f"gradient of {name}": norm for name, norm in norms.items()}
        check = self.reduce(metrics, guarded, stop, self.device)
        if check.nonfinite:
            for tensor, value in before:
                tensor.copy_(value)
            self._skip(check.nonfinite)
            self.unit.after_step(step, applied=False)
        else:
            self._skipped = 0
            with self.clock.phase("optimizer"):
                self.optimizer.clip(norms)
                self.optimizer.step()
                self.unit.after_step(step, applied=True)
        self.optimizer.zero_grad()
        return StepOutcome(check, wait)

    def _forward_backward(
        self, batches: Iterator[Batch], step: Step
    ) -> tuple[dict[str, Tensor | float], dict[str, Tensor], float]:
        """Gradients of one step's batch; metrics and losses are means over its micro-batches."""
        count, wait = self.config.accumulation_steps, 0.0
        metrics: dict[str, Any] = defaultdict(float)
        losses: dict[str, Any] = defaultdict(float)
        where = f"iteration {step.iteration + 1}"
        for micro in range(count):
            asked = time.perf_counter()
            note_place(f"{where}, waiting for its batch")
            batch = self.coordinator.next(batches).to(self.device)
            wait += time.perf_counter() - asked
            note_place(f"{where}, forward and backward")
            # Drop path and RoPE augmentation draw from the global generator.
            rank = collectives.rank()
            seed = keyed_seed(self.config.seed, "forward", step.iteration, micro, rank)
            torch.manual_seed(seed)
            result = self.unit.forward(batch, step)
            with self.clock.phase("backward"):
                (result.total / count).backward()  # type: ignore[no-untyped-call]
            for name, loss in result.losses.items():
                losses[name] = losses[name] + loss / count
            terms = {**result.metrics, **result.losses, "loss": result.total.detach()}
            for name, value in terms.items():
                metrics[name] = metrics[name] + value / count
        return dict(metrics), dict(losses), wait

    def _skip(self, nonfinite: Mapping[str, list[int]]) -> None:
        self._skipped += 1
        what = ", ".join(
            f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in nonfinite.items()
        )
        message = f"iteration {self.done + 1:,}: not finite: {what}"
        log.warning("%s; the step is skipped, weights stay as they are", message)
        if self._skipped > self.config.max_nonfinite_steps:
            raise DivergenceError(
                f"{message}\n    {self._skipped} steps in a row (max_nonfinite_steps = "
                f"{self.config.max_nonfinite_steps}); what is saved is sound. Lower the learning "
                "rate or look at the batch and the loss named above."
            )

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        count, what = self.maker.layout.per_micro_batch, self.maker.describe_item()
        each = f" ({what} each)" if what else ""
        return OutOfMemory(
            f"out of memory with {count} images per process and micro-batch{each}: {error}\n"
            f"    What helps: {', '.join([*_savings(self.config), *self.unit.memory_hints()])}."
        )

    # ------------------------------------------------------------------ observers
    def _start_observers(self) -> dict[str, float]:
        added: dict[str, float] = {}
        for name, observer in self.observers.items():
            with _observing(name):
                added |= observer.on_start(self.run, self.done) or {}
        return added

    def _call_observers(
        self, measured: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """What observers add, and those of it that are not of every step.

        Observers that follow metrics come last, and see all of them.
        """
        added: dict[str, float] = {}
        rare: dict[str, float] = {}
        last = self.done == self.config.iterations
        for name in sorted(self.observers, key=lambda n: self.observers[n].follows_metrics):
            if last or self._is_due(self.config.observers[name].every):
                observer = self.observers[name]
                seen = {**measured, **added} if observer.follows_metrics else dict(measured)
                with _observing(name):
                    new = observer.on_step(self.run, StepRecord(self.done, seen)) or {}
                added |= new
                if self.config.observers[name].every != 1:
                    rare |= new
        return added, rare

    def conclude(self) -> dict[str, Any]:
        """What observers add to the results at the end."""
        results: dict[str, Any] = {}
        for name, observer in self.observers.items():
            with _observing(name):
                for key, value in (observer.on_end(self.run) or {}).items():
                    known = results.get(key)
                    both = isinstance(known, dict) and isinstance(value, Mapping)
                    results[key] = {**(known or {}), **value} if both else value
        return results

    def close(self, error: BaseException | None) -> None:
        """Tell observers that the run ends; what they raise is logged and changes nothing."""
        for name, observer in self.observers.items():
            try:
                observer.on_close(self.run, error)
            except (Exception, SystemExit):
                log.exception("observer %r failed while the run was closed", name)


@contextmanager
def _observing(name: str) -> Iterator[None]:
    """Report what goes wrong in an observer, or in a loader of its own, as the observer's."""
    try:
        with blaming(lambda: f"observer {name!r}"):
            yield
    except WorkerError as error:
        raise WorkerError(f"observer {name!r}: {error}") from error
    except RuntimeError as error:
        if complaint := WorkerError.of(error):
            raise WorkerError(
                f"observer {name!r}: {complaint} of its own loader\n    {error}"
            ) from error
        raise


def _savings(config: TrainingConfig) -> Iterator[str]:
    """Changes to a recipe after which a step takes less memory."""
    parallel = config.parallel
    if parallel.checkpointing != "full":
        yield 'parallel.checkpointing = "full"'
    if parallel.param_dtype != "bf16":
        yield 'parallel.param_dtype = "bf16"'
    if parallel.replicas > 1:
        yield "fewer parallel.replicas"
    yield from ("a larger accumulation_steps", "more processes")
