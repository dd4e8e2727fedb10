"""Shards of WebDataset as a dataset with an index."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinov3_datasets.decoding import pixel_options
from dinov3_datasets.files import Files, find_files
from dinov3_datasets.labels import NONE, Classes, Labels, Value, number_labels
from dinov3_datasets.listing import FileList
from dinov3_datasets.shard_index import TarIndex, index_path, load, scan
from dinov3_datasets.tar_samples import RawSample, SampleFormat, read_at, read_text, sample_name
from dinov3_datasets.tars import Group, Member, TarReader, open_shard
from dinov3_datasets.webdataset_config import WebDatasetConfig
from dinov3_framework import CorruptSampleError, Dataset, Sample
from dinov3_framework.errors import first_few

_OPEN = 64  # shards that are kept open


class TarDataset(Dataset):
    """Samples of tar files by index, in the order of the files; images uint8 [channels, H, W].

    Headers come from the index files beside the shards where these are there and fit, else from the
    shards themselves, once. Samples are read with ``pread``, so that forked workers do not disturb
    each other. Raises ``DataError`` for shards that are missing, damaged or without images.
    """

    def __init__(self, config: WebDatasetConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        self.shards = Files.of(find_files("shards", config.shards, ".tar"))
        self.format = SampleFormat.of(config, list(self.shards.paths))
        self.passed_over: Counter[str] = Counter()
        self.unused_indexes: list[str] = []
        self.complaints: dict[int, str] = {}
        self._shard, self._places, self._texts = array("i"), array("q"), array("q")
        values: list[Value | None] = []
        self.names = FileList(self._scan(values))
        self.labels = self._number(values)
        self.targets = self.format.targets(self.labels.target)
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    # ------------------------------------------------------------------ what there is
    def _scan(self, values: list[Value | None]) -> Iterator[str]:
        """The names of all images; notes where these are and, in ``values``, their labels."""
        for number, shard in enumerate(self.shards.paths):
            index = self._index(shard)
            reader, numbers = TarReader(shard), index.numbers
            self.passed_over["links, folders or devices"] += index.passed_over
            with open_shard(shard) as file:
                for group in reader.grouped(index.members()):
                    image = self.format.image(group)
                    if image is None:
                        self.passed_over["samples without an image"] += 1
                        continue
                    self._note(number, group, image, len(values))
                    values.append(self._label(file, shard, group, numbers))
                    yield image.name
            self.passed_over.update(reader.passed_over)

    def _index(self, shard: Path) -> TarIndex:
        index = load(shard)
        if isinstance(index, TarIndex):
            return index
        if index:
            self.unused_indexes.append(f"{index_path(shard).name} {index}")
        return scan(shard)

    def _note(self, shard: int, group: Group, image: Member, index: int) -> None:
        self._shard.append(shard)
        self._places.extend((image.offset, image.size))
        if group.repeated:
            self.complaints[index] = f"the sample has two members {group.repeated!r}"
        if self.format.text is not None:
            member = group.members.get(self.format.text.ending)
            self._texts.extend((0, -1) if member is None else (member.offset, member.size))

    def _label(
        self, file: BinaryIO, shard: Path, group: Group, numbers: dict[int, int]
    ) -> Value | None:
        part = self.format.label
        member = None if part is None else group.members.get(part.ending)
        if part is None or member is None:
            return None
        if part.ending == "cls" and member.offset in numbers:
            return numbers[member.offset]
        try:
            return part.value(read_text(file, shard, member.name, member))
        except (ValueError, CorruptSampleError):
            return None

    def _number(self, values: list[Value | None]) -> Labels:
        what = f"webdataset {self.config.shards}"
        classes = Classes.of(self.config)
        labels = number_labels(values, classes, what, lambda index: self.name(index))
        if self.format.label is not None:
            for index in np.flatnonzero(labels.values == NONE).tolist():
                text = f"the sample has no label: {self.format.label} is missing or unreadable"
                self.complaints.setdefault(index, text)
        return labels

    # ------------------------------------------------------------------ the dataset
    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        name = self.name(index)
        if index in self.complaints:
            raise CorruptSampleError(name, self.complaints[index])
        offset, size = self._places[2 * index : 2 * index + 2]
        if size > self.config.max_bytes:
            raise CorruptSampleError(
                name, f"has {size:,} bytes, max_bytes = {self.config.max_bytes:,}"
            )
        shard = self._shard[index]
        file, path = self._open(shard), self.shards.paths[shard]
        parts = {}
        if self.format.text is not None:
            ending = self.format.text.ending
            start, length = self._texts[2 * index : 2 * index + 2]
            if length < 0:
                raise CorruptSampleError(name, f"the sample has no member {ending!r}")
            parts[ending] = read_text(file, path, name, Member(ending, start, length))
        raw = RawSample(name, read_at(file, path, offset, size), parts)
        label = int(self.labels.values[index]) if self.format.label is not None else None
        return self.format.sample(raw, self.channels, label)

    def label(self, index: int) -> int | None:
        return None if self.format.label is None else self.labels.label(index)

    def name(self, index: int) -> str:
        index = range(len(self))[index]
        return sample_name(self.shards.paths[self._shard[index]], self.names[index])

    def describe(self) -> str:
        kind = "no labels" if self.n_classes is None else f"{self.n_classes:,} classes"
        return (
            f"webdataset {self.config.shards}: {len(self):,} images in {len(self.shards):,} "
            f"shards, {kind}"
        )

    def digest(self) -> str:
        return f"{len(self):,} images, their names {self.names.digest}, labels {self.labels.digest}"

    def version(self) -> str:
        text = "" if self.format.text is None else f", text {self.format.text}"
        options = pixel_options(self.config, self.channels)
        return f"{self.digest()}, shards {self.shards.state}, {options}{text}"

    def notes(self) -> list[str]:
        """What was left out, index files that were not used, shards that end oddly."""
        found = [f"{count:,} {what} passed over" for what, count in self.passed_over.items()]
        found = [line for line in found if not line.startswith("0 ")]
        if self.unused_indexes:
            found.append(
                f"{len(self.unused_indexes):,} index files not used, their shards were scanned: "
                f"{first_few(self.unused_indexes, 2)}; write them again"
            )
        odd = [
            complaint for path in self.shards.paths if (complaint := TarReader(path).check_end())
        ]
        return found + ([first_few(odd, 2, "; ")] if odd else [])

    # ------------------------------------------------------------------ files
    def _open(self, shard: int) -> BinaryIO:
        """An open shard; those not used for long are closed once nobody reads from them."""
        file = self._files.pop(shard, None)
        if file is None:
            file = open_shard(self.shards.paths[shard], self.shards.sizes[shard])
        self._files[shard] = file
        if len(self._files) > _OPEN:
            self._files.popitem(last=False)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}
