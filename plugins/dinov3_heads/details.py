"""What evaluations found besides their metrics, as files of a run's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinov3_framework.contracts.running import Details
from dinov3_framework.runtime.output import output_file
from dinov3_framework.runtime.results import tabulated, write_csv


def write_details(output_dir: Path, details: Mapping[str, Details]) -> list[str]:
    """Write tables as CSV and arrays as NumPy files; their names.

    Raises ``OutputError`` where the folder cannot be written.
    """
    names = []
    for evaluation, found in details.items():
        for table, rows in found.tables.items():
            names.append(_file_name(evaluation, table, "csv"))
            flat, columns = tabulated(rows)
            cells = ([row.get(column, "") for column in columns] for row in flat)
            with output_file(output_dir / names[-1]) as aside:
                write_csv(aside, columns, cells)
        for array, values in found.arrays.items():
            names.append(_file_name(evaluation, array, "npy"))
            with output_file(output_dir / names[-1]) as aside, aside.open("xb") as stream:
                np.save(stream, values, allow_pickle=False)
    return names


def _file_name(evaluation: str, part: str, suffix: str) -> str:
    return re.sub(r"[^\w.@+-]+", "_", f"{evaluation}_{part}") + f".{suffix}"
