"""What the plugin's components do; imports torch, which their configs do without."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from dinov3_faults import (
    CenterConfig,
    FlakyConfig,
    PauseConfig,
    PoisonConfig,
    RaiseAtConfig,
    ScaledMeanConfig,
    SignalAtConfig,
    TroubleConfig,
)

from dinov3_framework import (
    CorruptSampleError,
    Dataset,
    Loss,
    LossResult,
    Observer,
    OutputError,
    Run,
    Sample,
    StepOutputs,
    StepRecord,
)
from dinov3_framework.data.pictures import read_image
from dinov3_framework.runtime import collectives

RANK = int(os.environ.get("RANK", "0"))


class SignalAt(Observer):
    def __init__(self, config: SignalAtConfig) -> None:
        self.config = config

    def on_step(self, run: Run, step: StepRecord) -> None:
        if step.iteration == self.config.iteration and self.config.rank == RANK:
            os.kill(os.getpid(), getattr(signal, self.config.signal))

    def on_end(self, run: Run) -> None:
        if self.config.iteration == 0 and self.config.rank == RANK:
            os.kill(os.getpid(), getattr(signal, self.config.signal))


class RaiseAt(Observer):
    def __init__(self, config: RaiseAtConfig) -> None:
        self.config = config

    def on_step(self, run: Run, step: StepRecord) -> None:
        if step.iteration == self.config.iteration and self.config.rank == RANK:
            if self.config.what == "exit":
                sys.exit(0)
            if self.config.what == "fault":
                raise KeyError("top hat")
            raise OutputError("the observer cannot go on")


class Pause(Observer):
    def __init__(self, config: PauseConfig) -> None:
        self.config = config

    def on_step(self, run: Run, step: StepRecord) -> None:
        time.sleep(self.config.seconds)


class Poison(Loss):
    needs = frozenset({"student.global.class"})

    def __init__(self, config: PoisonConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: StepOutputs) -> LossResult:
        poisoned = step.iteration + 1 in self.config.iterations and self.config.rank == RANK
        factor = float(self.config.value) if poisoned else 0.0
        return LossResult((step.student["global"].cls * factor).sum())


class Trouble(Loss):
    needs = frozenset({"student.global.class"})

    def __init__(self, config: TroubleConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: StepOutputs) -> LossResult:
        if step.iteration + 1 == self.config.iteration and self.config.rank == RANK:
            if self.config.what == "sleep":
                time.sleep(3600)
            raise torch.OutOfMemoryError("tried to allocate 1.5 TiB")
        return LossResult((step.student["global"].cls * 0).sum())


class Center(Loss):
    needs = frozenset({"student.global.class", "teacher.global.class"})

    def __init__(self, config: CenterConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("center", torch.zeros(()))

    def forward(self, step: StepOutputs) -> LossResult:
        mean = step.teacher["global"].cls.float().mean()
        mean = collectives.all_reduce_sum(mean.clone()) / collectives.world_size()
        poison = float("nan") if step.iteration + 1 in self.config.poisoned else 1.0
        if self.config.late:
            loss = ((step.student["global"].cls - self.center) ** 2).mean()
            self.center.lerp_(mean * poison, 0.5)
            return LossResult(loss)
        self.center.lerp_(mean * poison + step.iteration + 1, 0.5)
        loss = ((step.student["global"].cls - self.center) ** 2).mean()
        return LossResult(loss, {"center": self.center.clone()})


class ScaledMean(Loss):
    needs = frozenset({"student.global.class", "student.global.patches"})

    def __init__(self, config: ScaledMeanConfig) -> None:
        super().__init__()

    def forward(self, step: StepOutputs) -> LossResult:
        view = step.student["global"]
        return LossResult(((view.cls - view.patches.mean(2)) ** 2).mean())


class Flaky(Dataset):
    def __init__(self, config: FlakyConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> Sample:
        mended = self.config.unless and Path(self.config.unless).exists()
        if self.config.rank in (-1, RANK) and not mended:
            self._trouble(index)
        noise = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (self.channels, 28, 28), generator=noise, dtype=torch.uint8)
        return Sample(image)

    def _trouble(self, index: int) -> None:
        config = self.config
        if index == config.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == config.fault_at:
            raise KeyError("top hat")
        if index == config.hang_at:
            time.sleep(3600)
        if index == config.starve_at:
            _starve(self.channels)
        if config.corrupt_every and index % config.corrupt_every == 0:
            raise CorruptSampleError(f"image {index}", "broken on purpose")


def _starve(channels: int) -> None:
    """Decode an image of 100 megapixels with 16 MB of address space left."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder, "large.png")
        Image.new("L", (10_000, 10_000)).save(large)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), before[1]))
        try:
            read_image(large, channels)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
