"""Parquet files, read by the row without loading them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_datasets.files import Files, find_files
from dinov3_datasets.tables import Table, missing_library
from dinov3_framework import CorruptSampleError, DataError
from dinov3_framework.errors import first_few, printable

if TYPE_CHECKING:
    import pyarrow as pa

# train-00000-of-00004.parquet, as datasets and the hub name the parts of a split.
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")


def parquet_files(path: str, split: str | None) -> list[Path]:
    """The Parquet files of a split; ``DataError`` if there is none, or several are meant."""
    place = Path(path).expanduser()
    if place.is_dir() and not any(place.glob("*.parquet")) and (place / "data").is_dir():
        path = str(place / "data")
    found = find_files("path", path, ".parquet")
    splits = {file: parsed[1] for file in found if (parsed := _PART.fullmatch(file.name))}
    splits = {file: splits.get(file, file.stem) for file in found}
    known = sorted(set(splits.values()))
    if split is not None:
        chosen = [file for file in found if splits[file] == split]
        if not chosen:
            raise DataError(f"split = {split!r}: no such split in {path}, only {first_few(known)}")
        return chosen
    is_named = {"train", "test", "validation", "val", "valid", "dev"} & set(known)
    if len(known) > 1 and is_named and Path(path).expanduser().is_dir():
        raise DataError(f"{path} holds several splits, state split: {first_few(known)}")
    return found


class ParquetTable(Table):
    """Rows of Parquet files of one schema.

    Parquet is read by the row group, so a row costs the reading and unpacking of the group that it
    is in, unless that is one of the last ones. Groups are kept up to ``cache_bytes``.
    """

    def __init__(self, paths: Sequence[Path], cache_bytes: int) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise missing_library("pyarrow") from error
        self.files, self.cache_bytes = Files.of(paths), cache_bytes
        self.contents, self.state = self.files.contents, self.files.state
        groups: list[tuple[int, int, int, int]] = []  # file, number in it, rows, bytes unpacked
        for number, path in enumerate(paths):
            try:
                file = pq.ParquetFile(path)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(
                    f"{path} is no sound Parquet file: {printable(str(error))}"
                ) from error
            with file:
                schema, metadata = file.schema_arrow, file.metadata
            self._check_schema(schema, path)
            for i in range(metadata.num_row_groups):
                group = metadata.row_group(i)
                groups.append((number, i, group.num_rows, group.total_byte_size))
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self):
            raise DataError(f"{first_few(paths)}: no rows")
        self._kept: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    def _check_schema(self, schema: pa.Schema, path: Path) -> None:
        if not hasattr(self, "schema"):
            self.schema = schema
        elif not schema.equals(self.schema):
            raise DataError(
                f"{path} has other columns than {self.files.paths[0]}: "
                f"{first_few(schema.names)} there, {first_few(self.schema.names)} here, or other "
                "types of them"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def column(self, name: str) -> list[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        values: list[Any] = []
        for path in self.files.paths:
            try:
                with pq.ParquetFile(path) as file:
                    values += file.read(columns=[name], use_threads=False).column(name).to_pylist()
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(f"{path} cannot be read: {printable(str(error))}") from error
        return values

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        import pyarrow as pa

        group = int(np.searchsorted(self._ends, index, side="right"))
        place = index - int(self._ends[group] - self._groups[group, 2])
        try:
            table = self._group(group, tuple(columns))
            return {name: table.column(name)[place].as_py() for name in columns}
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CorruptSampleError(
                self.name(index), f"its row group cannot be read: {error}"
            ) from error

    def _group(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        import pyarrow.parquet as pq

        key = (group, columns)
        table = self._kept.pop(key, None)
        if table is None:
            number, place = self._groups[group, :2].tolist()
            with pq.ParquetFile(self.files.paths[number]) as file:
                # Threads of a forked process are not there any more.
                table = file.read_row_group(place, columns=list(columns), use_threads=False)
            room = self.cache_bytes - table.nbytes
            while self._kept and sum(each.nbytes for each in self._kept.values()) > room:
                self._kept.popitem(last=False)
        self._kept[key] = table
        return table

    def name(self, index: int) -> str:
        group = int(np.searchsorted(self._ends, index, side="right"))
        number = int(self._groups[group, 0])
        first = int(np.searchsorted(self._groups[:, 0], number))
        before = int(self._ends[first - 1]) if first else 0
        return f"{self.files.paths[number].name}:{index - before}"

    def notes(self) -> list[str]:
        rows, sizes = self._groups[:, 2], self._groups[:, 3]
        if sizes.sum() <= self.cache_bytes:
            return []
        return [
            "a sample at random costs the reading of its row group, as a rule "
            f"{np.median(rows):,.0f} rows and {np.median(sizes) / 2**20:,.1f} MiB; row groups of "
            "some 20 images, or a folder of save_to_disk, are read faster"
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}
