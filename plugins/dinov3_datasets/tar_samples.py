"""Samples from the members of a tar file: their bytes, and what these mean."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from attrs import frozen

from dinov3_datasets.decoding import decode
from dinov3_datasets.labels import Classes, Value, whole_number
from dinov3_datasets.tars import Group, Member, TarReader, open_shard
from dinov3_datasets.webdataset_config import WebDatasetConfig
from dinov3_framework import CorruptSampleError, DataError, Sample, Target
from dinov3_framework.errors import first_few, printable

_LARGEST_TEXT = 1 << 20  # bytes of a label, a caption or a JSON file


@frozen
class Part:
    """Where in a sample a label or a text is: a member, or a field of one."""

    ending: str
    field: str | None = None

    @classmethod
    def parse(cls, text: str | None) -> Part | None:
        """``cls``, ``json:label``."""
        if text is None:
            return None
        ending, colon, name = text.partition(":")
        return cls(ending.lower(), name if colon else None)

    def value(self, data: bytes) -> Value:
        """What is there; ``ValueError`` says why it is no label and no text."""
        text = data.decode("utf-8")
        if self.ending == "cls":
            number = whole_number(text)
            if number is None:
                raise ValueError(f"cls holds {printable(text[:40])!r}, no whole number")
            return number
        if self.field is None:
            return text
        try:
            fields = json.loads(text)
        except RecursionError:
            raise ValueError(f"{self.ending} is nested too deeply") from None
        if not isinstance(fields, dict) or self.field not in fields:
            held = first_few(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"{self.ending} has no field {self.field!r}, it has {held}")
        found = fields[self.field]
        if isinstance(found, bool) or not isinstance(found, Value):
            raise ValueError(f"{self} is {type(found).__name__}, no number and no text")
        return found

    def __str__(self) -> str:
        return self.ending if self.field is None else f"{self.ending}:{self.field}"


@frozen
class RawSample:
    """A sample as it is stored: the bytes of the members that it needs, by ending."""

    name: str
    image: bytes
    parts: Mapping[str, bytes]


@frozen
class SampleFormat:
    """Which members of a sample are its image, its label and its text."""

    config: WebDatasetConfig
    label: Part | None
    text: Part | None

    @classmethod
    def of(cls, config: WebDatasetConfig, shards: list[Path]) -> SampleFormat:
        """The recipe's, tried on the first sample; ``DataError`` if there is none, or it lacks it.

        Reads headers up to the first image, seldom more than one.
        """
        seen: set[str] = set()
        group, shard = None, shards[0]
        for shard in shards:
            reader = TarReader(shard)
            with open_shard(shard) as file:
                for group in reader.groups(file):
                    if group.first(config.images):
                        break
                    seen.update(group.members)
                else:
                    continue
            break
        if group is None or not group.first(config.images):
            held = f"members end in {first_few(sorted(seen))}" if seen else "there are no samples"
            raise DataError(
                f"no image in {shards[0]}{' and others' if len(shards) > 1 else ''}: "
                f"{printable(held)}; looked for {' '.join(config.images)}\n"
                "    the ending is all that follows the first dot of the file name"
            )
        if config.label != "auto":
            label = Part.parse(config.label)
        else:
            label = Part("cls") if "cls" in group.members else None
        found = cls(config, label, Part.parse(config.text))
        for key, part in (("label", found.label), ("text", found.text)):
            if part is not None and part.ending not in group.members:
                raise DataError(
                    f'{key} = "{part}", but the first sample, {printable(group.key)} of {shard}, '
                    f"has no member {part.ending}; it has {printable(first_few(group.members))}"
                )
        if label is None and (config.classes or config.n_classes):
            raise DataError(
                f"classes are stated, but the first sample, {printable(group.key)} of {shard}, has "
                "no member cls; say with label where labels are"
            )
        return found

    def image(self, group: Group) -> Member | None:
        """The member that is a sample's image."""
        return group.first(self.config.images)

    def read(self, file: BinaryIO, shard: Path, group: Group, image: Member) -> RawSample:
        """The bytes of a sample; raises ``CorruptSampleError``, before it reads what is large."""
        name = sample_name(shard, image.name)
        if group.repeated:
            raise CorruptSampleError(name, f"the sample has two members {group.repeated!r}")
        parts = {}
        for part in (self.label, self.text):
            if part is None:
                continue
            member = group.members.get(part.ending)
            if member is None:
                raise CorruptSampleError(name, f"the sample has no member {part.ending!r}")
            parts[part.ending] = read_text(file, shard, name, member)
        if image.size > self.config.max_bytes:
            raise CorruptSampleError(
                name, f"has {image.size:,} bytes, max_bytes = {self.config.max_bytes:,}"
            )
        return RawSample(name, read_at(file, shard, image.offset, image.size), parts)

    def part(self, raw: RawSample, part: Part) -> Value:
        """A label or a text of a sample; raises ``CorruptSampleError``."""
        try:
            return part.value(raw.parts[part.ending])
        except ValueError as error:
            raise CorruptSampleError(raw.name, str(error)) from error

    def targets(self, label: Target) -> dict[str, Target]:
        """What samples have besides the image; ``label`` is the target of that name."""
        found = {} if self.label is None else {"label": label}
        return found if self.text is None else found | {"text": Target("text")}

    def sample(self, raw: RawSample, channels: int, label: int | None) -> Sample:
        """A sample with its decoded image; raises ``CorruptSampleError``."""
        targets: dict[str, int | str] = {}
        if label is not None:
            targets["label"] = label
        if self.text is not None:
            targets["text"] = str(self.part(raw, self.text))
        return Sample(decode(self.config, raw.image, raw.name, channels), targets)

    def labeled(self, raw: RawSample, channels: int, classes: Classes) -> Sample:
        """The same with the label as it is stored; ``DataError`` for one that is no class."""
        if self.label is None:
            return self.sample(raw, channels, None)
        value = self.part(raw, self.label)
        try:
            label = classes.number(value)
        except ValueError as error:
            raise DataError(
                f"{printable(raw.name)}: {error}\n    state all classes (classes or n_classes), or "
                "mend the labels"
            ) from error
        return self.sample(raw, channels, label)


def sample_name(shard: Path, member: str) -> str:
    """What a sample is called."""
    return f"{shard.name}:{member}"


def read_text(file: BinaryIO, shard: Path, name: str, member: Member) -> bytes:
    """The bytes of a label, a caption or a JSON file; ``CorruptSampleError`` if they are many."""
    if member.size > _LARGEST_TEXT:
        raise CorruptSampleError(name, f"{member.name} has {member.size:,} bytes")
    return read_at(file, shard, member.offset, member.size)


def read_at(file: BinaryIO, shard: Path, offset: int, size: int) -> bytes:
    """Bytes of a shard; ``DataError`` where it ends before."""
    pieces, missing = [], size
    while missing:
        try:
            piece = os.pread(file.fileno(), missing, offset + size - missing)
        except OSError as error:
            raise DataError(f"{shard} cannot be read: {error.strerror}") from error
        if not piece:
            raise DataError(
                f"{shard} is cut off: byte {offset + size:,} is missing\n    copy or make this "
                "shard again"
            )
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
