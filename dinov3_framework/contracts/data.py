"""Samples, datasets and augmentations.

The letters in shapes: B samples, G crops of a view, C channels, H and W pixels, P patches.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs
import numpy as np
import torch
from torch import Tensor

from dinov3_framework.errors import UserError

TargetKind = Literal["class", "mask", "map", "boxes", "instances", "number", "text"]


@attrs.frozen
class Target:
    """What a dataset's target of one name is.

    - ``class``: an int from 0;
    - ``mask``: class ids by pixel, ``tv_tensors.Mask`` [H, W], integers;
    - ``map``: numbers by pixel, ``tv_tensors.Mask`` [H, W], float32, in ``unit`` (depth in "m"),
      NaN where nothing is known;
    - ``boxes``: ``tv_tensors.BoundingBoxes`` [n, 4], float32, XYXY in pixels of the image;
    - ``instances``: masks of objects, ``tv_tensors.Mask`` [n, H, W], bool;
    - ``number``, ``text``: a float, a string.

    With ``per_object`` there is one of them for each object of a sample: ``class`` is int64 [n],
    ``number`` float32 [n], ``text`` a list. Boxes and instances are always per object, and all such
    targets of a sample share their first axis.
    """

    kind: TargetKind
    n_classes: int | None = None  # of ids, where there are any
    classes: tuple[str, ...] | None = None  # their names
    ignore_index: int | None = None  # the id of what counts for nothing
    unit: str = ""
    palette: tuple[tuple[int, int, int], ...] | None = None  # RGB by id, for pictures
    per_object: bool = attrs.field()

    @per_object.default
    def _by_kind(self) -> bool:
        return self.kind in ("boxes", "instances")

    def __attrs_post_init__(self) -> None:
        if self.classes is not None and self.n_classes not in (None, len(self.classes)):
            raise ValueError(f"{len(self.classes)} class names for n_classes = {self.n_classes}")

    @property
    def count(self) -> int | None:
        """How many classes there are."""
        return self.n_classes if self.classes is None else len(self.classes)

    def __str__(self) -> str:
        words = f"{self.kind} of each object" if self.per_object else self.kind
        return words if self.count is None else f"{words}, {self.count} classes"


def choose_target(targets: Mapping[str, Target], name: str, kind: TargetKind) -> Target:
    """The target that a head or an evaluation asks for; ``UserError`` if there is no such one."""
    for complaint in target_complaints({name: Target(kind)}, targets):
        raise UserError(complaint)
    return targets[name]


def target_complaints(wanted: Mapping[str, Target], given: Mapping[str, Target]) -> Iterator[str]:
    """What keeps data with the targets ``given`` from serving where ``wanted`` are needed."""
    for name, target in wanted.items():
        other = given.get(name)
        if other is None:
            known = ", ".join(f"{key} ({each})" for key, each in given.items()) or "none"
            yield f"the data have no target {name!r} ({target}); they have {known}"
        elif (other.kind, other.per_object) != (target.kind, target.per_object):
            yield f"the target {name!r} of the data is of kind {other}; needed is {target}"
        elif target.count is not None and other.count != target.count:
            yield f"the target {name!r} of the data has {other.count} classes, not {target.count}"
        elif None not in (target.classes, other.classes) and target.classes != other.classes:
            odd = sorted(set(target.classes or ()) ^ set(other.classes or ()))
            what = f"others: {', '.join(odd[:5])}" if odd else "the same in another order"
            yield f"the classes of the target {name!r} of the data are {what}"


@attrs.frozen
class Sample:
    """One image, and what is known of it by name.

    The image is [C, H, W]: uint8, uint16, or floating point in 0..1. What each target is, its
    dataset's ``targets`` say.
    """

    image: Tensor
    targets: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def label(self) -> int | None:
        """The target ``label``, if there is one."""
        return self.targets.get("label")


class _Described:
    """What datasets with and without an index have in common."""

    targets: Mapping[str, Target] = {}

    @property
    def n_classes(self) -> int | None:
        """How many classes the target ``label`` has; None without labels."""
        label = self.targets.get("label")
        return None if label is None else label.count

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes of ``label``, where they are known."""
        label = self.targets.get("label")
        return None if label is None else label.classes


