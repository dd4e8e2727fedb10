"""The parts in which features are written, and the files that become of them.

A part holds the features of ``rows_per_part`` images that follow each other in the dataset, less
those that cannot be read; it is a safetensors file whose metadata list the images. A part that is
there is whole, so a run that was killed goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attrs import asdict, frozen
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinov3_framework.contracts.data import Dataset
from dinov3_framework.errors import DataError, OutputError
from dinov3_framework.runtime.durable import clear_aside, parse_json, read_file, unwritable
from dinov3_framework.runtime.output import output_file, write_aside
from dinov3_framework.runtime.results import write_csv
from dinov3_framework.weights.tensor_file import CODES, write_array_file, write_tensor_file

FOLDER, PLAN = "features", "plan.json"
INDEX, SKIPPED = "index.csv", "skipped.csv"
_CHUNK = 16 * 2**20  # bytes copied at a time
_VALUES = 64  # of each tensor, that tell weights apart

Spec = tuple[torch.dtype, tuple[int, ...]]


class Row(NamedTuple):
    """One image whose features are there."""

    sample: int  # its index in the dataset
    name: str
    label: int | None
    height: int  # pixels of the image as it was read
    width: int
    grid_height: int  # patches of the image as the backbone saw it
    grid_width: int


class Skipped(NamedTuple):
    """One image that cannot be read."""

    sample: int
    name: str
    reason: str


@frozen
class Partition:
    """How a dataset is cut into parts; what every part of a run has to agree with."""

    images: int
    rows_per_part: int
    names: str  # a digest of the images' names, in order
    weights: str  # a digest of the backbone

    @classmethod
    def of(
        cls, dataset: Dataset, rows_per_part: int, tensors: Iterable[tuple[str, Tensor]]
    ) -> Partition:
        """``tensors`` are those of the backbone; training changes the first values of each."""
        names, weights = hashlib.sha256(), hashlib.sha256()
        for index in range(len(dataset)):
            names.update(dataset.name(index).encode("utf-8", "surrogateescape") + b"\n")
        for name, tensor in tensors:
            first = tensor.flatten()[:_VALUES].double().tolist()
            weights.update(f"{name} {list(tensor.shape)} {first}\n".encode())
        return cls(len(dataset), rows_per_part, names.hexdigest(), weights.hexdigest())

    @property
    def parts(self) -> int:
        return -(-self.images // self.rows_per_part)

    def indices(self, part: int) -> range:
        first = part * self.rows_per_part
        return range(first, min(first + self.rows_per_part, self.images))


class PartStore:
    """The parts below an output folder."""

    def __init__(self, output_dir: Path, partition: Partition) -> None:
        self.folder, self.partition = output_dir / FOLDER, partition

    def prepare(self) -> None:
        """Make the folder, or find that it is this partition's; by one process.

        Raises ``OutputError`` if the parts there are of other images or other weights.
        """
        path, wanted = self.folder / PLAN, asdict(self.partition)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_aside(self.folder.parent)
            before = parse_json(read_file(path)) if path.exists() else None
        except OSError as error:
            raise unwritable(error, path) from error
        except ValueError as error:
            raise OutputError(f"{path} is damaged; delete {self.folder} and run again") from error
        if before is None:
            write_aside(path, json.dumps(wanted, indent=2) + "\n")
        elif before != wanted:
            changed = [key for key in wanted if before.get(key) != wanted[key]]
            what = " and ".join({"names": "the images' names"}.get(key, key) for key in changed)
            raise OutputError(
                f"{self.folder} holds parts from before {what} changed; choose another "
                "--output-dir, or delete that folder to start anew"
            )

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05}.safetensors"

    def missing(self) -> list[int]:
        return [part for part in range(self.partition.parts) if not self.path(part).exists()]

    def write(
        self,
        part: int,
        tensors: Mapping[str, Tensor],
        rows: Sequence[Row],
        skipped: Sequence[Skipped],
    ) -> None:
        """Raises ``OutputError`` if it cannot be written; then nothing is left behind."""
        metadata = {"format": "pt", "rows": json.dumps(rows), "skipped": json.dumps(skipped)}
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with output_file(self.path(part)) as aside:
            write_tensor_file(aside, specs, tensors.items(), metadata)

    def parts(self) -> Iterator[Part]:
        """All parts, in order; raises ``OutputError`` for one that is not there or not whole."""
        return (Part(self.path(part)) for part in range(self.partition.parts))

    def remove(self) -> None:
        """Delete all parts, which are in other files by now."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Part:
    """A part on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise OutputError(
                f"{path} is not there, though a process wrote it; the output folder must be one "
                "that all processes see"
            )
        try:
            self.file = safe_open(path, "pt")
            metadata = self.file.metadata()
            self.rows = [Row(*values) for values in parse_json(metadata["rows"])]
            self.skipped = [Skipped(*values) for values in parse_json(metadata["skipped"])]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is damaged ({error}); delete it and run again, it will be made anew"
            ) from error
        types = {code: dtype for dtype, code in CODES.items()}
        names = self.file.keys()
        slices = {name: self.file.get_slice(name) for name in names}
        self.specs: dict[str, Spec] = {
            name: (types[each.get_dtype()], tuple(each.get_shape()))
            for name, each in slices.items()
        }

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor along its first axis, little of it at a time; nothing where there is none."""
        if name not in self.specs:
            return
        dtype, (length, *rest) = self.specs[name]
        step = max(_CHUNK // (torch.Size(rest).numel() * dtype.itemsize), 1)
        values = self.file.get_slice(name)
        for start in range(0, length, step):
            yield values[start : start + step]


@frozen
class Summary:
    """What all parts hold together."""

    rows: int
    skipped: int
    specs: Mapping[str, Spec]
    offsets: Mapping[str, Tensor]  # name -> where each image's patches begin, int64 [rows + 1]


def summarize(store: PartStore) -> Summary:
    """Look at every part.

    Raises ``OutputError`` if parts do not fit together, and ``DataError`` if no image was read.
    """
    rows, skipped = 0, []
    alike: dict[str, Spec] = {}  # but for the length, which is 0
    lengths: dict[str, int] = {}
    grids: dict[str, list[Tensor]] = {}
    for part in store.parts():
        rows += len(part.rows)
        skipped += part.skipped
        found = {name: (dtype, (0, *shape[1:])) for name, (dtype, shape) in part.specs.items()}
        alike = alike or found
        if part.rows and found != alike:
            raise OutputError(
                f"{part.path} holds other features than the parts before it; delete "
                f"{store.folder} and run again"
            )
        for name, (_, shape) in part.specs.items():
            lengths[name] = lengths.get(name, 0) + shape[0]
            if name.endswith("grids"):
                grids.setdefault(name.removesuffix("grids"), []).append(part.file.get_tensor(name))
    if not rows:
        _, name, reason = skipped[0]
        raise DataError(f"none of {len(skipped):,} images can be read, the first: {name}: {reason}")
    specs = {name: (dtype, (lengths[name], *shape[1:])) for name, (dtype, shape) in alike.items()}
    offsets = {f"{key}offsets": patch_offsets(torch.cat(each)) for key, each in grids.items()}
    specs |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in offsets.items()}
    return Summary(rows, len(skipped), specs, offsets)


