"""Schedules: iteration -> value, in closed form.

Nothing is tabulated, so a run of a million iterations costs nothing and any iteration can be asked
for alone, which is what resuming needs. In a recipe a schedule is a number (constant) or a table
whose ``use`` names one of the classes below. Unless it says otherwise, a schedule spans the run's
``iterations``.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar

from attrs import asdict, evolve, field, frozen


@frozen(kw_only=True)
class Schedule(abc.ABC):
    """What every schedule offers."""

    use: ClassVar[str]

    @abc.abstractmethod
    def at(self, iteration: int, total: int) -> float:
        """The value at ``iteration`` (from 0) of a run of ``total`` iterations."""

    @abc.abstractmethod
    def scaled(self, factor: float) -> Schedule:
        """The schedule with its learning-rate level multiplied, as batch-size scaling rules ask."""

    @property
    def levels(self) -> list[float]:
        """The values between which it moves."""
        fields = asdict(self)
        return [fields[name] for name in ("value", "start", "peak", "end") if name in fields]

    def problems(self, total: int) -> list[str]:
        """What makes this schedule impossible in a run of ``total`` iterations."""
        return []


def _doc(text: str) -> dict[str, str]:
    return {"doc": text}


@frozen(kw_only=True)
class Constant(Schedule):
    """The same value throughout; a plain number in a recipe means this."""

    use: ClassVar[str] = "constant"
    value: float = field(metadata=_doc("the value"))

    def at(self, iteration: int, total: int) -> float:
        return self.value

    def scaled(self, factor: float) -> Constant:
        return evolve(self, value=self.value * factor)


@frozen(kw_only=True)
class Cosine(Schedule):
    """Linear warm-up from ``start`` to ``peak``, half a cosine to ``end``, then constant.

    The schedule of the published DINOv3 recipes: the warm-up excludes its end point and the cosine
    includes both of its own.
    """

    use: ClassVar[str] = "cosine"
    start: float = field(metadata=_doc("value at iteration 0, if there is a warm-up"))
    peak: float = field(metadata=_doc("value after the warm-up"))
    end: float = field(metadata=_doc("value at the end of the cosine and after it"))
    warmup: int = field(default=0, metadata=_doc("iterations of linear warm-up"))
    cosine: int | None = field(
        default=None, metadata=_doc("iterations of cosine; left out, all that follow the warm-up")
    )

    def at(self, iteration: int, total: int) -> float:
        if iteration < self.warmup:
            return self.start + (self.peak - self.start) * iteration / self.warmup
        length = total - self.warmup if self.cosine is None else self.cosine
        position = iteration - self.warmup
        if position >= length:
            return self.end
        phase = math.pi * position / (length - 1) if length > 1 else 0.0
        return self.end + (self.peak - self.end) * (math.cos(phase) + 1) / 2

    def scaled(self, factor: float) -> Cosine:
        return evolve(self, peak=self.peak * factor, end=self.end * factor)

    def problems(self, total: int) -> list[str]:
        needed = self.warmup + (self.cosine or 0)
        if needed > total:
            return [f"warm-up and cosine take {needed:,} iterations, the run has {total:,}"]
        return []


@frozen(kw_only=True)
class WarmupCosine(Schedule):
    """Linear warm-up that includes its end point, then a cosine that never quite reaches ``end``.

    The schedule of DINO and DINOv2, which the published ViT-L ImageNet-1k recipe still uses.
    ``span`` shortens the whole schedule; after it the value is ``end``. With ``stretch`` = s the
    cosine is computed for (1 + s) times its length and cut, then rescaled to end at ``end``.
    """

    use: ClassVar[str] = "warmup_cosine"
    start: float = field(default=0.0, metadata=_doc("value at iteration 0, if there is a warm-up"))
    peak: float = field(metadata=_doc("value at the last iteration of the warm-up"))
    end: float = field(metadata=_doc("value that the cosine tends to, and that follows it"))
    warmup: int = field(default=0, metadata=_doc("iterations of linear warm-up"))
    span: int | None = field(
        default=None, metadata=_doc("iterations of warm-up and cosine together; left out, the run")
    )
    stretch: float = field(default=0.0, metadata=_doc("fraction of the cosine that is cut off"))

    def at(self, iteration: int, total: int) -> float:
        span = total if self.span is None else self.span
        if iteration >= span:
            return self.end
        if iteration < self.warmup:
            steps = max(self.warmup - 1, 1)
            return self.start + (self.peak - self.start) * iteration / steps
        length = span - self.warmup
        position = iteration - self.warmup
        if self.stretch == 0:
            level = (1 + math.cos(math.pi * position / length)) / 2
        else:
            intervals = int((1 + self.stretch) * length) - 1
            last = (1 + math.cos(math.pi * (length - 1) / intervals)) / 2
            level = (1 + math.cos(math.pi * position / intervals)) / 2
            level = (level - last) / (1 - last)
        return self.end + (self.peak - self.end) * level

    def scaled(self, factor: float) -> WarmupCosine:
        # The published rule leaves the final value where it is.
        return evolve(self, peak=self.peak * factor)

    def problems(self, total: int) -> list[str]:
        span = total if self.span is None else self.span
        if span > total or self.warmup > span:
            return [f"warm-up {self.warmup:,} <= span {span:,} <= iterations {total:,} must hold"]
        return []


SCHEDULES: dict[str, type[Schedule]] = {cls.use: cls for cls in (Constant, Cosine, WarmupCosine)}
