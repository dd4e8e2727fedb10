"""An optimizer, a launcher, an observer."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_example_plugin import BackgroundConfig, JournalConfig, RmsPropConfig
from dinov3_framework import (
    Job,
    JobHandle,
    Launcher,
    Observer,
    OptimizerFactory,
    Resources,
    Run,
    StepRecord,
)


class RmsProp(OptimizerFactory):
    """Builds ``torch.optim.RMSprop``."""

    def __init__(self, config: RmsPropConfig) -> None:
        self.config = config

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(list(groups), alpha=self.config.smoothing)

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "square_avg": torch.zeros_like(parameter)}


class BackgroundJob(JobHandle):
    """A process that goes on by itself."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log, self.id = process, log, str(process.pid)

    def wait(self) -> int:
        return self.process.wait()

    def describe(self) -> str:
        return f"process {self.id}, which writes to {self.log}"

    def cancel(self) -> None:
        self.process.terminate()


class NotBegun(JobHandle):
    """A job that did not begin, since one that it was to follow failed with ``code``."""

    def __init__(self, code: int) -> None:
        self.code = code

    def wait(self) -> int:
        return self.code


class Background(Launcher):
    """Starts the command of a job by itself."""

    def __init__(self, config: BackgroundConfig) -> None:
        self.config = config

    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        for earlier in after:
            if code := earlier.wait():
                return NotBegun(code)
        log = job.output_dir.with_name(job.output_dir.name + self.config.suffix)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(job.command, stdout=output, stderr=subprocess.STDOUT)
        return BackgroundJob(process, log)

    def preview(self, job: Job, resources: Resources | None = None) -> str:
        return f"one process, with its output in {job.output_dir.name}{self.config.suffix}"


class Journal(Observer):
    """A line for each thing that happens; by the main process."""

    def __init__(self, config: JournalConfig) -> None:
        self.lines: Path | None = None

    def on_start(self, run: Run, iteration: int) -> None:
        self.lines = run.output_dir / "journal.txt" if run.is_main else None
        self._write(f"begins after iteration {iteration}")

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float] | None:
        self._write(f"iteration {step.iteration}: loss {step.metrics['loss']:.4f}")
        return None

    def on_checkpoint(self, run: Run, iteration: int, path: Path) -> None:
        self._write(f"checkpoint after iteration {iteration}")

    def on_close(self, run: Run, error: BaseException | None) -> None:
        self._write("ends" if error is None else f"ends by {type(error).__name__}")

    def _write(self, line: str) -> None:
        if self.lines is not None:
            with self.lines.open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")
