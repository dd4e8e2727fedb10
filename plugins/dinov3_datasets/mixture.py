"""Several datasets as one, each with its share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from attrs import evolve

from dinov3_datasets.composed_configs import MixtureConfig
from dinov3_datasets.shares import place_of, split_length
from dinov3_framework import DataError, Dataset, Sample, Target
from dinov3_framework.contracts.data import StreamDataset
from dinov3_framework.data.sampling import ShuffledStream
from dinov3_framework.errors import CorruptSampleError
from dinov3_framework.randomness import keyed_rng, keyed_seed

Part = Dataset | StreamDataset

_LONGEST = 10**15


def build_mixture(
    config: MixtureConfig, *, channels: int, build: Callable[..., Part]
) -> Mixture | MixtureStream:
    """A dataset with an index, or a stream where one of the parts is a stream."""
    parts = {name: build(each, channels=channels) for name, each in config.parts.items()}
    indexed = {name: part for name, part in parts.items() if isinstance(part, Dataset)}
    for name, part in indexed.items():
        if not len(part):
            raise DataError(f"mixture: the part {name!r} has no samples")
    if len(indexed) == len(parts):
        return Mixture(config, indexed)
    streams = ", ".join(sorted(parts.keys() - indexed.keys()))
    if not config.weights:
        raise DataError(f"mixture: state weights; the size of a stream is not known ({streams})")
    if config.length is not None:
        raise DataError(f"mixture: length is for datasets with an index; {streams} is a stream")
    return MixtureStream(config, parts)


class _Parts:
    """What mixtures with and without an index have in common."""

    targets: Mapping[str, Target]

    def __init__(self, config: MixtureConfig, parts: Mapping[str, Part]) -> None:
        self.config, self.parts = config, dict(parts)
        self.names = list(parts)
        self.targets, self.dropped = shared_targets(parts)
        if config.targets == "same" and self.dropped:
            raise DataError(
                f"mixture: the parts differ in {', '.join(self.dropped)}: "
                + "; ".join(f"{name} has {_schema(part)}" for name, part in parts.items())
                + '\n    targets = "shared" leaves these targets out'
            )

    def cleaned(self, sample: Sample) -> Sample:
        """A sample with the targets that all parts share."""
        if not self.dropped:
            return sample
        return evolve(
            sample,
            targets={name: each for name, each in sample.targets.items() if name in self.targets},
        )

    def words(self, shares: Sequence[float]) -> str:
        """The parts, their shares, and the targets that are left out."""
        each = ", ".join(
            f"{name} {share:.3g} ({part.describe()})"
            for (name, part), share in zip(self.parts.items(), shares, strict=True)
        )
        left = f"; left out, as parts differ in it: {', '.join(self.dropped)}"
        return each + (left if self.dropped else "")


def blamed(part: str, error: CorruptSampleError) -> CorruptSampleError:
    """The error of a part's sample, with the name of the part."""
    return type(error)(f"{part}: {error.name}", error.reason)


def shared_targets(parts: Mapping[str, Part]) -> tuple[Mapping[str, Target], list[str]]:
    """The targets that all parts have and mean alike, and the names of the others."""
    schemas = [part.targets for part in parts.values()]
    first, names = schemas[0], {name for schema in schemas for name in schema}
    shared = {
        name: target
        for name, target in first.items()
        if all(schema.get(name) == target for schema in schemas)
    }
    return shared, sorted(names - shared.keys())


def _schema(part: Part) -> str:
    return ", ".join(f"{name} ({target})" for name, target in part.targets.items()) or "none"


