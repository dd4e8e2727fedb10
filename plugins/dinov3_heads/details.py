"""What evaluations found besides their metrics, as files of a run's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinov3_framework import Model
from dinov3_framework.contracts.running import ChosenHead, Details
from dinov3_framework.parallel.state_dicts import fingerprint
from dinov3_framework.runtime.environment import software
from dinov3_framework.runtime.output import output_file
from dinov3_framework.runtime.results import tabulated, write_csv
from dinov3_framework.weights.export import export_tensors
from dinov3_framework.weights.heads import FINGERPRINT, head_info


def write_details(
    output_dir: Path, details: Mapping[str, Details], model: Model, *, writes: bool
) -> list[str]:
    """Write tables as CSV, arrays as NumPy files and heads that were chosen; their names.

    To be called by every process, of which one ``writes``. Raises ``OutputError`` where the folder
    cannot be written.
    """
    known = {"chosen from": model.name, "software": software()}
    if any(found.head is not None for found in details.values()):
        known[FINGERPRINT] = repr(fingerprint(model.backbone))
    names: list[str] = []
    if not writes:
        return names
    for evaluation, found in details.items():
        if found.head is not None:
            names.append(_file_name(evaluation, "head", "safetensors"))
            _write_head(output_dir / names[-1], found.head, model, known)
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


def _write_head(path: Path, chosen: ChosenHead, model: Model, known: Mapping[str, str]) -> None:
    state, targets = chosen.head.state_dict(), chosen.head.targets
    info = head_info(chosen.component, chosen.config, model.images, model.size, targets, known)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    export_tensors(path, specs, state.items(), info.to_metadata())


def _file_name(evaluation: str, part: str, suffix: str) -> str:
    return re.sub(r"[^\w.@+-]+", "_", f"{evaluation}_{part}") + f".{suffix}"
