"""Typed configs: one frozen attrs class per component, and the base class of each kind.

A config *is* its component's constructor argument: nothing is forwarded by hand, so no value can
be lost between the recipe and the code that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import attrs

from dinov3_framework.schedules import Share

T = TypeVar("T")
Check = Callable[[Any], str | None]


def option(
    doc: str,
    *,
    default: Any = attrs.NOTHING,
    factory: Callable[[], Any] | None = None,
    check: Check | None = None,
    formerly: Sequence[str] = (),
    is_place: bool = False,
) -> Any:
    """A field of a config, with the sentence that ``dinov3-run --describe`` prints.

    ``check`` gets the value and returns what is wrong with it, or None. ``formerly`` are keys that
    this field replaces in its table: whoever still writes one is told this field's name. A key that
    moved into a table is given at the field that holds the table. ``is_place`` says that the value
    is where something lies, and not what it is.
    """

    def validate(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        complaint = check(value) if check is not None and value is not None else None
        if complaint:
            raise InvalidOption(attribute.name, complaint)

    return attrs.field(
        default=attrs.Factory(factory) if factory is not None else default,
        validator=validate,
        metadata={"doc": doc, "formerly": tuple(formerly), "is_place": is_place},
    )


class InvalidOption(ValueError):
    """A value that has the right type and is wrong all the same."""

    def __init__(self, name: str, message: str) -> None:
        self.name, self.message = name, message
        super().__init__(f"{name}: {message}")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def config(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only attrs class whose fields are ``option(...)``."""
    return attrs.frozen(cls, kw_only=True)


def preset(**defaults: Any) -> Callable[[type[T]], type[T]]:
    """Class decorator: a config like its base with other defaults, docs and checks kept.

    Raises ``TypeError`` for a field that the base does not have.
    """

    def with_defaults(cls: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
        unknown = defaults.keys() - {field.name for field in fields}
        if unknown:
            raise TypeError(f"{cls.__name__}: no such field: {', '.join(sorted(unknown))}")
        return [
            field.evolve(default=defaults[field.name]) if field.name in defaults else field
            for field in fields
        ]

    return attrs.frozen(kw_only=True, field_transformer=with_defaults)


def replace(config: T, **changes: Any) -> T:
    """A copy of a config with some fields changed; checks run again."""
    return attrs.evolve(config, **changes)  # type: ignore[misc,no-any-return]


def positive(value: float | Share) -> str | None:
    return None if isinstance(value, Share) or value > 0 else f"must be above 0, is {value}"


def seconds(value: float) -> str | None:
    """More than the timers of libraries take would not be waited for."""
    return None if 0 < value <= 1e6 else f"must be above 0 and at most 1,000,000, is {value:g}"


def not_negative(value: float | Share) -> str | None:
    return None if isinstance(value, Share) or value >= 0 else f"must not be negative, is {value}"


def fraction(value: float) -> str | None:
    return None if 0 <= value <= 1 else f"must lie in 0..1, is {value}"


def throughout(check: Callable[[float], str | None]) -> Check:
    """A check for a schedule, of the values between which it moves."""

    def check_all(schedule: Any) -> str | None:
        return next(filter(None, map(check, schedule.levels)), None)

    return check_all


def interval(low: float, high: float) -> Check:
    """A check for an array of two increasing numbers in low..high."""

    def check(value: Any) -> str | None:
        if len(value) == 2 and low <= value[0] <= value[1] <= high:
            return None
        return f"must be two increasing numbers in {low:g}..{high:g}, is {list(value)}"

    return check


def one_of(*choices: str) -> Check:
    def check(value: str) -> str | None:
        return None if value in choices else f"must be one of {', '.join(choices)}, is {value!r}"

    return check


@config
class ImagesConfig:
    """What an image is, set once for datasets, augmentation, backbone and evaluation."""

    channels: int = option("channels of an image", default=3, check=positive)
    mean: tuple[float, ...] = option(
        "mean of each channel, of values in 0..1", default=(0.485, 0.456, 0.406)
    )
    std: tuple[float, ...] = option(
        "standard deviation of each channel, of values in 0..1", default=(0.229, 0.224, 0.225)
    )

    def __attrs_post_init__(self) -> None:
        for name in ("mean", "std"):
            given = len(getattr(self, name))
            if given != self.channels:
                raise InvalidOption(name, f"has {given} numbers for channels = {self.channels}")
        if min(self.std) <= 0:
            raise InvalidOption("std", f"must be above 0, is {list(self.std)}")


# What the published weights were trained with: on photographs from the web (ImageNet's statistics)
# and on satellite images (SAT-493M).
WEB_IMAGES = ImagesConfig()
SATELLITE_IMAGES = ImagesConfig(mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))


@config
class AnchorConfig:
    """A frozen network that a loss holds the student to: where it comes from, when it changes.

    It begins as ``weights``, or else as the momentum teacher of iteration ``start``, and is
    replaced by the momentum teacher after iterations that are multiples of ``period``.
    """

    weights: str | None = option(
        "what it begins as: a file or folder of any known format, a run's folder, a URL or a "
        "published name; left out, the momentum teacher",
        default=None,
    )
    network: str = option("which network of a training checkpoint is read", default="teacher")
    unused: tuple[str, ...] | None = option(
        "names, or patterns with *, of tensors of the weights that may be left over", default=None
    )
    start: int | None = option(
        "iteration before which the momentum teacher is copied for the first time; left out, that "
        "which the run begins with, or never if there are weights",
        default=None,
        check=not_negative,
    )
    period: int | None = option(
        "iterations between refreshes from the momentum teacher; left out, none",
        default=None,
        check=positive,
    )
    first_refresh: int = option(
        "iteration that the first refresh does not come before", default=0, check=not_negative
    )
    max_refreshes: int | None = option(
        "refreshes in all; left out, no limit", default=None, check=not_negative
    )

    def __attrs_post_init__(self) -> None:
        if self.period is None and (self.first_refresh or self.max_refreshes is not None):
            name = "first_refresh" if self.first_refresh else "max_refreshes"
            raise InvalidOption(name, "has no effect without period")

    @property
    def follows(self) -> bool:
        """Whether it ever becomes the momentum teacher."""
        return self.weights is None or self.start is not None or self.period is not None
