"""Reads lists of images: CSV, TSV and JSON Lines, checked line by line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from dinov3_framework import DataError
from dinov3_framework.errors import first_few, printable

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
_LONGEST = 1 << 20  # characters of a field

Row = Mapping[str, Any]


@frozen
class ListFile:
    """The columns of a list, and its rows with the numbers of their lines."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    lines: list[int]

    def column(self, key: str, given: str | None, usual: str) -> str | None:
        """The column that an option means; ``DataError`` if it is stated and not there.

        ``auto`` means the ``usual`` one if it is there.
        """
        if given == "auto":
            return usual if usual in self.columns else None
        if given is not None and given not in self.columns:
            raise DataError(
                f"{self.path}: {key} = {given!r}: there is no such column; the columns are "
                f"{printable(first_few(self.columns, 12))}"
            )
        return given

    def wrong(self, index: int, what: str) -> DataError:
        """What to raise for a row."""
        return DataError(f"{self.path}, line {self.lines[index]}: {printable(what)}")


def read_list(path: str) -> ListFile:
    """The rows of a list; ``DataError`` names the first line that is none."""
    place = Path(path).expanduser()
    ending = place.suffix.lower()
    if ending not in (*_DELIMITERS, *_LINES):
        raise DataError(f"path = {path!r}: a list ends in .csv, .tsv or .jsonl")
    if not place.is_file():
        what = "is no file" if place.exists() else "does not exist"
        raise DataError(f"path = {path!r} {what}")
    reader = _objects(place) if ending in _LINES else _records(place, _DELIMITERS[ending])
    rows, lines, columns = [], [], dict[str, None]()
    try:
        for line, row in reader:
            rows.append(row)
            lines.append(line)
            columns |= dict.fromkeys(row)
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not in UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{place} lists no images")
    return ListFile(place, tuple(columns), rows, lines)


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Rows of a table with a header."""
    csv.field_size_limit(_LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        try:
            for fields in reader:
                if not fields:
                    continue
                if header is None:
                    header = _header(path, fields)
                    continue
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, the header has "
                        f"{len(header)} ({printable(first_few(header, 12))})"
                    )
                yield reader.line_num, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _header(path: Path, fields: list[str]) -> list[str]:
    repeated = sorted({name for name in fields if fields.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: the header has {printable(first_few(repeated))} more than once")
    return fields


def _objects(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows that are a JSON object a line."""
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: {type(row).__name__}, a row is an object")
            yield number, row