class Dataset(_Described, abc.ABC):
    """Samples by index."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; raises ``CorruptSampleError`` where it cannot be decoded."""

    def label(self, index: int) -> int | None:
        """The target ``label`` without reading the image; by default that of the whole sample."""
        return self[index].label if "label" in self.targets else None

    def name(self, index: int) -> str:
        """What the sample is called, such as its path below the dataset's folder."""
        return str(index)

    def describe(self) -> str:
        """One line for the summary of a run."""
        return f"{type(self).__name__}, {len(self):,} images"

    def digest(self) -> str:
        """What a run that goes on has to find again: the same samples under the same names.

        In words, and the same wherever the data lie.
        """
        return f"{len(self):,} samples"

    def version(self) -> str | None:
        """What tells these samples from those of any other dataset of its class, in words.

        Features are kept by it, so that it names the samples, the options that decide on pixels
        and labels, and sizes and times of files. None, the default, is not known: features are
        then those of this object alone, and in no folder.
        """
        return None

    def notes(self) -> Sequence[str]:
        """What a check should say of the data besides, a line each: what is left out or odd."""
        return ()


class StreamDataset(_Described, abc.ABC):
    """Samples in an order of its own, without an index: archives read from end to end, a queue."""

    @abc.abstractmethod
    def open(
        self, *, part: int, parts: int, seed: int, state: Any = None
    ) -> Iterator[tuple[Sample, Any]]:
        """The samples of one of ``parts`` disjoint parts, without end.

        There is a part for each loader worker of each process. Each sample comes with a value that
        JSON can hold, from which, given as ``state``, the same iteration goes on after it: it is
        saved in checkpoints. A sample that cannot be decoded is a ``CorruptSampleError`` in place
        of the ``Sample``.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """One line for the summary of a run, with what is promised of order and of resuming."""


@attrs.frozen
class SampleBatch:
    """Samples of a batch: images [B, C, H, W], or a list where their sizes differ, and targets."""

    images: Tensor | list[Tensor]
    targets: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.images)


class Transform(abc.ABC):
    """Changes an image and its targets together, and makes batches of them.

    Built as ``factory(config, images=ImagesConfig, targets=schema)``. Whatever is random is drawn
    from torch's global generator, which is seeded before each call by the sample's place in the
    stream alone: transforms of torchvision v2 do as they are.
    """

    targets: Mapping[str, Target] = {}
    size: tuple[int, int] | None = None  # height and width of images, where all have the same
    # Whether it may draw anything. Of one that says False, what becomes of a sample may be kept.
    random: bool = True

    def random_options(self) -> Sequence[str]:
        """The options that make it ``random``, for messages, where there are some to name."""
        return ()

    @abc.abstractmethod
    def __call__(self, sample: Sample) -> Sample:
        """A sample as the network is to see it: float32, normalized."""

    def collate(self, samples: Sequence[Sample]) -> SampleBatch:
        """A batch; by default tensors of one shape are stacked, numbers become tensors.

        Targets per object are lists, whether or not samples have equally many.
        """
        listed = {name for name, target in self.targets.items() if target.per_object}
        return SampleBatch(
            images=_stacked([sample.image for sample in samples]),
            targets={
                name: _stacked([sample.targets[name] for sample in samples], name in listed)
                for name in samples[0].targets
            },
        )


def _stacked(values: list[Any], listed: bool = False) -> Any:
    if listed:
        return values
    first = values[0]
    if isinstance(first, bool | int | float):
        return torch.tensor(values)
    if isinstance(first, Tensor) and all(value.shape == first.shape for value in values):
        return torch.stack([value.as_subclass(Tensor) for value in values])
    return values


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

        uint8 crops are scaled and normalized on the device; float crops are taken as they are. All
        randomness comes from ``rng``, which depends on the sample's place in the stream alone.
        """

    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        """Which patches of the global crops the student does not see, bool [len(rows), P].

        ``rows`` are this process's rows among the ``total`` crop-major rows of the global batch
        (crop g of sample j is row g * B + j). The masks of a step depend on (seed, step, row)
        alone, however the rows are spread over processes.
        """
        raise TypeError(f"{type(self).__name__} makes no masks")
