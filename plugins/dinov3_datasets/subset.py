"""Some of the samples of a dataset."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dinov3_datasets.composed_configs import SubsetConfig
from dinov3_datasets.labels import NONE
from dinov3_framework import DataError, Dataset, Sample
from dinov3_framework.contracts.data import StreamDataset
from dinov3_framework.errors import CorruptSampleError, first_few, printable, suggest
from dinov3_framework.randomness import keyed_rng

_NUMBER = re.compile("[0-9]{1,18}")


class Subset(Dataset):
    """Samples of another dataset by increasing index, with its targets and names."""

    def __init__(
        self,
        config: SubsetConfig,
        *,
        channels: int,
        build: Callable[..., Dataset | StreamDataset],
    ) -> None:
        whole = build(config.of, channels=channels)
        if not isinstance(whole, Dataset):
            raise DataError(f"subset: needs a dataset with an index; {whole.describe()} has none")
        self.config, self.whole, self.targets = config, whole, whole.targets
        self.indices = self._chosen()
        if not len(self.indices):
            raise DataError(f"subset: nothing is left of {whole.describe()}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[int(self.indices[index])]

    def label(self, index: int) -> int | None:
        return self.whole.label(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def describe(self) -> str:
        return f"subset of {len(self):,} images ({self._words()}) of {self.whole.describe()}"

    def digest(self) -> str:
        return f"{len(self):,} samples, {self._hash()}, of {self.whole.digest()}"

    def version(self) -> str | None:
        version = self.whole.version()
        if version is None:
            return None
        return f"{len(self):,} samples, {self._hash()}, of {type(self.whole).__module__} {version}"

    def notes(self) -> Sequence[str]:
        return self.whole.notes()

    def _hash(self) -> str:
        return hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]

    def _words(self) -> str:
        config = self.config
        words = []
        if config.classes is not None:
            words.append(f"classes {first_few(config.classes)}")
        if config.indices_file is not None:
            words.append(f"those that {config.indices_file} lists")
        if config.first is not None:
            words.append(f"the first {config.first:,}")
        if config.per_class is not None:
            words.append(f"{config.per_class:,} of each class, seed {config.seed}")
        if config.percent is not None:
            of = "of each class" if "label" in self.targets else "of all"
            words.append(f"{config.percent:g} % {of}, seed {config.seed}")
        return printable("; ".join(words), kept="")

    # ------------------------------------------------------------------ the choice
    def _chosen(self) -> np.ndarray:
        """The indices that are taken, int64, increasing."""
        config, count = self.config, len(self.whole)
        kept = np.arange(count)
        if config.indices_file is not None:
            kept = read_indices(config.indices_file, self.whole)
        labels = self._labels(kept)
        kept, labels = kept[labels != NONE], labels[labels != NONE]
        if config.classes is not None:
            present = np.isin(labels, self._ids(config.classes))
            kept, labels = kept[present], labels[present]
        if config.first is not None:
            if config.first > len(kept):
                raise DataError(f"subset: first = {config.first:,}, there are {len(kept):,} images")
            return kept[: config.first]
        if config.per_class is not None:
            self._check_counts(labels, config.per_class)
            return _of_each(kept, labels, config.seed, lambda _: config.per_class)
        if config.percent is not None:
            share = config.percent / 100
            return _of_each(kept, labels, config.seed, lambda n: max(round(n * share), 1))
        return kept

    def _labels(self, indices: np.ndarray) -> np.ndarray:
        """Labels of samples, int64 [n], ``NONE`` for none; zeros where they do not matter."""
        config = self.config
        by_class = {
            "classes": config.classes is not None,
            "per_class": config.per_class is not None,
            "percent": config.percent is not None and "label" in self.targets,
        }
        key = next((name for name, is_given in by_class.items() if is_given), None)
        if key is None:
            return np.zeros(len(indices), dtype=np.int64)
        if "label" not in self.targets:
            raise DataError(f"subset: {key} needs labels; {self.whole.describe()} has none")
        labels = []
        for index in map(int, indices):
            try:
                label = self.whole.label(index)
            except CorruptSampleError as error:
                raise DataError(f"subset: the label of a sample cannot be read: {error}") from error
            labels.append(NONE if label is None else label)
        return np.array(labels, dtype=np.int64)

    def _ids(self, names: Sequence[str]) -> list[int]:
        known = self.whole.classes
        if known is None:
            raise DataError("subset: classes needs names of classes, the dataset has none")
        for name in names:
            if name not in known:
                raise DataError(
                    f"subset: no class is named {name!r}; {suggest(name, known, 'classes')}"
                )
        return [known.index(name) for name in names]

    def _check_counts(self, labels: np.ndarray, wanted: int) -> None:
        counts = Counter(labels.tolist())
        names = self.whole.classes
        ids = range(self.whole.n_classes or 0)
        if self.config.classes is not None:
            ids = self._ids(self.config.classes)
        few = [
            f"{label if names is None else names[label]} ({counts[label]:,})"
            for label in (ids or sorted(counts))
            if counts[label] < wanted
        ]
        if few:
            raise DataError(
                f"subset: per_class = {wanted:,}, and {len(few):,} classes have fewer images: "
                f"{printable(first_few(few, 8), kept='')}"
            )


def _of_each(
    indices: np.ndarray, labels: np.ndarray, seed: int, count: Callable[[int], int]
) -> np.ndarray:
    """The first ``count(size)`` of a random order of each class, sorted by index."""
    taken = []
    for label in np.unique(labels).tolist():
        members = indices[labels == label]
        order = keyed_rng(seed, "subset", label).permutation(len(members))
        taken.append(members[order[: count(len(members))]])
    return np.sort(np.concatenate(taken)) if taken else indices


def read_indices(path: str, dataset: Dataset) -> np.ndarray:
    """The samples that a text file lists, as indices, int64, increasing, each once.

    Raises ``DataError`` for a file that cannot be read and for lines that mean no sample.
    """
    try:
        text = Path(path).expanduser().read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"subset: cannot read indices_file {path!r}: {error.strerror}") from error
    lines = [line for line in (each.strip() for each in text.split("\n")) if line]
    if not lines:
        raise DataError(f"subset: indices_file {path!r} lists nothing")
    places = {dataset.name(index): index for index in range(len(dataset))}
    short: dict[str, int | None] = {}
    for name, index in places.items():
        last = name.rpartition("/")[2]
        short[last] = None if last in short else index
    found, unknown = [], []
    for line in lines:
        index = places.get(line, short.get(line))
        if index is None and _NUMBER.fullmatch(line) and int(line) < len(dataset):
            index = int(line)
        found.append(index)
        if index is None:
            unknown.append(repr(line))
    if unknown:
        raise DataError(
            f"subset: {len(unknown):,} of {len(lines):,} lines of {path} are no sample of the "
            f"dataset: {printable(first_few(unknown), kept='')}\n"
            f"    it has {len(dataset):,} samples, called like "
            f"{printable(dataset.name(0), kept='')!r}"
        )
    return np.unique(np.array(found, dtype=np.int64))
