"""Shards of WebDataset as a stream: read from end to end, mixed in blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from attrs import asdict, evolve, frozen

from dinov3_datasets.files import Files, find_files
from dinov3_datasets.labels import Classes
from dinov3_datasets.tar_samples import RawSample, SampleFormat
from dinov3_datasets.tars import TarReader, open_shard
from dinov3_datasets.webdataset_config import WebDatasetConfig
from dinov3_framework import CorruptSampleError, DataError, Sample, StreamDataset
from dinov3_framework.errors import first_few
from dinov3_framework.randomness import keyed_rng

log = logging.getLogger(__name__)

_EMPTY = 20  # epochs in a row in which a part has no sample
_UNREADABLE = 1000  # samples in a row
_UNMIXED = 64  # samples of a block that is not mixed

Raw = RawSample | CorruptSampleError


@frozen
class Place:
    """Where a block of a part begins, and how many of its samples were given out."""

    epoch: int = 0
    shard: int = 0  # of those that the part has in this epoch
    offset: int = 0  # of the next header in it
    sample: int = 0  # its number in the shard
    block: int = 0  # its number in the epoch
    given: int = 0

    @classmethod
    def of(cls, state: Any, contents: str) -> Place:
        """That which was saved; ``DataError`` if it was saved for other shards."""
        if state is None:
            return cls()
        if state.get("shards") != contents:
            raise DataError(
                "webdataset: the shards are not those that this run has read from so far: their "
                "names or sizes differ\n    bring those back, or go on from the run's weights "
                "(init_from.weights) in another folder"
            )
        return cls(**state["place"])


@frozen
class Share:
    """The samples of a shard that a part has: each ``step``-th from ``first`` on."""

    shard: int
    first: int
    step: int


class TarStream(StreamDataset):
    """Samples of tar files as these are read, uint8 [channels, H, W] each of its own size.

    In each epoch the shards are dealt out to the parts in another order. With more parts than
    shards several parts share one, and each takes every so-manieth sample of it. A part mixes
    ``shuffle`` samples at a time. Parts that have fewer samples begin the next epoch earlier.
    Raises ``DataError`` for shards that are missing or without images, or that are cut off.
    """

    def __init__(self, config: WebDatasetConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        self.shards = Files.of(find_files("shards", config.shards, ".tar"))
        self.format = SampleFormat.of(config, list(self.shards.paths))
        odd = [
            complaint for path in self.shards.paths if (complaint := TarReader(path).check_end())
        ]
        if odd:
            log.warning("%s", first_few(odd, 2, "; "))
        self.known = Classes.of(config)
        self.targets = self.format.targets(self.known.target)

    def describe(self) -> str:
        gigabytes = sum(self.shards.sizes) / 1e9
        if self.format.label is None:
            kind = "no labels"
        else:
            kind = "labels" if self.n_classes is None else f"{self.n_classes:,} classes"
        return (
            f"webdataset {self.config.shards}: a stream of {len(self.shards):,} shards, "
            f"{gigabytes:,.3g} GB, {kind}; each sample once an epoch, in an order that depends on "
            "the seed and on processes x loader workers: with as many of these a run resumes at "
            "the very next sample, with others it begins the data anew"
        )

    def open(
        self, *, part: int, parts: int, seed: int, state: Any = None
    ) -> Iterator[tuple[Sample, Any]]:
        contents = self.shards.contents
        place, unreadable = Place.of(state, contents), 0
        while True:
            block, place, after = self._block(place, part, parts, seed)
            order = self._order(len(block), place, part, parts, seed)
            for index in order[: place.given]:
                del block[index]
            for given, index in enumerate(order[place.given :], place.given + 1):
                sample = self._decoded(block.pop(index))  # its bytes are not needed any more
                unreadable = 0 if isinstance(sample, Sample) else unreadable + 1
                if unreadable > _UNREADABLE:
                    raise DataError(
                        f"{_UNREADABLE:,} samples in a row could not be decoded, the last: {sample}"
                    )
                state = {"shards": contents, "place": asdict(evolve(place, given=given))}
                yield sample, state  # type: ignore[misc]
            place = after

    def shares(self, epoch: int, part: int, parts: int, seed: int) -> list[Share]:
        """What a part has of the shards in an epoch, in its order."""
        count = len(self.shards)
        order = keyed_rng(seed, "webdataset shards", epoch).permutation(count).tolist()
        if parts <= count:
            return [Share(shard, 0, 1) for shard in order[part::parts]]
        sharing = len(range(part % count, parts, count))
        return [Share(order[part % count], part // count, sharing)]

    def _order(self, size: int, place: Place, part: int, parts: int, seed: int) -> list[int]:
        """The order in which the samples of a block are given out."""
        if not self.config.shuffle:
            return list(range(size))
        rng = keyed_rng(seed, "webdataset block", place.epoch, place.block, part, parts)
        order: list[int] = rng.permutation(size).tolist()
        return order

    def _block(
        self, place: Place, part: int, parts: int, seed: int
    ) -> tuple[dict[int, Raw], Place, Place]:
        """The samples of a block by number, where it begins, and where the next one does.

        A block ends where it is full or an epoch ends.
        """
        most = self.config.shuffle or _UNMIXED
        for _ in range(_EMPTY):
            block: dict[int, Raw] = {}
            shares = self.shares(place.epoch, part, parts, seed)
            for number in range(place.shard, len(shares)):
                here = place if number == place.shard else Place()
                for raw, offset, sample in self._raw(shares[number], here.offset, here.sample):
                    block[len(block)] = raw
                    if len(block) == most:
                        after = Place(place.epoch, number, offset, sample, place.block + 1)
                        return block, place, after
            after = Place(epoch=place.epoch + 1)
            if block:
                return block, place, after
            place = after
        raise DataError(
            f"webdataset {self.config.shards}: too few samples for {parts} parts (processes x "
            "loader workers): one of them has none; fewer workers, or more shards"
        )

    def _raw(self, share: Share, offset: int, sample: int) -> Iterator[tuple[Raw, int, int]]:
        """Samples of a share with the offset and the number of that which follows in the shard."""
        path = self.shards.paths[share.shard]
        with open_shard(path, self.shards.sizes[share.shard]) as file:
            for number, group in enumerate(TarReader(path).groups(file, offset), sample):
                image = self.format.image(group)
                if number % share.step != share.first or image is None:
                    continue
                try:
                    raw: Raw = self.format.read(file, path, group, image)
                except CorruptSampleError as error:
                    raw = error
                yield raw, group.end, number + 1

    def _decoded(self, raw: Raw) -> Sample | CorruptSampleError:
        if isinstance(raw, CorruptSampleError):
            return raw
        try:
            return self.format.labeled(raw, self.channels, self.known)
        except CorruptSampleError as error:
            return error
