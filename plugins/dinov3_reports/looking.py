"""Looking at samples, in loader workers: of each what the report counts, of a few a picture."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from dinov3_framework import (
    Augmentation,
    CorruptSampleError,
    DataError,
    Dataset,
    ImagesConfig,
    Sample,
    StreamDataset,
    Target,
    UserError,
    keyed_rng,
)
from dinov3_framework.data.inference import InferenceLoader, ProgressLines
from dinov3_framework.errors import printable
from dinov3_framework.runtime import collectives
from dinov3_reports.moments import Moments, image_moments
from dinov3_reports.shown import small_crops, thumbnail

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.reports")

AUGMENTED = 12  # images whose crops are shown
_SPARE = 2  # candidates for each picture, since some may be unreadable
_BATCH = 16


@attrs.frozen(eq=False)
class Seen:
    """What there is to know of one image."""

    place: int  # in the dataset, or in the stream
    name: str
    height: int
    width: int
    moments: Moments
    blank: bool  # of one color
    digest: bytes  # of its pixels
    classes: Mapping[str, Mapping[int, int]]  # by target: how often each class is in it
    thumbnail: Tensor | None  # uint8 RGB [3, h, w]
    crops: Mapping[str, Tensor] | None  # by view, uint8 RGB [crops, 3, s, s]
    complaint: str = ""  # of the augmentation


@attrs.frozen
class Unreadable:
    """A sample that cannot be used."""

    place: int
    name: str
    reason: str


@attrs.frozen
class Look:
    """What becomes of a sample in a worker."""

    targets: Mapping[str, Target]
    images: ImagesConfig
    augmentation: Augmentation | None
    seed: int
    pictured: frozenset[int]  # places of which a thumbnail is made
    augmented: frozenset[int]  # and crops
    names: Dataset | None  # of a stream, samples have none

    def __call__(self, sample: Sample, place: int) -> Seen:
        image = sample.image
        if image.ndim != 3 or 0 in image.shape:
            raise DataError(f"is of shape {list(image.shape)}, an image has [C, H, W]")
        crops, complaint = None, ""
        if self.augmentation is not None and place in self.augmented:
            rng = keyed_rng(self.seed, "inspect crops", place)
            try:
                made = self.augmentation(image, rng)
            except UserError as error:
                complaint = str(error)
            else:
                largest = max(view.size for view in self.augmentation.views.values())
                crops = small_crops(made, self.images, largest)
        wanted = place in self.pictured or place in self.augmented
        return Seen(
            place,
            str(place) if self.names is None else printable(self.names.name(place), kept=""),
            int(image.shape[1]),
            int(image.shape[2]),
            image_moments(image),
            _is_blank(image),
            _digest(image),
            classes_in(sample.targets, self.targets),
            thumbnail(image, self.images.channels) if wanted else None,
            crops,
            complaint,
        )


def _is_blank(image: Tensor) -> bool:
    first = image[:, :1, :1]
    # Of most images the first row says that they are not.
    return bool((image[:, :1] == first).all()) and bool((image == first).all())


def _digest(image: Tensor) -> bytes:
    found = hashlib.blake2b(f"{image.dtype} {list(image.shape)}".encode(), digest_size=16)
    found.update(image.contiguous().numpy().data)
    return found.digest()


def classes_in(
    values: Mapping[str, Any], targets: Mapping[str, Target]
) -> dict[str, dict[int, int]]:
    """By target with classes: how many objects, or pixels of a mask, of a sample are of each."""
    found = {}
    for name, target in targets.items():
        if target.kind not in ("class", "mask") or name not in values:
            continue
        value = torch.as_tensor(values[name]).as_subclass(Tensor)
        if value.dtype == torch.bool:  # whether it is of each class
            value = value.nonzero()[:, -1]
        ids, counts = value.flatten().long().unique(return_counts=True)
        found[name] = {
            int(each): int(count)
            for each, count in zip(ids, counts, strict=True)
            if int(each) >= 0 and int(each) != target.ignore_index
        }
    return found


# --------------------------------------------------------------------------- which
def places_to_look_at(total: int, limit: int | None, seed: int) -> Sequence[int]:
    """Increasing places of at most ``limit`` of ``total`` samples, chosen by the seed."""
    if limit is None or limit >= total:
        return range(total)
    chosen = keyed_rng(seed, "inspect").choice(total, limit, replace=False)
    found: list[int] = np.sort(chosen).tolist()
    return found


def candidates(places: Sequence[int], count: int, seed: int) -> list[int]:
    """Places of which pictures are made, in the order in which they are taken."""
    order = keyed_rng(seed, "inspect pictures").permutation(len(places))
    return [places[at] for at in order[: _SPARE * count].tolist()]


# --------------------------------------------------------------------------- passes
def look_at(
    dataset: Dataset, look: Look, places: Sequence[int], workers: int
) -> tuple[list[Seen], list[Unreadable]]:
    """This process's share of the samples at ``places``."""
    batches = [places[start : start + _BATCH] for start in range(0, len(places), _BATCH)]
    own = batches[collectives.rank() :: collectives.world_size()]
    loader: InferenceLoader[Seen, list[Seen]] = InferenceLoader(
        dataset, look, own, collate=list, workers=min(workers, len(own))
    )
    seen: list[Seen] = []
    unreadable: list[Unreadable] = []
    progress = ProgressLines(sum(map(len, own)), log)
    with closing(iter(loader)) as made:
        for batch in made:
            seen += batch.data or []
            unreadable += [
                Unreadable(place, printable(error.name, kept=""), printable(error.reason, kept=""))
                for place, error in batch.corrupt.items()
            ]
            unreadable += [
                Unreadable(
                    place, printable(dataset.name(place), kept=""), printable(str(error), kept="")
                )
                for place, error in batch.refused.items()
            ]
            progress.add(len(batch.indices))
    return seen, unreadable


def look_at_stream(
    dataset: StreamDataset, look: Look, limit: int, seed: int
) -> tuple[list[Seen], list[Unreadable]]:
    """The first ``limit`` samples of a stream, read in this process."""
    seen: list[Seen] = []
    unreadable: list[Unreadable] = []
    progress = ProgressLines(limit, log)
    for place, sample in enumerate(_first(dataset, limit, seed)):
        if isinstance(sample, CorruptSampleError):
            found = printable(sample.name, kept=""), printable(sample.reason, kept="")
            unreadable.append(Unreadable(place, *found))
        else:
            try:
                seen.append(look(sample, place))
            except DataError as error:
                unreadable.append(Unreadable(place, str(place), printable(str(error), kept="")))
        progress.add(1)
    return seen, unreadable


def _first(dataset: StreamDataset, limit: int, seed: int) -> Iterator[Sample | CorruptSampleError]:
    samples = dataset.open(part=0, parts=1, seed=seed)
    for _, (sample, _) in zip(range(limit), samples, strict=False):
        yield sample
