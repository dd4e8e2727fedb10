"""Samples, datasets and augmentations.

The letters in shapes: B samples, G crops of a view, C channels, H and W pixels, P patches.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
from torch import Tensor


@attrs.frozen
class Sample:
    """One image, uint8 [C, H, W], and its label (None where there is none)."""

    image: Tensor
    label: int | None = None


class Dataset(abc.ABC):
    """Images by index."""

    n_classes: int | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; raises ``CorruptSampleError`` where it cannot be decoded."""

    def name(self, index: int) -> str:
        """What the sample is called, such as its path below the dataset's folder."""
        return str(index)

    def describe(self) -> str:
        """One line for the summary of a run."""
        return f"{type(self).__name__}, {len(self):,} images"


@attrs.frozen
class View:
    """A set of crops that an augmentation cuts from each image."""

    crops: int
    size: int  # pixels, square


class Augmentation(abc.ABC):
    """One image in, crops out; and the masks of a whole batch.

    ``views`` says what it makes: ``{"global": View(2, 224), "local": View(8, 96)}``. The engine
    knows ``global`` (student and teacher), ``local`` (student), ``anchor`` (anchors) and
    ``teacher`` (the teacher's version of the global crops, where the two differ).

    There may be several variants of it, such as crops of several sizes, of which each step has
    one: see ``at``. They make the same views, as many crops of each, and differ in sizes alone.
    What has variants shows ``views``, and makes crops and masks, of the largest of them.
    """

    views: Mapping[str, View]
    makes_masks: bool = False
    share: float = 1.0  # of the steps that have it, where it is one of several variants

    def at(self, seed: int, step: int) -> Augmentation:
        """The augmentation of one step, one of ``variants()``; by default itself.

        It depends on seed and step alone, so that all processes and passes of a step have the
        same, and a resumed run the same again.
        """
        return self

    def variants(self) -> Sequence[Augmentation]:
        """All that ``at`` may return, by default itself alone; their ``share`` sums to 1."""
        return (self,)

    @abc.abstractmethod
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Crops of one uint8 image [C, H, W], by view: [crops, C, size, size].

        uint8 crops are scaled and normalised on the device; float crops are taken as they are. All
        randomness comes from ``rng``, which depends on the sample's place in the stream alone.
        """

    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        """Which patches of the global crops the student does not see, bool [len(rows), P].

        ``rows`` are this process's rows among the ``total`` crop-major rows of the global batch
        (crop g of sample j is row g * B + j). The masks of a step depend on (seed, step, row)
        alone, however the rows are spread over processes.
        """
        raise TypeError(f"{type(self).__name__} makes no masks")