def merge(
    store: PartStore, summary: Summary, output_dir: Path, format: str, metadata: Mapping[str, str]
) -> list[Path]:
    """Write ``features.safetensors``, or ``features.<name>.npy`` for each tensor.

    Raises ``OutputError`` where they cannot be written.
    """

    def pieces(name: str) -> Iterator[Tensor]:
        if name in summary.offsets:  # those of a part count from its own beginning
            yield summary.offsets[name]
            return
        for part in store.parts():
            yield from part.pieces(name)

    if format == "safetensors":
        path = output_dir / "features.safetensors"
        named = ((name, piece) for name in summary.specs for piece in pieces(name))
        with output_file(path) as aside:
            write_tensor_file(aside, summary.specs, named, metadata)
        return [path]
    paths = []
    for name, (dtype, shape) in summary.specs.items():
        paths.append(output_dir / f"features.{name}.npy")
        with output_file(paths[-1]) as aside:
            write_array_file(aside, dtype, shape, pieces(name))
    return paths


def write_tables(
    store: PartStore, output_dir: Path, merged: bool, classes: Sequence[str] | None
) -> None:
    """Write ``index.csv`` and ``skipped.csv``.

    A row of the index is a row of the features; of parts that were not merged, ``file`` names the
    part and rows count from 0 in each. ``classes`` are the labels' names. Raises ``OutputError``
    where they cannot be written.
    """
    placed = (
        (part.path.name, place, row)
        for part in store.parts()
        for place, row in enumerate(part.rows)
    )
    index: Iterator[tuple[Any, ...]]
    if merged:
        index = ((total, *_cells(row, classes)) for total, (_, _, row) in enumerate(placed))
    else:
        index = ((file, place, *_cells(row, classes)) for file, place, row in placed)
    columns = ("row", "path", "label", "class", *Row._fields[3:])
    for name, head, rows in (
        (INDEX, columns if merged else ("file", *columns), index),
        (SKIPPED, ("index", "path", "reason"), (each for p in store.parts() for each in p.skipped)),
    ):
        with output_file(output_dir / name) as aside:
            write_csv(aside, head, rows)


def _cells(row: Row, classes: Sequence[str] | None) -> tuple[Any, ...]:
    """An image's cells in the index, but its place."""
    known = classes is not None and row.label is not None
    return row.name, row.label, classes[row.label] if known else None, *row[3:]


def patch_offsets(grids: Tensor) -> Tensor:
    """Where each image's patches begin in their sequence, and its end: int64 [n + 1].

    ``grids``, int64 [n, 2], are patches along height and width.
    """
    offsets = torch.zeros(len(grids) + 1, dtype=torch.int64)
    offsets[1:] = grids.prod(1).cumsum(0)
    return offsets
