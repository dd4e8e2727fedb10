"""Configs of small components, one for each kind of field."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import (
    BackboneConfig,
    InvalidOption,
    LauncherConfig,
    LossConfig,
    Schedule,
    TaskConfig,
    config,
    fraction,
    interval,
    option,
    positive,
)


@config
class HeadOptions:
    """A nested table."""

    width: int = option("hidden width", default=256, check=positive)
    bias: bool = option("whether layers have biases", default=True)


@config
class TinyConfig(BackboneConfig):
    """A backbone.

    Small.
    """

    depth: int = option("number of blocks", default=2, check=positive)
    drop: float = option("share of paths dropped", default=0.0, check=fraction)
    norm: Literal["layer", "rms"] = option("normalization", default="layer")


@config
class OtherConfig(BackboneConfig):
    """Another backbone."""

    heads: int = option("heads", default=4)


@config
class PullConfig(LossConfig):
    """A loss."""

    head: HeadOptions = option("the projection head", factory=HeadOptions)
    scale: tuple[float, float] = option(
        "smallest and largest", default=(0.5, 1.0), check=interval(0, 1)
    )
    period: int | None = option("iterations between refreshes", default=None, check=positive)


@config
class HereConfig(LauncherConfig):
    """A launcher."""

    processes: int = option("how many", default=1, check=positive)


@config
class ToyConfig(TaskConfig):
    """A task with every kind of field."""

    iterations: int = option("steps", check=positive)
    lr: Schedule = option("learning rate")
    backbone: BackboneConfig = option("the network")
    losses: dict[str, LossConfig] = option("the objective", factory=dict)
    mean: tuple[float, ...] = option("means", default=(0.5,))
    tags: dict[str, str] = option("words", factory=dict)
    heads: tuple[HeadOptions, ...] = option("several heads", default=())
    clip: float | None = option("largest norm", default=None)
    resume: bool = option("go on", default=True)

    def __attrs_post_init__(self) -> None:
        if self.iterations == 13:
            raise InvalidOption("iterations", "13 brings bad luck")
