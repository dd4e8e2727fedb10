"""Results as files and as a table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def write_results(
    output_dir: Path, results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``results`` to results.json and ``rows``, flat and alike, to results.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    output_dir.mkdir(parents=True, exist_ok=True)
    _replace(output_dir / "results.csv", text.getvalue())
    _replace(output_dir / "results.json", json.dumps(results, indent=2) + "\n")


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show flat rows that are alike, numbers to the right."""
    table = Table(title=title)
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
