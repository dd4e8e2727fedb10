"""What heads that predict depth are trained by."""

from __future__ import annotations

from dinov3_framework.configs import InvalidOption, config, not_negative, option, positive
from dinov3_framework.kinds import HeadConfig


@config
class DepthHeadConfig(HeadConfig):
    """What heads that predict a map, such as depth, have in common: its losses.

    As it is, that of the published linear evaluation on NYU. There the variance is left out of the
    first 100 values of the sigma loss; the learning rate is next to nothing then, and here it is
    part of all of them.
    """

    target: str = option("which target of the data is predicted, of kind map", default="depth")
    sigma: float = option(
        "weight of the sigma loss, scale-invariant in part, on logarithms",
        default=1.0,
        check=not_negative,
    )
    gradient: float = option(
        "weight of the difference of gradients at several scales", default=0.0, check=not_negative
    )
    gradient_log: float = option(
        "weight of the same of logarithms", default=0.0, check=not_negative
    )
    l1: float = option("weight of the mean absolute error", default=0.0, check=not_negative)
    together: int | None = option(
        "images whose pixels a loss takes together, the mean over such groups is minimized; 2 as "
        'on each GPU of the published training; "none": all that a process sees at once, which '
        "then makes a difference",
        default=2,
        check=positive,
    )
    min_truth: float = option(
        "values of the truth up to this are void in training", default=0.001, check=not_negative
    )
    max_truth: float | None = option(
        "values of the truth from this on are void in training; left out, none are",
        default=None,
        check=positive,
    )

    def __attrs_post_init__(self) -> None:
        if not (self.sigma or self.gradient or self.gradient_log or self.l1):
            raise InvalidOption("sigma", "or another loss needs a weight above 0")
        if self.max_truth is not None and self.max_truth <= self.min_truth:
            raise InvalidOption("max_truth", f"must be above min_truth, {self.min_truth:g}")
