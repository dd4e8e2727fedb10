"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dinov3_framework.runtime.report import Block, Image, Section, write_report
from dinov3_reports.charts import DENSITY
from dinov3_reports.compare_charts import bars, confusions, curves
from dinov3_reports.comparison import Comparison, Row
from dinov3_reports.runs import Confusion

_MOST = 30  # panels of a chart
_CONFUSED = 5  # pairs of classes in a table


def write_page(path: Path, comparison: Comparison, drawn: Sequence[str]) -> None:
    """Write everything on one page; raises ``OutputError``."""
    sections = [Section(blocks=[_runs(comparison)]), *_warning(comparison)]
    if comparison.rows:
        sections += [_table(comparison), *_beside(comparison), _bars(comparison)]
    if drawn:
        sections.append(_curves(comparison, drawn))
    sections += _confusions(comparison)
    write_report(path, "Runs side by side", sections, style=_STYLE)


def cell(row: Row, name: str) -> str:
    """A value with its interval, and a word if it is the best or near it."""
    record = row.records.get(name)
    if record is None:
        return ""
    if not math.isfinite(record.value):
        return "not finite"
    text = f"{record.value:.4g}"
    if record.interval is not None:
        text += f" ({record.interval[0]:.4g} to {record.interval[1]:.4g})"
    mark = {"best": "★ best", "near": "≈ best", "odd": "✗ odd"}.get(row.mark(name), "")
    return f"{text} {mark}".rstrip()


# --------------------------------------------------------------------------- sections
def _runs(comparison: Comparison) -> list[dict[str, Any]]:
    found = []
    for run in comparison.runs:
        models = dict.fromkeys(record.model for record in run.records.values())
        weights = dict.fromkeys(record.weights for record in run.records.values())
        found.append(
            {
                "run": run.name,
                "task": run.task + ("" if run.is_complete else ", NOT COMPLETE"),
                "measured": ", ".join(models),
                "weights": ", ".join(filter(None, weights)),
                "folder": str(run.folder),
            }
        )
    return found


def _warning(comparison: Comparison) -> list[Section]:
    """What must not be compared, before any number."""
    odd = [row for row in comparison.rows if not row.is_comparable]
    if not odd:
        return []
    said = Markup(
        '<span class="loud">{} of {} metrics were measured differently: {}</span>'
    ).format(len(odd), len(comparison.rows), "what is marked ✗ says nothing of which is better.")
    lines: dict[str, list[str]] = {}
    for row in odd:
        for line in row.differences:
            lines.setdefault(f"{row.evaluation}: {line}", []).append(row.metric)
    table = [{"differs": line, "metrics": ", ".join(metrics)} for line, metrics in lines.items()]
    return [Section("NOT COMPARABLE", [said, table])]


def _table(comparison: Comparison) -> Section:
    rows = []
    for row in comparison.rows:
        found: dict[str, Any] = {
            "evaluation": row.evaluation,
            "metric": f"{row.metric} {'↑' if row.more_is_better else '↓'}",
        }
        for run in comparison.runs:
            text = cell(row, run.name) or "–"
            kind = row.mark(run.name) if run.name in row.records else ""
            found[run.name] = Markup('<span class="{}">{}</span>').format(kind, text)
        kind = "loud" if row.comparable == "NO" else ""
        found["comparable"] = Markup('<span class="{}">{}</span>').format(kind, row.comparable)
        rows.append(found)
    note = (
        "↑ more is better, ↓ less is better, as the names of metrics say. In brackets: 95 % "
        "confidence intervals. ≈ best: its interval overlaps that of the best. ✗ odd: measured "
        "otherwise than most, or each otherwise; not to be compared."
    )
    return Section("Metrics", [rows, note])


def _beside(comparison: Comparison) -> list[Section]:
    """What runs measured besides: baselines, or the same before training."""
    models: dict[tuple[str, str], dict[str, str]] = {}
    for run in comparison.runs:
        for record in run.beside:
            values = models.setdefault((run.name, record.model), {})
            values[f"{record.evaluation}: {record.metric}"] = f"{record.value:.4g}"
    rows: dict[tuple[Any, ...], list[str]] = {}  # the runs that found the same
    for (name, model), values in models.items():
        rows.setdefault((model, *values.items()), []).append(name)
    table = [
        {"model": model, "of": ", ".join(names), **dict(values)}
        for (model, *values), names in rows.items()
    ]
    return [Section("Beside them", [table])] if table else []


def _bars(comparison: Comparison) -> Section:
    shown = comparison.rows[:_MOST]
    names = [run.name for run in comparison.runs]
    alt = "a bar for each run and metric; the same as the table above"
    blocks: list[Block] = [[_chart(bars(shown, names), alt)]]
    if len(shown) < len(comparison.rows):
        blocks.append(f"The first {len(shown)} of {len(comparison.rows)} metrics.")
    return Section("Bars", blocks)


def _curves(comparison: Comparison, drawn: Sequence[str]) -> Section:
    shown = drawn[:_MOST]
    alt = f"a line for each run over iterations: {', '.join(shown)}"
    blocks: list[Block] = [
        "A loss says little of runs with different losses, crops or batches.",
        [_chart(curves(comparison.runs, shown), alt)],
    ]
    if len(shown) < len(drawn):
        blocks.append(f"The first {len(shown)} of {len(drawn)} metrics; curves says which others.")
    return Section("Over iterations", blocks)


def _confusions(comparison: Comparison) -> list[Section]:
    evaluations = dict.fromkeys(name for run in comparison.runs for name in run.confusions)
    sections = []
    for evaluation in evaluations:
        found = {
            run.name: run.confusions[evaluation]
            for run in comparison.runs
            if evaluation in run.confusions
        }
        alt = "shares of each true class, by the class that it was taken for"
        blocks: list[Block] = [
            "Percent of each true class (row) by the class that it was taken for (column).",
            [_chart(confusions(found), alt)],
        ]
        if pairs := [row for name, each in found.items() for row in _confused(name, each)]:
            blocks += ["Most often taken for another:", pairs]
        sections.append(Section(f"Confusion of {evaluation}", blocks))
    return sections


def _confused(name: str, confusion: Confusion) -> list[dict[str, Any]]:
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    totals = np.maximum(confusion.counts.sum(1), 1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSED]
    found = []
    for place in order.tolist():
        row, column = divmod(place, len(wrong))
        if wrong[row, column] > 0:
            found.append(
                {
                    "run": name,
                    "true class": confusion.classes[row],
                    "taken for": confusion.classes[column],
                    "times": f"{wrong[row, column]:g}",
                    "share": f"{wrong[row, column] / totals[row]:.1%}",
                }
            )
    return found


def _chart(pixels: np.ndarray, alt: str) -> Image:
    return Image(pixels, alt=alt, width=pixels.shape[1] // DENSITY)


_STYLE = """\
.best { font-weight: bold; background: #dafbe1; padding: 1px 4px; }
.near { background: #f6f8fa; padding: 1px 4px; }
.odd { color: #b3261e; background: #ffebe9; padding: 1px 4px; }
.loud { color: #fff; background: #b3261e; font-weight: bold; padding: 2px 8px; }
"""