# --------------------------------------------------------------------------- with an index
class Mixture(_Parts, Dataset):
    """Samples of datasets with an index; every stretch of indices has the shares."""

    parts: dict[str, Dataset]

    def __init__(self, config: MixtureConfig, parts: Mapping[str, Dataset]) -> None:
        super().__init__(config, parts)
        sizes = [len(part) for part in parts.values()]
        weights = [Fraction(config.weights.get(name, len(part))) for name, part in parts.items()]
        total = sum(weights)
        shares = [weight / total for weight in weights]
        needed = max(math.ceil(size / share) for size, share in zip(sizes, shares, strict=True))
        if config.length is None and needed > _LONGEST:
            raise DataError(
                f"mixture: to show every sample once it would be {needed:.3g} samples long; bring "
                "weights closer to each other, or state length"
            )
        self.counts = split_length(config.length or needed, shares)
        self.orders = [
            ShuffledStream(size, keyed_seed(config.seed, "mixture", number))
            for number, size in enumerate(sizes)
        ]

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> Sample:
        name, own = self.place(index)
        try:
            return self.cleaned(self.parts[name][own])
        except CorruptSampleError as error:
            raise blamed(name, error) from error

    def place(self, index: int) -> tuple[str, int]:
        """The part that a sample is of, and its index there."""
        number, count = place_of(range(len(self))[index], self.counts)
        return self.names[number], self.orders[number][count]

    def label(self, index: int) -> int | None:
        if "label" not in self.targets:
            return None
        name, own = self.place(index)
        return self.parts[name].label(own)

    def name(self, index: int) -> str:
        name, own = self.place(index)
        return f"{name}/{self.parts[name].name(own)}"

    def describe(self) -> str:
        total = len(self)
        shares = self.words([count / total for count in self.counts])
        laps = ", ".join(
            f"{name} {count / len(part):.3g} times"
            for (name, part), count in zip(self.parts.items(), self.counts, strict=True)
        )
        return f"mixture, {total:,} images: {shares}; seen in them: {laps}"

    def digest(self) -> str:
        return self._told(lambda part: part.digest())

    def version(self) -> str | None:
        versions = [part.version() for part in self.parts.values()]
        if None in versions:
            return None
        return self._told(lambda part: f"{type(part).__module__} {part.version()}")

    def notes(self) -> list[str]:
        return [f"{name}: {note}" for name, part in self.parts.items() for note in part.notes()]

    def _told(self, tell: Callable[[Dataset], str]) -> str:
        each = "; ".join(
            f"{count:,} of {name}: {tell(part)}"
            for (name, part), count in zip(self.parts.items(), self.counts, strict=True)
        )
        return f"mixture of {len(self):,} samples (seed {self.config.seed}): {each}"


# --------------------------------------------------------------------------- streams
class MixtureStream(_Parts, StreamDataset):
    """Samples of streams and datasets with an index, each place's part drawn by its weight."""

    def __init__(self, config: MixtureConfig, parts: Mapping[str, Part]) -> None:
        super().__init__(config, parts)
        total = sum(config.weights.values())
        self.shares = [config.weights[name] / total for name in self.names]

    def open(
        self, *, part: int, parts: int, seed: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        drawn = 0 if state is None else int(state["drawn"])
        states: dict[str, Any] = {} if state is None else dict(state["parts"])
        sources = {
            name: self._source(number, part, parts, seed, states.get(name))
            for number, name in enumerate(self.names)
        }
        while True:
            rng = keyed_rng(seed, "mixture part", part, drawn)
            name = self.names[int(rng.choice(len(self.names), p=self.shares))]
            try:
                found, states[name] = next(sources[name])
            except StopIteration:
                raise DataError(f"mixture: the stream {name!r} ended, and must not") from None
            drawn += 1
            if isinstance(found, CorruptSampleError):
                found = blamed(name, found)
            else:
                found = self.cleaned(found)
            yield found, {"drawn": drawn, "parts": dict(states)}

    def _source(
        self, number: int, part: int, parts: int, seed: int, state: Any
    ) -> Iterator[tuple[Any, Any]]:
        dataset = self.parts[self.names[number]]
        seed = keyed_seed(seed, "mixture", self.config.seed, number)
        if isinstance(dataset, StreamDataset):
            return dataset.open(part=part, parts=parts, seed=seed, state=state)
        return _walk(dataset, part, parts, seed, state or 0)

    def describe(self) -> str:
        return (
            f"mixture, a stream: {self.words(self.shares)}; parts are drawn at random by (seed, "
            "place) and those with an index walked in a shuffled order; it goes on after a stop as "
            "far as its streams do"
        )


def _walk(
    dataset: Dataset, part: int, parts: int, seed: int, taken: int
) -> Iterator[tuple[Sample | CorruptSampleError, int]]:
    """Every ``parts``-th sample of endless passes in other orders, and how many were taken."""
    order = ShuffledStream(len(dataset), seed)
    while True:
        index = order[taken * parts + part]
        taken += 1
        try:
            yield dataset[index], taken
        except CorruptSampleError as error:
            yield error, taken
