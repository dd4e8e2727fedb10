"""The metrics of ``metrics.jsonl`` as series, and which of them belong into one panel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import attrs
import numpy as np

Array = np.ndarray

# Panels of known metrics: title, unit, patterns of names, whether drawn without smoothing.
_KNOWN = (
    ("k-NN accuracy", "%", "*knn@*", True),
    ("Gradient norm", "before clipping", "gradient_norm/*", False),
    ("Loss weights", "", "*/weight", True),
    ("Learning rate", "", "lr last_layer_lr", True),
    ("Weight decay", "", "weight_decay", True),
    ("Teacher momentum", "", "momentum", True),
    ("Throughput", "images/s", "images_per_second", False),
    ("Time of an iteration", "s", "data_wait time/*", False),
)
_SIMILAR = 20.0  # metrics of a loss this many times larger or smaller get a panel of their own


@attrs.frozen(eq=False)
class Series:
    """One metric over the run: iterations [n] and values [n], NaN where it was not finite."""

    iterations: Array
    values: Array

    @property
    def finite(self) -> Array:
        known: Array = self.values[np.isfinite(self.values)]
        return known

    @property
    def size(self) -> float:
        return float(np.median(np.abs(self.finite))) if len(self.finite) else 0.0


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
    """Every metric of a ``metrics.jsonl`` by name; {} where there is no file or no line.

    null stands for a number that was not finite. A line that is no JSON object with an iteration
    (the last one of a run that was killed) is left out, and so is what is no number.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for text in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and _is_number(iteration := line.pop("iteration", None)):
            for name, value in line.items():
                if value is None or _is_number(value):
                    number = float("nan") if value is None else float(value)
                    points.setdefault(name, []).append((iteration, number))
    return {name: Series(*map(np.array, zip(*at, strict=True))) for name, at in points.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def panels(series: Mapping[str, Series]) -> list[Panel]:
    """The panels in the order in which one looks at a run: losses, known metrics, the rest."""
    losses = [name for name in series if f"{name}/weight" in series]
    weights = {f"{loss}/weight" for loss in losses}
    constant = {name for name in weights if len(np.unique(series[name].finite)) <= 1}
    left = [name for name in series if name not in constant]
    found: list[Panel] = []

    def add(title: str, unit: str, names: list[str], exact: bool = False) -> None:
        if names:
            found.append(Panel(title, unit, tuple(names), exact))
            left[:] = [name for name in left if name not in names]

    if "loss" in series:
        add("Total loss", "", ["loss"])
    for loss in losses:
        # With the metrics of its size; the others each have a panel of their own.
        size = series[loss].size
        parts = [name for name in left if name.startswith(f"{loss}/") and name not in weights]
        near = [n for n in parts if size / _SIMILAR <= series[n].size <= size * _SIMILAR]
        add(f"Loss “{loss}”", "before its weight", [loss, *near])
        for name in parts:
            if name not in near:
                add(name, "", [name])
    for title, unit, patterns, exact in _KNOWN:
        every = [n for pattern in patterns.split() for n in left if fnmatchcase(n, pattern)]
        add(title, unit, every, exact)
    for name in list(left):
        add(name, "", [name])
    return found
