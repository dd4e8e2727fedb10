"""From parts to the files that people read; no more than a few MB of them are in memory at once."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_features.files import TensorSpec, tensor_bytes, write_npy, write_safetensors
from dinov3_features.parts import PartStore, patch_offsets
from dinov3_framework.errors import DataError, OutputError
from dinov3_framework.runtime.output import output_file

INDEX, SKIPPED = "index.csv", "skipped.csv"
_COLUMNS = ("row", "path", "label", "height", "width", "grid_height", "grid_width")


@frozen
class Summary:
    """What all parts hold together."""

    rows: int
    skipped: int
    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, Tensor]  # name -> where each image's patches begin, int64 [rows + 1]


def summarise(store: PartStore) -> Summary:
    """Look at the header of every part.

    Raises ``OutputError`` if parts do not fit together, and ``DataError`` if no image was read.
    """
    rows = skipped = 0
    first: Mapping[str, TensorSpec] = {}
    lengths: dict[str, int] = {}
    grids: dict[str, list[Tensor]] = {}
    for index in range(store.plan.parts):
        part = store.read(index)
        skipped += len(part.skipped)
        count = len(part.rows)
        rows += count
        if not count:
            continue
        specs = part.file.specs
        first = first or specs
        if _kinds(specs) != _kinds(first):
            raise OutputError(
                f"{part.file.path} holds other features than the parts before it; delete "
                f"{store.folder} and run again"
            )
        for name, spec in specs.items():
            lengths[name] = lengths.get(name, 0) + spec.shape[0]
            if name.endswith("grids"):
                offsets_name = name.removesuffix("grids") + "offsets"
                grids.setdefault(offsets_name, []).append(part.file.tensor(name))
    if not rows:
        _, name, reason = next(_skipped_rows(store))
        raise DataError(f"none of {skipped:,} images can be read, the first: {name}: {reason}")
    offsets = {name: patch_offsets(torch.cat(parts)) for name, parts in grids.items()}
    merged = {n: TensorSpec(s.dtype, (lengths[n], *s.shape[1:])) for n, s in first.items()}
    merged |= {name: TensorSpec.of(tensor) for name, tensor in offsets.items()}
    return Summary(rows, skipped, merged, offsets)


def _kinds(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    return {name: (spec.dtype, spec.shape[1:]) for name, spec in specs.items()}


def merge(
    store: PartStore, summary: Summary, output_dir: Path, format: str, metadata: Mapping[str, str]
) -> list[Path]:
    """Write ``features.safetensors``, or ``features.<name>.npy`` for each tensor.

    Raises ``OutputError`` where they cannot be written.
    """

    def chunks(name: str) -> Iterator[bytes]:
        if name in summary.offsets:  # those of a part count from its own beginning
            yield tensor_bytes(summary.offsets[name])
            return
        for index in range(store.plan.parts):
            file = store.read(index).file
            if name in file.specs:
                yield from file.chunks(name)

    path = output_dir / "features.safetensors"
    if format == "safetensors":
        with output_file(path) as aside:
            write_safetensors(aside, summary.specs, chunks, metadata)
        return [path]
    paths = []
    for name, spec in summary.specs.items():
        paths.append(output_dir / f"features.{name}.npy")
        with output_file(paths[-1]) as aside:
            write_npy(aside, spec, chunks(name))
    return paths


def write_tables(store: PartStore, output_dir: Path, merged: bool) -> None:
    """Write ``index.csv`` and ``skipped.csv``.

    A row of the index is a row of the features; of parts that were not merged, ``file`` names the
    part and rows count from 0 in each. Raises ``OutputError`` where they cannot be written.
    """
    index = _merged_rows(store) if merged else _part_rows(store)
    columns = _COLUMNS if merged else ("file", *_COLUMNS)
    for name, head, rows in (
        (INDEX, columns, index),
        (SKIPPED, ("index", "path", "reason"), _skipped_rows(store)),
    ):
        # Names of files may hold bytes that are no UTF-8; they come out as they are.
        with (
            output_file(output_dir / name) as aside,
            aside.open("x", encoding="utf-8", errors="surrogateescape", newline="") as stream,
        ):
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)


def _part_rows(store: PartStore) -> Iterator[tuple[Any, ...]]:
    for index in range(store.plan.parts):
        name = store.path(index).name
        for place, row in enumerate(store.read(index).rows):
            label = "" if row.label is None else row.label
            sizes = (row.height, row.width, row.grid_height, row.grid_width)
            yield (name, place, row.name, label, *sizes)


def _merged_rows(store: PartStore) -> Iterator[tuple[Any, ...]]:
    for place, (_, _, *rest) in enumerate(_part_rows(store)):
        yield (place, *rest)


def _skipped_rows(store: PartStore) -> Iterator[tuple[Any, ...]]:
    for index in range(store.plan.parts):
        yield from ((each.index, each.name, each.reason) for each in store.read(index).skipped)
