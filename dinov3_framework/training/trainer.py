"""The training loop. It knows no loss, no backbone and no dataset."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from attrs import define, field
from dinov3_ssl.configs import TrainingConfig, momentum
from dinov3_ssl.lockstep import Alone
from dinov3_ssl.networks import Networks
from dinov3_ssl.objective import Objective
from torch import Tensor

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.contracts.running import Observer, StepRecord
from dinov3_framework.data.loader import Batch, BatchMaker, TrainingLoader
from dinov3_framework.errors import DivergenceError, PeerError, UserError
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.console import TrainingProgress
from dinov3_framework.runtime.stopping import StopFlag
from dinov3_framework.training.clock import StepClock
from dinov3_framework.training.metrics import Agreement, MetricsFile, agree
from dinov3_framework.training.optimizer import Optimizer
from dinov3_framework.training.run import TrainingRun

log = logging.getLogger(__name__)


class OutOfMemory(UserError):
    """A step did not fit."""


@define
class Trainer:
    """All that a step touches, and the order in which it does."""

    config: TrainingConfig
    networks: Networks
    objective: Objective
    optimizer: Optimizer
    maker: BatchMaker
    store: CheckpointStore
    observers: Mapping[str, Observer]
    run: TrainingRun
    done: int = 0  # iterations
    origin: Mapping[str, str] = {}  # of the first values, where they were not drawn
    memory: Mapping[str, Any] = {}  # what checkpoints remember besides tensors
    # Looks at what a checkpoint remembers before it is loaded, and may raise.
    accept: Callable[[Mapping[str, Any]], None] | None = None
    peers: Alone = field(factory=Alone)
    _skipped: int = field(default=0, init=False)  # in a row

    @property
    def device(self) -> torch.device:
        return self.run.device

    @property
    def clock(self) -> StepClock:
        return self.objective.clock

    # ------------------------------------------------------------------ state
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name, to save or to load in place."""
        optimizer = {f"optimizer.{k}": v for k, v in self.optimizer.named_state().items()}
        return self.networks.named_state() | self.objective.named_state() | optimizer

    def resume(self, step: int | None = None) -> bool:
        """Go on from the newest whole checkpoint, or that of ``step``; whether there was one."""
        restored = self.store.restore(self.tensors(), accept=self.accept, step=step)
        if restored is None:
            return False
        self.done = restored.step
        self.origin = restored.state.get("init_from", {})
        log.info("Going on after iteration %s, from %s", f"{self.done:,}", restored.path)
        return True

    def _save(self) -> None:
        state: dict[str, Any] = {"iterations": self.config.iterations, **self.memory}
        if self.origin:
            state["init_from"] = dict(self.origin)
        self.store.save(self.done, self.tensors(), state)

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
            self.maker, self.config.loader, self.done, total, self.device.type == "cuda"
        )
        batches = iter(loader)
        try:
            shown = self.run.is_main and self.peers.speaks
            with StopFlag() as stop, TrainingProgress(self.done, total, shown) as bar:
                self._write(metrics, self._start_observers())
                while self.done < total:
                    self._iterate(batches, stop, bar, metrics)
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
            agreement, wait = self._step(batches, self.peers.share(bool(stop)))
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(error) from error
        except DivergenceError as error:
            self.peers.leave(str(error))
            raise
        self.done += 1
        left = self.peers.last_words()
        seconds = time.perf_counter() - started
        figures = agreement.metrics | {
            "images_per_second": self.config.batch_size / seconds,
            "data_wait": wait,
        }
        if self._is_logged() or self.device.type != "cuda":  # it waits for the device
            figures |= self.clock.read()
        bar.update(self.done, figures["loss"], figures["images_per_second"], wait)
        observed = self._call_observers(figures)
        if observed or self._is_logged():
            self._write(metrics, figures | observed)
        last = self.done == self.config.iterations
        stopping = agreement.stop and not last
        if stopping or last or left or self.done % self.config.checkpoint.every == 0:
            self._save()
        if left:
            raise PeerError(
                f"ended with others of the run, its state saved after iteration {self.done:,}\n    "
                + "\n    ".join(left)
            )
        if stopping:
            raise stop.stopped(self.done)

    def _is_logged(self) -> bool:
        return self.done % self.config.log_every == 0 or self.done == self.config.iterations

    def _write(self, metrics: MetricsFile | None, figures: Mapping[str, float]) -> None:
        if metrics is not None and figures:
            metrics.write(self.done, figures)

    # ------------------------------------------------------------------ one step
    def _step(self, batches: Iterator[Batch], stop: bool) -> tuple[Agreement, float]:
        """One optimizer step, or none if anybody's losses or gradients are not finite."""
        iteration, total = self.done, self.config.iterations
        values = self.optimizer.values(iteration, total)
        values["momentum"] = momentum(self.config).at(iteration, total)
        self.optimizer.set_values(values)
        self.clock.begin()
        for name in self.networks.start_anchors(iteration):
            log.info("Anchor of loss %r begins after iteration %d", name, iteration)
        buffers = [(tensor, tensor.clone()) for tensor in self.buffers()]
        figures, losses, wait = self._forward_backward(batches, iteration)
        norms = self.optimizer.gradient_norms()
        figures |= values | {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        guarded = {f"loss {name!r}": loss for name, loss in losses.items()}
        guarded |= {f"gradient of {name}": norm for name, norm in norms.items()}
        agreement = agree(figures, guarded, stop, self.device)
        if agreement.nonfinite:
            for tensor, before in buffers:
                tensor.copy_(before)
            self._skip(agreement.nonfinite)
        else:
            self._skipped = 0
            with self.clock.phase("optimizer"):
                self.optimizer.clip(norms)
                self.optimizer.step()
                self.networks.update_teacher(values["momentum"])
        for name in self.networks.refresh_anchors(iteration + 1):
            log.info("Anchor of loss %r refreshed after iteration %d", name, iteration + 1)
        self.optimizer.zero_grad()
        return agreement, wait

    def buffers(self) -> Iterator[Tensor]:
        """What a forward pass may change without the optimizer."""
        yield from self.objective.named_state().values()
        yield from self.networks.student.buffers()

    def _forward_backward(
        self, batches: Iterator[Batch], iteration: int
    ) -> tuple[dict[str, Tensor | float], dict[str, Tensor], float]:
        """Gradients of one step's batch; figures and losses are means over its passes."""
        passes, wait = self.config.accumulation_steps, 0.0
        figures: dict[str, Any] = defaultdict(float)
        losses: dict[str, Any] = defaultdict(float)
        for micro in range(passes):
            asked = time.perf_counter()
            batch = self.peers.next(batches).to(self.device)
            wait += time.perf_counter() - asked
            # Drop path and RoPE augmentation draw from the global generator.
            rank = collectives.rank()
            torch.manual_seed(keyed_seed(self.config.seed, "forward", iteration, micro, rank))
            outcome = self.objective(batch, iteration)
            with self.clock.phase("backward"):
                (outcome.total / passes).backward()
            for name, loss in outcome.losses.items():
                losses[name] = losses[name] + loss / passes
            terms = {**outcome.metrics, **outcome.losses, "loss": outcome.total.detach()}
            for name, value in terms.items():
                figures[name] = figures[name] + value / passes
        return dict(figures), dict(losses), wait

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
        layout = self.maker.layout
        views = ", ".join(
            f"{v.crops} x {v.size} px" for v in self.maker.augmentation.views.values()
        )
        return OutOfMemory(
            f"out of memory with {layout.per_pass} images per process and pass ({views} each): "
            f"{error}\n    What helps: {', '.join(_savings(self.config))}.\n"
            f"    dinov3-run RECIPE --rehearse --world-size {layout.world_size} estimates what a "
            "step takes."
        )

    # ------------------------------------------------------------------ observers
    def _start_observers(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for observer in self.observers.values():
            figures |= observer.on_start(self.run, self.done) or {}
        return figures

    def _call_observers(self, figures: Mapping[str, float]) -> dict[str, float]:
        record = StepRecord(self.done, dict(figures))
        added: dict[str, float] = {}
        for name, observer in self.observers.items():
            every = self.config.observers[name].every
            if self.done % every == 0 or self.done == self.config.iterations:
                added |= observer.on_step(self.run, record) or {}
        return added


def _savings(config: TrainingConfig) -> Iterator[str]:
    """Changes to a recipe after which a step takes less memory."""
    parallel = config.parallel
    if parallel.checkpointing != "full":
        yield 'parallel.checkpointing = "full"'
    if parallel.param_dtype != "bf16":
        yield 'parallel.param_dtype = "bf16"'
    if parallel.replicas > 1:
        yield "fewer parallel.replicas"
    for name, loss in config.losses.items():
        if getattr(loss, "chunk", 0) is None:
            yield f"losses.{name}.chunk"
    yield from ("a larger accumulation_steps", "more processes", "smaller crops")
    yield "fewer prototypes"
