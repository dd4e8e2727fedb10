"""A plugin that breaks runs on purpose; tests put its folder on PYTHONPATH."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Literal

from dinov3_framework import (
    Component,
    DatasetConfig,
    LossConfig,
    ObserverConfig,
    config,
    hookimpl,
    option,
)

RANK = int(os.environ.get("RANK", "0"))


@config
class SignalAtConfig(ObserverConfig):
    """Sends a signal to its own process after an iteration."""

    signal: str = option("name of the signal", default="SIGKILL")
    iteration: int = option("iteration after which it is sent")
    rank: int = option("process that it is sent to", default=0)


class Silent:
    """An observer without the base class, whose module imports torch."""

    def check(self, build: Any, images: Any) -> None:
        return None

    def on_start(self, run: Any, iteration: int) -> None:
        return None

    def on_end(self, run: Any) -> None:
        return None


class SignalAt(Silent):
    def __init__(self, config: SignalAtConfig) -> None:
        self.config = config

    def on_step(self, run: Any, step: Any) -> None:
        if step.iteration == self.config.iteration and self.config.rank == RANK:
            os.kill(os.getpid(), getattr(signal, self.config.signal))


@config
class PoisonConfig(LossConfig):
    """A loss that is 0, or NaN or infinite in the chosen iterations on one process."""

    iterations: tuple[int, ...] = option("iterations (from 1) that it poisons")
    rank: int = option("process that it poisons", default=0)
    value: Literal["NaN", "infinity", "-infinity"] = option("what it gives", default="NaN")


def build_poison(config: PoisonConfig) -> Any:
    from dinov3_framework import Loss, LossResult

    class Poison(Loss):
        needs = frozenset({"student.global.class"})

        def forward(self, step: Any) -> LossResult:
            poisoned = step.iteration + 1 in config.iterations and config.rank == RANK
            factor = float(config.value) if poisoned else 0.0
            return LossResult((step.student["global"].cls * factor).sum())

    return Poison()


@config
class TroubleConfig(LossConfig):
    """A loss that is 0, or runs out of memory or hangs in one iteration on one process."""

    what: Literal["out_of_memory", "sleep"] = option("what happens")
    iteration: int = option("iteration (from 1) that it happens in", default=2)
    rank: int = option("process that it happens to", default=0)


def build_trouble(config: TroubleConfig) -> Any:
    import torch

    from dinov3_framework import Loss, LossResult

    class Trouble(Loss):
        needs = frozenset({"student.global.class"})

        def forward(self, step: Any) -> LossResult:
            if step.iteration + 1 == config.iteration and config.rank == RANK:
                if config.what == "sleep":
                    time.sleep(3600)
                raise torch.OutOfMemoryError("tried to allocate 1.5 TiB")
            return LossResult((step.student["global"].cls * 0).sum())

    return Trouble()


@config
class CentreConfig(LossConfig):
    """A loss with a state: the distance to a running mean of what it has seen."""

    poisoned: tuple[int, ...] = option("iterations (from 1) in which it is NaN", default=())


def build_centre(config: CentreConfig) -> Any:
    import torch

    from dinov3_framework import Loss, LossResult
    from dinov3_framework.runtime import collectives

    class Centre(Loss):
        needs = frozenset({"student.global.class", "teacher.global.class"})

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(()))

        def forward(self, step: Any) -> LossResult:
            mean = step.teacher["global"].cls.float().mean()
            mean = collectives.all_reduce_sum(mean.clone()) / collectives.world_size()
            poison = float("nan") if step.iteration + 1 in config.poisoned else 1.0
            self.centre.lerp_(mean * poison + step.iteration + 1, 0.5)
            loss = ((step.student["global"].cls - self.centre) ** 2).mean()
            return LossResult(loss, {"centre": self.centre.clone()})

    return Centre()


@config
class RaiseAtConfig(ObserverConfig):
    """Raises after an iteration on one process."""

    iteration: int = option("iteration after which it is raised")
    rank: int = option("process that raises", default=0)


class RaiseAt(Silent):
    def __init__(self, config: RaiseAtConfig) -> None:
        self.config = config

    def on_step(self, run: Any, step: Any) -> None:
        from dinov3_framework import OutputError

        if step.iteration == self.config.iteration and self.config.rank == RANK:
            raise OutputError("the observer cannot go on")


@config
class ScaledMeanConfig(LossConfig):
    """A loss that is a mean over samples, so that halves of a batch average to the whole."""


def build_scaled_mean(config: ScaledMeanConfig) -> Any:
    from dinov3_framework import Loss, LossResult

    class ScaledMean(Loss):
        needs = frozenset({"student.global.class", "student.global.patches"})

        def forward(self, step: Any) -> LossResult:
            view = step.student["global"]
            return LossResult(((view.cls - view.patches.mean(2)) ** 2).mean())

    return ScaledMean()


@config
class FlakyConfig(DatasetConfig):
    """Noise images of which some are corrupt, or end or hang whoever reads them."""

    size: int = option("images", default=64)
    corrupt_every: int = option("every so many images is corrupt; 0 for none", default=0)
    kill_at: int = option("image that kills its reader", default=-1)
    hang_at: int = option("image that hangs its reader", default=-1)
    rank: int = option("process that has these troubles; -1 for all", default=-1)


def build_flaky(config: FlakyConfig, *, channels: int) -> Any:
    import torch

    from dinov3_framework import CorruptSampleError, Dataset, Sample

    class Flaky(Dataset):
        def __len__(self) -> int:
            return config.size

        def __getitem__(self, index: int) -> Sample:
            if config.rank in (-1, RANK):
                self._trouble(index)
            noise = torch.Generator().manual_seed(index)
            image = torch.randint(0, 256, (channels, 28, 28), generator=noise, dtype=torch.uint8)
            return Sample(image)

        def _trouble(self, index: int) -> None:
            if index == config.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == config.hang_at:
                time.sleep(3600)
            if config.corrupt_every and index % config.corrupt_every == 0:
                raise CorruptSampleError(f"image {index}", "broken on purpose")

    return Flaky()


@config
class PauseConfig(ObserverConfig):
    """Sleeps after each step, so that somebody outside has time to act."""

    seconds: float = option("seconds of sleep", default=1.0)


class Pause(Silent):
    def __init__(self, config: PauseConfig) -> None:
        self.config = config

    def on_step(self, run: Any, step: Any) -> None:
        time.sleep(self.config.seconds)


@hookimpl
def dinov3_observers() -> list[Component]:
    return [
        Component("pause", PauseConfig, Pause),
        Component("signal_at", SignalAtConfig, SignalAt),
        Component("raise_at", RaiseAtConfig, RaiseAt),
    ]


@hookimpl
def dinov3_losses() -> list[Component]:
    return [
        Component("poison", PoisonConfig, build_poison),
        Component("scaled_mean", ScaledMeanConfig, build_scaled_mean),
        Component("trouble", TroubleConfig, build_trouble),
        Component("centre", CentreConfig, build_centre),
    ]


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [Component("flaky", FlakyConfig, build_flaky)]
