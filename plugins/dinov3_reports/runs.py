"""What runs have left, read back: records of evaluations, curves, confusion matrices."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from dinov3_framework import DataError
from dinov3_framework.errors import first_few, printable
from dinov3_framework.runtime.durable import read_file
from dinov3_framework.runtime.output import RECIPE, RESULTS
from dinov3_framework.runtime.results import Record

METRICS = "metrics.jsonl"
_FIELDS = {field.name for field in attrs.fields(Record)} - {"interval"}  # which came later
_TEXTS = ("evaluation", "model", "metric", "data", "weights")

Key = tuple[str, str]  # evaluation and metric


@attrs.frozen(eq=False)
class Series:
    """A metric over a training: iterations [n] and values [n], NaN where it was not finite."""

    iterations: np.ndarray
    values: np.ndarray


@attrs.frozen(eq=False)
class Confusion:
    """How often each class, by row, was taken for each."""

    counts: np.ndarray  # [classes, classes]
    classes: Sequence[str]


@attrs.frozen(eq=False)
class RunResults:
    """What one run found."""

    name: str
    folder: Path
    task: str
    is_complete: bool
    records: Mapping[Key, Record]  # of what the run is about
    beside: Sequence[Record]  # of what stands beside it: baselines, the same before training
    series: Mapping[str, Series]
    confusions: Mapping[str, Confusion]  # by evaluation


def names_of(folders: Sequence[str]) -> list[str]:
    """What runs are called: the last part of their paths, or more of it where that is not one's."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return [printable(name, kept="") for name in names]
    return [printable(folder, kept="") for folder in folders]


def read_run(folder: Path, name: str) -> RunResults:
    """Raises ``DataError`` for a folder that holds nothing to compare."""
    if folder.name == RESULTS and not folder.is_dir():
        folder = folder.parent
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; name the folders of runs")
    results, series = _results(folder), read_series(folder / METRICS)
    if results is None and not series:
        raise DataError(_without_results(folder))
    results = results or {}
    task = str(results.get("task", "training"))
    if task == "pipeline":
        stages = results.get("stages")
        known = first_few(stages if isinstance(stages, Mapping) else [])
        raise DataError(f"{folder} is of a pipeline; name the folders of its stages: {known}")
    records = list(_records(results))
    if not records and not series:
        raise DataError(
            f"{folder} is of the task {task}, which measures nothing; name runs of evaluations, or "
            "of trainings"
        )
    # An evaluation's baselines come first, what it is about comes last.
    last = {record.evaluation: record.model for record in records}
    return RunResults(
        name,
        folder,
        task,
        bool(results),
        {(r.evaluation, r.metric): r for r in records if last[r.evaluation] == r.model},
        [record for record in records if last[record.evaluation] != record.model],
        series,
        {each: found for each in last if (found := _confusion(folder, each)) is not None},
    )


def _without_results(folder: Path) -> str:
    if (folder / RECIPE).is_file():
        return (
            f"{folder} has no {RESULTS}: the run has not come to its end; go on with\n"
            f"    dinov3-run {folder / RECIPE} --output-dir {folder}"
        )
    return (
        f"{folder} has neither {RESULTS} nor {METRICS}, and is no run's folder; to measure a model:"
        "\n    dinov3-run knn weights=PATH"
    )


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULTS
    if not path.exists():
        return None
    try:
        results = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {error}\n    run its recipe again: move the file away, then "
            f"dinov3-run {folder / RECIPE} --output-dir {folder}"
        ) from error
    if not isinstance(results, dict):
        raise DataError(f"{path} holds no results: a JSON object is expected")
    return results


# --------------------------------------------------------------------------- records
def _records(value: Any) -> Iterator[Record]:
    """All records in results, at any depth, in their order."""
    if isinstance(value, Mapping):
        if value.keys() >= _FIELDS and (record := _record(value)) is not None:
            yield record
            return
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _records(each)


def _record(fields: Mapping[str, Any]) -> Record | None:
    value, interval, protocol = fields["value"], fields.get("interval"), fields["protocol"]
    if not (value is None or is_number(value)) or not isinstance(protocol, Mapping):
        return None
    ends = isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))
    return Record(
        **{name: printable(str(fields[name]), kept="") for name in _TEXTS},
        value=math.nan if value is None else float(value),
        protocol={printable(str(key), kept=""): each for key, each in protocol.items()},
        seed=fields["seed"],
        interval=(float(interval[0]), float(interval[1])) if ends and interval else None,
    )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --------------------------------------------------------------------------- other files
def read_series(path: Path) -> dict[str, Series]:
    """Every metric of a ``metrics.jsonl``; {} where there is none. Broken lines are left out."""
    if not path.is_file():
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    for text in read_file(path).decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # the last one of a run that was killed, perhaps
        if not isinstance(line, dict) or not is_number(iteration := line.pop("iteration", None)):
            continue
        for name, value in line.items():
            if value is None or is_number(value):
                number = math.nan if value is None else float(value)
                points.setdefault(printable(name, kept=""), []).append((iteration, number))
    return {name: Series(*map(np.array, zip(*at, strict=True))) for name, at in points.items()}


def _confusion(folder: Path, evaluation: str) -> Confusion | None:
    """The matrix that an evaluation has left; None without one, or where it is none."""
    stem = re.sub(r"[^\w.@+-]+", "_", evaluation)
    path = folder / f"{stem}_confusion.npy"
    if not path.is_file():
        return None
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete it to compare without") from error
    square = counts.ndim == 2 and counts.shape[0] == counts.shape[1] > 0
    if not square or counts.dtype.kind not in "uif" or not np.isfinite(counts).all():
        raise DataError(f"{path} is {counts.dtype} {list(counts.shape)}, no confusion matrix")
    return Confusion(counts.astype(np.float64), class_names(folder, stem, len(counts)))


def class_names(folder: Path, stem: str, count: int) -> list[str]:
    """From a table of the same evaluation that has each class, if there is one.

    Classes are called by a column ``name`` where ``class`` has their numbers.
    """
    for path in sorted(folder.glob(f"{stem}_*.csv")):
        try:
            with path.open(encoding="utf-8", newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if row.get("class")]
        except (OSError, ValueError, csv.Error):
            continue
        # A class may have a row for each metric.
        named = {str(row["class"]): str(row.get("name") or row["class"]) for row in rows}
        names = [printable(each, kept="") for each in named.values()]
        if len(names) == count and max(Counter(names).values()) == 1:
            return names
    return [str(label) for label in range(count)]
