"""What datasets that are made of others can be told."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import DatasetConfig, InvalidOption, config, not_negative, option, positive


def _percent(value: float) -> str | None:
    return None if 0 < value <= 100 else f"must lie above 0 and at most at 100, is {value:g}"


def _names(value: tuple[str, ...]) -> str | None:
    return None if value else "must name at least one class"


@config
class SubsetConfig(DatasetConfig):
    """Some of the samples of another dataset, in its order and with its labels.

    ``classes`` and ``indices_file`` select first; of what is left, ``first``, ``per_class`` or
    ``percent`` take a part. No image is read for it. A larger part of the same seed holds every
    smaller one. Where classes decide, samples without a label are left out.
    """

    of: DatasetConfig = option("the dataset")
    classes: tuple[str, ...] | None = option(
        "names of the classes that are kept; labels stay what they are", default=None, check=_names
    )
    indices_file: str | None = option(
        "a text file with a sample a line: its name as the dataset calls it, the last part of that "
        "name (after /) where no other sample has it, or its index from 0",
        default=None,
        is_place=True,
    )
    first: int | None = option("the first so many", default=None, check=positive)
    per_class: int | None = option("so many of each class, at random", default=None, check=positive)
    percent: float | None = option(
        "so many of a hundred, at random: of each class, rounded and at least one; without labels "
        "of all",
        default=None,
        check=_percent,
    )
    seed: int = option("seed of what is random", default=0, check=not_negative)

    def __attrs_post_init__(self) -> None:
        sizes = {"first": self.first, "per_class": self.per_class, "percent": self.percent}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise InvalidOption(given[1], f"goes in place of {given[0]}, not with it")
        if not given and self.classes is None and self.indices_file is None:
            raise InvalidOption(
                "first", "say what is taken: first, per_class, percent, classes or indices_file"
            )


def _weights(value: dict[str, float]) -> str | None:
    wrong = [name for name, weight in value.items() if not 0 < weight < float("inf")]
    return f"must be above 0 and finite, not those of {', '.join(wrong)}" if wrong else None


def _parts(value: dict[str, DatasetConfig]) -> str | None:
    return None if value else "must have at least one dataset"


@config
class MixtureConfig(DatasetConfig):
    """Several datasets as one, each with its share of the samples.

    Of datasets with an index it is one with an index, in which every stretch has the shares; a part
    that is used up begins anew in another order. With a stream among them it is a stream, whose
    shares are those of a random choice.
    """

    parts: dict[str, DatasetConfig] = option("the datasets, by a name of each", check=_parts)
    weights: dict[str, float] = option(
        "shares of the samples, by name, in any unit; left out, the sizes of the datasets",
        factory=dict,
        check=_weights,
    )
    length: int | None = option(
        "samples in all; left out, as many as show every sample of every part once or more; for "
        "datasets with an index",
        default=None,
        check=positive,
    )
    targets: Literal["shared", "same"] = option(
        "keep the targets that all parts have and mean alike (shared), or refuse parts whose "
        "targets differ (same)",
        default="shared",
    )
    seed: int = option(
        "seed of the orders of datasets with an index", default=0, check=not_negative
    )

    def __attrs_post_init__(self) -> None:
        if not self.weights:
            return
        if odd := sorted(self.weights.keys() - self.parts.keys()):
            raise InvalidOption("weights", f"there is no part {', '.join(odd)}")
        if absent := sorted(self.parts.keys() - self.weights.keys()):
            raise InvalidOption("weights", f"of {', '.join(absent)} is missing; give all or none")
