"""Schedules: iteration -> value, in closed form.

Nothing is tabulated, so a run of a million iterations costs nothing and any iteration can be asked
for alone, which is what resuming needs. In a recipe a schedule is a number (constant) or a table
whose ``use`` names one of the classes below. Unless it says otherwise, a schedule spans the run's
``iterations``. Its parts are given in iterations or as a share of the run: ``"10%"``.
"""

from __future__ import annotations

import abc
import math
import re
from typing import ClassVar

from attrs import asdict, evolve, field, frozen


@frozen
class Share:
    """A part of a run's iterations, more than 0 and at most 1; ``"10%"`` in a recipe."""

    part: float

    @classmethod
    def parse(cls, text: str) -> Share | None:
        """The share that ``"10%"`` means; None if the text means none."""
        number = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
        part = float(number[1]) / 100 if number else 0.0
        return cls(part) if 0 < part <= 1 else None

    def __str__(self) -> str:
        return f"{100 * self.part:.10g}%"


Span = int | Share


def iterations_of(span: Span, total: int) -> int:
    """A span in iterations of a run of ``total``: a share is rounded, and is 1 at least."""
    return max(round(span.part * total), 1) if isinstance(span, Share) else span


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
    warmup: Span = field(default=0, metadata=_doc("iterations of linear warm-up"))
    cosine: Span | None = field(
        default=None, metadata=_doc("iterations of cosine; left out, all that follow the warm-up")
    )

    def at(self, iteration: int, total: int) -> float:
        warmup = iterations_of(self.warmup, total)
        if iteration < warmup:
            return self.start + (self.peak - self.start) * iteration / warmup
        length = total - warmup if self.cosine is None else iterations_of(self.cosine, total)
        position = iteration - warmup
        if position >= length:
            return self.end
        phase = math.pi * position / (length - 1) if length > 1 else 0.0
        return self.end + (self.peak - self.end) * (math.cos(phase) + 1) / 2

    def scaled(self, factor: float) -> Cosine:
        return evolve(self, peak=self.peak * factor, end=self.end * factor)

    def problems(self, total: int) -> list[str]:
        return _too_long(self.warmup, total, "warmup") or _too_long(
            iterations_of(self.warmup, total) + iterations_of(self.cosine or 0, total),
            total,
            "warmup and cosine",
        )


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
    warmup: Span = field(default=0, metadata=_doc("iterations of linear warm-up"))
    span: Span | None = field(
        default=None, metadata=_doc("iterations of warm-up and cosine together; left out, the run")
    )
    stretch: float = field(default=0.0, metadata=_doc("fraction of the cosine that is cut off"))

    def at(self, iteration: int, total: int) -> float:
        warmup = iterations_of(self.warmup, total)
        span = total if self.span is None else iterations_of(self.span, total)
        if iteration >= span:
            return self.end
        if iteration < warmup:
            steps = max(warmup - 1, 1)
            return self.start + (self.peak - self.start) * iteration / steps
        length = span - warmup
        position = iteration - warmup
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
        span = total if self.span is None else iterations_of(self.span, total)
        warmup = iterations_of(self.warmup, total)
        if span >= warmup or span > total:
            return _too_long(span, total, "span")
        return _too_long(warmup, total, "warmup") or [
            f"its warm-up of {warmup:,} iterations is longer than its span of {span:,}; raise span "
            "or lower warmup"
        ]


@frozen(kw_only=True)
class OneCycle(Schedule):
    """Half a cosine over the whole run, under a factor that grows from 0 to 1 in the warm-up.

    The schedule of the published linear evaluations on NYU Depth and ADE20K: the cosine begins with
    the run, not after the warm-up, where it includes its end point and tends to 0. With ``ratio``,
    as on ADE20K, the factor grows from it, under a straight line from 1 to 0 over the run.
    """

    use: ClassVar[str] = "one_cycle"
    start: float = field(default=0.0, metadata=_doc("what is added to the value in the warm-up"))
    peak: float = field(metadata=_doc("value that the cosine comes from"))
    end: float = field(default=0.0, metadata=_doc("value at the last iteration"))
    warmup: Span = field(default=0, metadata=_doc("iterations of warm-up"))
    ratio: float = field(default=0.0, metadata=_doc("the factor at iteration 0; 0 as on NYU Depth"))

    def at(self, iteration: int, total: int) -> float:
        warmup = iterations_of(self.warmup, total)
        if iteration < warmup and self.ratio:
            factor = 1 - (1 - iteration / warmup) * (1 - self.ratio)
            return self.start + self.peak * factor * (1 - iteration / total)
        if iteration < warmup:
            level = (1 + math.cos(math.pi * iteration / total)) / 2
            return self.start + self.peak * level * iteration / warmup
        level = (1 + math.cos(math.pi * min(iteration + 1, total) / total)) / 2
        return self.end + (self.peak - self.end) * level

    def scaled(self, factor: float) -> OneCycle:
        start, peak, end = (factor * each for each in (self.start, self.peak, self.end))
        return evolve(self, start=start, peak=peak, end=end)

    def problems(self, total: int) -> list[str]:
        return _too_long(self.warmup, total, "warmup")


def _too_long(span: Span, total: int, keys: str) -> list[str]:
    length = iterations_of(span, total)
    if length <= total:
        return []
    return [
        f"{keys} = {length:,} iterations, the whole run has {total:,}; lower {keys}, or write a "
        'share of the run, such as "10%"'
    ]


SCHEDULES: dict[str, type[Schedule]] = {
    cls.use: cls for cls in (Constant, Cosine, WarmupCosine, OneCycle)
}
