"""A plugin that breaks runs on purpose; tests put its folder on PYTHONPATH."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import (
    Component,
    DatasetConfig,
    LossConfig,
    ObserverConfig,
    config,
    hookimpl,
    option,
)


@config
class SignalAtConfig(ObserverConfig):
    """Sends a signal to its own process after an iteration."""

    signal: str = option("name of the signal", default="SIGKILL")
    iteration: int = option("iteration after which it is sent; 0 for the end of the run")
    rank: int = option("process that it is sent to", default=0)


@config
class PoisonConfig(LossConfig):
    """A loss that is 0, or NaN or infinite in the chosen iterations on one process."""

    iterations: tuple[int, ...] = option("iterations (from 1) that it poisons")
    rank: int = option("process that it poisons", default=0)
    value: Literal["NaN", "infinity", "-infinity"] = option("what it gives", default="NaN")


@config
class TroubleConfig(LossConfig):
    """A loss that is 0, or runs out of memory or hangs in one iteration on one process."""

    what: Literal["out_of_memory", "sleep"] = option("what happens")
    iteration: int = option("iteration (from 1) that it happens in", default=2)
    rank: int = option("process that it happens to", default=0)


@config
class CenterConfig(LossConfig):
    """A loss with a state: the distance to a running mean of what it has seen."""

    poisoned: tuple[int, ...] = option("iterations (from 1) in which it is NaN", default=())
    late: bool = option("let the state alone be NaN, after the loss was taken of it", default=False)


@config
class RaiseAtConfig(ObserverConfig):
    """Raises after an iteration on one process."""

    iteration: int = option("iteration after which it is raised")
    rank: int = option("process that raises", default=0)
    what: Literal["complaint", "fault", "exit"] = option("what it does", default="complaint")


@config
class ScaledMeanConfig(LossConfig):
    """A loss that is a mean over samples, so that halves of a batch average to the whole."""


@config
class FlakyConfig(DatasetConfig):
    """Noise images of which some are corrupt, or end or hang whoever reads them."""

    size: int = option("images", default=64)
    corrupt_every: int = option("every so many images is corrupt; 0 for none", default=0)
    kill_at: int = option("image that kills its reader", default=-1)
    hang_at: int = option("image that hangs its reader", default=-1)
    fault_at: int = option("image that its reader fails at", default=-1)
    starve_at: int = option("large image whose reader has no memory to decode it", default=-1)
    rank: int = option("process that has these troubles; -1 for all", default=-1)
    unless: str = option("file that ends all these troubles by being there", default="")


@config
class PauseConfig(ObserverConfig):
    """Sleeps after each step, so that somebody outside has time to act."""

    seconds: float = option("seconds of sleep", default=1.0)


def _component(name: str, config: type, part: str) -> Component:
    return Component(name, config, f"dinov3_faults_parts:{part}")


@hookimpl
def dinov3_observers() -> list[Component]:
    return [
        _component("pause", PauseConfig, "Pause"),
        _component("signal_at", SignalAtConfig, "SignalAt"),
        _component("raise_at", RaiseAtConfig, "RaiseAt"),
    ]


@hookimpl
def dinov3_losses() -> list[Component]:
    return [
        _component("poison", PoisonConfig, "Poison"),
        _component("scaled_mean", ScaledMeanConfig, "ScaledMean"),
        _component("trouble", TroubleConfig, "Trouble"),
        _component("center", CenterConfig, "Center"),
    ]


@hookimpl
def dinov3_datasets() -> list[Component]:
    return [_component("flaky", FlakyConfig, "Flaky")]
