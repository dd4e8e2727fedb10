"""The figures of ``metrics.jsonl`` as series, and which of them belong into one panel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np

Array = np.ndarray

# Panels of known figures: title, unit, and the schedules among them drawn without smoothing.
_KNOWN = {
    "lr": ("Learning rate", ""),
    "last_layer_lr": ("Learning rate", ""),
    "weight_decay": ("Weight decay", ""),
    "momentum": ("Teacher momentum", ""),
    "images_per_second": ("Throughput", "images/s"),
    "data_wait": ("Time of an iteration", "s"),
    "time/teacher": ("Time of an iteration", "s"),
    "time/student": ("Time of an iteration", "s"),
    "time/loss": ("Time of an iteration", "s"),
    "time/backward": ("Time of an iteration", "s"),
    "time/optimizer": ("Time of an iteration", "s"),
}
_EXACT = ("Learning rate", "Weight decay", "Teacher momentum", "Loss weights")
_SIMILAR = 20.0  # figures of a loss this many times larger or smaller get a panel of their own


@attrs.frozen(eq=False)
class Series:
    """One figure over the run: iterations [n] and values [n], NaN where it was not finite."""

    iterations: Array
    values: Array

    @property
    def finite(self) -> Array:
        known: Array = self.values[np.isfinite(self.values)]
        return known


@attrs.frozen
class Panel:
    """Curves that share axes; ``exact`` ones are drawn as they are, without smoothing."""

    title: str
    unit: str
    names: tuple[str, ...]
    exact: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names: of ``gradient_norm/backbone`` the last part, of ``dino/weight`` the first
        where the last would not tell the curves apart."""
        last = tuple(name.rpartition("/")[2] for name in self.names)
        first = tuple(name.partition("/")[0] for name in self.names)
        return next(
            short for short in (last, first, self.names) if len(set(short)) == len(self.names)
        )


def read_series(path: Path) -> dict[str, Series]:
    """Every figure of a ``metrics.jsonl`` by name; {} where there is no file or no line.

    null stands for a figure that was not finite. A line that is no JSON object with an iteration
    (the last one of a run that was killed) is left out, and so is what is no number.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for line in _lines(path):
        iteration = line.pop("iteration")
        for name, value in line.items():
            if value is None or _is_number(value):
                number = float("nan") if value is None else float(value)
                points.setdefault(name, []).append((iteration, number))
    return {name: _series(pairs) for name, pairs in points.items()}


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and _is_number(line.get("iteration")):
                yield line


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _series(pairs: list[tuple[int, float]]) -> Series:
    iterations, values = zip(*pairs, strict=True)
    return Series(np.array(iterations, dtype=np.int64), np.array(values, dtype=np.float64))


def panels(series: Mapping[str, Series]) -> list[Panel]:
    """The panels in the order in which one looks at a run: objective, k-NN, norms, the rest."""
    losses = [name for name in series if f"{name}/weight" in series]
    found: list[Panel] = []
    if "loss" in series:
        found.append(Panel("Total loss", "", ("loss",)))
    for loss in losses:
        found += _loss_panels(loss, series)
    nearest = [name for name in series if "knn@" in name]
    norms = [name for name in series if name.startswith("gradient_norm/")]
    weights = [f"{loss}/weight" for loss in losses if _moves(series[f"{loss}/weight"])]
    if nearest:
        found.append(Panel("k-NN accuracy", "%", tuple(nearest), exact=True))
    if norms:
        found.append(Panel("Gradient norm", "before clipping", tuple(norms)))
    if weights:
        found.append(Panel("Loss weights", "", tuple(weights), exact=True))
    found += _known_panels(series)
    taken = {name for panel in found for name in panel.names}
    taken |= {f"{loss}/weight" for loss in losses}
    return found + [Panel(name, "", (name,)) for name in series if name not in taken]


def _loss_panels(loss: str, series: Mapping[str, Series]) -> list[Panel]:
    """A loss with the metrics of its size; the others each in a panel of their own."""
    parts = [n for n in series if n.startswith(f"{loss}/") and n != f"{loss}/weight"]
    size = _size(series[loss]) if loss in series else 0.0
    together = [n for n in parts if size / _SIMILAR <= _size(series[n]) <= size * _SIMILAR]
    apart = [Panel(name, "", (name,)) for name in parts if name not in together]
    if loss not in series:
        return apart
    return [Panel(f"Loss “{loss}”", "before its weight", (loss, *together)), *apart]


def _known_panels(series: Mapping[str, Series]) -> list[Panel]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, panel in _KNOWN.items():
        if name in series:
            grouped.setdefault(panel, []).append(name)
    return [
        Panel(title, unit, tuple(names), exact=title in _EXACT)
        for (title, unit), names in grouped.items()
    ]


def _size(series: Series) -> float:
    return float(np.median(np.abs(series.finite))) if len(series.finite) else 0.0


def _moves(series: Series) -> bool:
    return len(np.unique(series.finite)) > 1
