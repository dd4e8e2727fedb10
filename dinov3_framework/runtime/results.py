"""Results of a task: ``results.json``, flat rows as ``results.csv``, and tables to read."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dinov3_framework.errors import printable
from dinov3_framework.runtime.output import RESULTS, output_file, write_aside

TABLE = "results.csv"
_WIDE = 6  # columns, beyond which a table is printed with a line for each of them


@attrs.frozen
class Record:
    """One number of an evaluation, with everything that changes what it means."""

    evaluation: str  # such as "knn"
    model: str  # such as "trained teacher", or what it has to beat
    metric: str  # such as "accuracy@10"
    value: float
    protocol: Mapping[str, Any]  # every switch: crop, temperature, test-time augmentation, ...
    data: str
    weights: str  # the weights' hash
    seed: int
    interval: tuple[float, float] | None = None  # 95 % confidence

    def row(self) -> dict[str, Any]:
        """The record as one flat row; ``protocol``'s keys become columns ``protocol.<key>``."""
        fields = attrs.asdict(self)
        switches, interval = fields.pop("protocol"), fields.pop("interval")
        if interval is not None:
            fields |= {"low": interval[0], "high": interval[1]}
        return fields | {f"protocol.{key}": value for key, value in switches.items()}


Row: TypeAlias = Mapping[str, Any] | Record


def write_results(
    output_dir: Path, results: Mapping[str, Any], rows: Sequence[Row] | None = None
) -> None:
    """Write ``rows`` to ``results.csv``, if any, then ``results.json``, which completes the run.

    ``results`` may hold records at any depth, which are the rows if none are given; a number that
    is not finite becomes null. Rows may differ in their keys. Raises ``OutputError`` where the
    folder cannot be written.
    """
    if rows is None:
        rows = list(_records(results))
    if rows:
        flat, columns = tabulated(rows)
        cells = ([row.get(name, "") for name in columns] for row in flat)
        with output_file(output_dir / TABLE) as aside:
            write_csv(aside, columns, cells)
    content = json.dumps(_plain(results), indent=2, allow_nan=False)
    write_aside(output_dir / RESULTS, content + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, a line for each row; what does not print in its texts is escaped."""
    with path.open("x", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        for row in itertools.chain([columns], rows):
            writer.writerow(
                [printable(cell, kept="") if isinstance(cell, str) else cell for cell in row]
            )


def print_results(title: str, rows: Sequence[Row]) -> None:
    """Print ``rows`` as a table on standard output, with nothing cut off.

    Of records, what they have in common is left out: data, say, or the protocol.
    """
    flat, columns = tabulated(rows)
    if all(isinstance(row, Record) for row in rows):
        always = ("evaluation", "metric", "value")
        columns = [
            name
            for name in columns
            if name in always or any(row.get(name) != flat[0].get(name) for row in flat)
        ]
    elif len(columns) > _WIDE and len(flat) < len(columns):
        flat, columns = _turned(flat, columns)
    table = Table(title=Text(title), title_justify="left")
    for name in columns:
        is_number = all(isinstance(row.get(name, 0), int | float) for row in flat)
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in flat:
        # As Text: what stands in brackets, in a path say, is no markup.
        table.add_row(*(Text(format_value(row.get(name, ""))) for name in columns))
    Console(highlight=False).print(table)


def _turned(
    flat: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The same table with a line for each column but the first, which heads the others."""
    first, *others = columns
    names = [str(row.get(first, "")) for row in flat]
    if len(set(names)) < len(names):
        return list(flat), list(columns)
    turned: list[Mapping[str, Any]] = [
        {first: name} | {head: row.get(name, "") for head, row in zip(names, flat, strict=True)}
        for name in others
    ]
    return turned, [first, *names]


def tabulated(rows: Sequence[Row]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Flat rows, and all their columns in order of appearance."""
    flat = [row.row() if isinstance(row, Record) else row for row in rows]
    return flat, list(dict.fromkeys(name for row in flat for name in row))


def format_value(value: Any) -> str:
    return printable(str(float(f"{value:.6g}") if isinstance(value, float) else value))


def _records(value: Any) -> Iterator[Record]:
    if isinstance(value, Record):
        yield value
    elif isinstance(value, Mapping):
        yield from _records(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _records(each)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it, with null for NaN and infinity."""
    if isinstance(value, Record):
        return _plain(attrs.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_summary(results: Mapping[str, Any], output_dir: Path, usage: str) -> None:
    """Show tables of results, and what to do with them."""
    for name, value in results.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(row, Mapping | Record) for row in value)
        ):
            print_results(name, value)
    print(f"\nDone. Everything is in {output_dir}:")
    for entry in sorted(output_dir.iterdir()):
        if not entry.name.startswith("."):
            print(f"  {entry.name}{'/' if entry.is_dir() else ''}")
    if usage:
        print(f"\n{usage}")
