"""The task ``compare``: runs side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov3_framework import DataError, Plan, Problem, RecipeError, Registry, Task, write_results
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.output import output_file
from dinov3_framework.runtime.results import print_results, tabulated, write_csv
from dinov3_reports.compare_page import cell, write_page
from dinov3_reports.comparison import Comparison, Row
from dinov3_reports.configs import CompareConfig
from dinov3_reports.runs import RunResults, names_of, read_run

log = logging.getLogger("dinov3_framework.reports")

PAGE, TABLE = "report.html", "comparison.csv"


class Compare(Task):
    """Reads what runs have left, and writes report.html, comparison.csv and results.json."""

    def __init__(self, config: CompareConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        names = self._names()
        try:
            comparison = self._read(names)
        except DataError as error:
            return Plan({"runs": list(zip(names, self.config.runs, strict=True))}, [str(error)])
        rows = [(run.name, f"{run.task}, {_extent(run)}, {run.folder}") for run in comparison.runs]
        compared = [row for row in comparison.rows if len(row.records) > 1]
        alike = sum(row.is_comparable for row in compared)
        metrics = [
            ("metrics", f"{len(comparison.rows):,}, {len(compared):,} of more than one run"),
            ("comparable", f"{alike:,}: by the same protocol, on the same data"),
            ("curves", ", ".join(comparison.curves(self.config.curves)) or "none"),
        ]
        return Plan({"runs": rows, "comparison": metrics}, prepared=comparison)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        if not collectives.is_main():
            return
        comparison = plan.prepared if plan is not None else None
        if comparison is None:
            comparison = self._read(self._names())
        write_page(output_dir / PAGE, comparison, comparison.curves(self.config.curves))
        flat, columns = tabulated(comparison.flat())
        with output_file(output_dir / TABLE) as aside:
            write_csv(aside, columns, ([row.get(name, "") for name in columns] for row in flat))
        write_results(output_dir, _results(comparison))
        if comparison.rows:
            print_results("runs side by side", [_printed(row) for row in comparison.rows])
        if odd := [row for row in comparison.rows if not row.is_comparable]:
            log.warning(
                "%d of %d metrics are NOT COMPARABLE: protocols or data differ; see the report",
                len(odd),
                len(comparison.rows),
            )
        log.info("report: %s", output_dir / PAGE)

    def _names(self) -> Sequence[str]:
        given, runs = self.config.names, self.config.runs
        if given is not None and len(given) != len(runs):
            message = f"are {len(given)}, and there are {len(runs)} runs"
            raise RecipeError([Problem("names", message, "give each run a name, in their order")])
        return names_of(runs) if given is None else given

    def _read(self, names: Sequence[str]) -> Comparison:
        """Raises ``DataError`` with what is wrong with each of the folders."""
        runs, wrong = [], []
        for folder, name in zip(self.config.runs, names, strict=True):
            try:
                runs.append(read_run(Path(folder).expanduser(), name))
            except DataError as error:
                wrong.append(str(error))
        if wrong:
            raise DataError("\n".join(wrong))
        return Comparison.of(runs)


def _extent(run: RunResults) -> str:
    parts = []
    if run.records:
        parts.append(f"{len(run.records):,} metrics")
    if run.series:
        last = max(int(each.iterations[-1]) for each in run.series.values())
        parts.append(f"curves up to iteration {last:,}")
    return ", ".join(parts if run.is_complete else [*parts, "NOT COMPLETE"])


def _printed(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"evaluation": row.evaluation, "metric": row.metric}
    found |= {name: cell(row, name) for name in row.records}
    return found | {"comparable": row.comparable}


def _results(comparison: Comparison) -> dict[str, Any]:
    return {
        "task": "compare",
        "runs": [
            {"name": run.name, "folder": str(run.folder), "task": run.task}
            for run in comparison.runs
        ],
        "metrics": [
            {
                "evaluation": row.evaluation,
                "metric": row.metric,
                "better": "more" if row.more_is_better else "less",
                "comparable": row.is_comparable,
                "differences": list(row.differences),
                "values": {name: record.value for name, record in row.records.items()},
                "intervals": {
                    name: record.interval
                    for name, record in row.records.items()
                    if record.interval is not None
                },
                "marks": {name: row.mark(name) for name in row.records},
            }
            for row in comparison.rows
        ],
        "files": [PAGE, TABLE],
    }
