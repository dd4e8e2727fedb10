"""Records of several runs side by side: which can be compared, and which is best."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import attrs
import numpy as np

from dinov3_framework import DataError
from dinov3_framework.errors import first_few, printable
from dinov3_framework.runtime.results import Record
from dinov3_reports.runs import Key, RunResults

# Parts of names of metrics of which less is better; of all others more is.
_LESS = (
    "loss", "error", "err", "rmse", "mse", "mae", "rel", "absrel", "sqrel", "log10", "silog", "nll",
    "ece", "perplexity", "deviation", "std", "fid", "fpr", "fnr",
)  # fmt: skip
_ENGINE = ("time/*", "images_per_second", "data_wait", "*/weight")  # no measures of a model


@attrs.frozen(eq=False)
class Row:
    """One metric of one evaluation, by the names of the runs that have it."""

    evaluation: str
    metric: str
    records: Mapping[str, Record]
    differences: Sequence[str]  # why the values must not be compared, a line each

    @property
    def key(self) -> Key:
        return self.evaluation, self.metric

    @property
    def more_is_better(self) -> bool:
        words = re.split(r"[^a-z0-9]+", re.sub(r"[@/]\d+$", "", self.metric.lower()))
        return not any(word in _LESS for word in words)

    @property
    def is_comparable(self) -> bool:
        return not self.differences

    @property
    def comparable(self) -> str:
        """The same in a word."""
        if len(self.records) < 2:
            return "one run alone"
        return "yes" if self.is_comparable else "NO"

    @property
    def alike(self) -> list[str]:
        """The most runs that were measured alike, which can be compared with each other."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, record in self.records.items():
            switches = (f"{key}={_text(record.protocol[key])}" for key in sorted(record.protocol))
            groups.setdefault((record.data, *switches), []).append(name)
        return max(groups.values(), key=len)

    @property
    def best(self) -> list[str]:
        """Of the runs measured alike, if there are two, those with the best value."""
        values = {name: self.records[name].value for name in self.alike}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        if len(known) < 2:
            return []
        top = max(known.values()) if self.more_is_better else min(known.values())
        return [name for name, value in known.items() if value == top]

    @property
    def near(self) -> list[str]:
        """Others whose 95 % interval overlaps that of a best one."""
        best = [self.records[name].interval for name in self.best]
        found = []
        for name in self.alike:
            own = self.records[name].interval
            if name not in self.best and own is not None:
                overlaps = (own[0] <= each[1] and each[0] <= own[1] for each in best if each)
                if any(overlaps):
                    found.append(name)
        return found

    def mark(self, name: str) -> str:
        """What is to be said of a run: best, near (to it), odd (measured otherwise), or nothing."""
        if not self.is_comparable and (len(self.alike) < 2 or name not in self.alike):
            return "odd"
        return "best" if name in self.best else "near" if name in self.near else ""


@attrs.frozen(eq=False)
class Comparison:
    """Runs, and the rows of the metrics that at least one of them has."""

    runs: Sequence[RunResults]
    rows: Sequence[Row]

    @classmethod
    def of(cls, runs: Sequence[RunResults]) -> Comparison:
        """Raises ``DataError`` where no two runs have anything in common."""
        keys = dict.fromkeys(key for run in runs for key in run.records)
        rows = []
        for evaluation, metric in keys:
            records = {
                run.name: run.records[evaluation, metric]
                for run in runs
                if (evaluation, metric) in run.records
            }
            rows.append(Row(evaluation, metric, records, differences(records)))
        found = cls(runs, rows)
        shared = [row for row in rows if len(row.records) > 1]
        if len(runs) > 1 and not shared and not found.shared_series:
            what = "\n".join(f"    {run.name}: {_has(run)}" for run in runs)
            raise DataError(
                f"the runs have nothing in common to compare; they measured\n{what}\n"
                "    give evaluations the same names, and measure the same in each"
            )
        return found

    @property
    def shared_series(self) -> list[str]:
        """Metrics over iterations that at least two runs have."""
        names = dict.fromkeys(name for run in self.runs for name in run.series)
        return [name for name in names if sum(name in run.series for run in self.runs) > 1]

    def curves(self, wanted: Sequence[str] | None) -> list[str]:
        """The metrics to draw over iterations: those that patterns name, or the loss and what was
        evaluated on the way."""
        names = dict.fromkeys(name for run in self.runs for name in run.series)
        if wanted is not None:
            return [name for name in names if any(fnmatchcase(name, each) for each in wanted)]
        chosen = {name for run in self.runs for name in _on_the_way(run)}
        return [name for name in names if name in chosen]

    def flat(self) -> list[dict[str, Any]]:
        """A line for each value, for comparison.csv."""
        return [
            {
                "evaluation": row.evaluation,
                "metric": row.metric,
                "run": name,
                "model": record.model,
                "value": record.value,
                "low": record.interval[0] if record.interval else "",
                "high": record.interval[1] if record.interval else "",
                "better": "more" if row.more_is_better else "less",
                "mark": row.mark(name),
                "comparable": row.comparable,
                "differences": "; ".join(row.differences),
                "data": record.data,
                "weights": record.weights,
                "seed": record.seed,
                **{f"protocol.{key}": _text(value) for key, value in record.protocol.items()},
            }
            for row in self.rows
            for name, record in row.records.items()
        ]


def _has(run: RunResults) -> str:
    names = [f"{evaluation} {metric}" for evaluation, metric in run.records]
    return first_few(names or [f"(over iterations) {name}" for name in run.series], 6) or "nothing"


def _on_the_way(run: RunResults) -> list[str]:
    """Of a training's metrics the loss, and those of evaluations: not of every step, or of none."""
    measured = {name for key in run.records for name in (key[1], "/".join(key))}
    steps = len(run.series["loss"].iterations) if "loss" in run.series else 0
    return [
        name
        for name, series in run.series.items()
        if not any(fnmatchcase(name, each) for each in _ENGINE)
        if name == "loss"
        or name in measured
        or series.iterations[0] == 0
        or len(series.iterations) < steps / 2
    ]


def differences(records: Mapping[str, Record]) -> list[str]:
    """In what data and protocols of records differ, with who has what."""
    found = []
    keys = dict.fromkeys(key for record in records.values() for key in record.protocol)
    for key in keys:
        values = {
            name: _text(record.protocol[key]) if key in record.protocol else "not stated"
            for name, record in records.items()
        }
        found += _differing(key, values)
    found += _differing("data", {name: record.data for name, record in records.items()})
    return found


def _differing(what: str, values: Mapping[str, str]) -> list[str]:
    if len(set(values.values())) < 2:
        return []
    runs: dict[str, list[str]] = {}
    for name, value in values.items():
        runs.setdefault(value, []).append(name)
    said = (f"{value} ({', '.join(names)})" for value, names in runs.items())
    return [f"{what}: {' | '.join(said)}"]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text, kept="")
