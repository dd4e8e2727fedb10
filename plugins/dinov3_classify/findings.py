"""What an evaluation reports: metrics, their confidence, tables and confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from attrs import define, field

from dinov3_classify.metrics import (
    Classification,
    class_mean,
    class_mean_interval,
    class_rows,
    confused_rows,
    mean_interval,
)
from dinov3_framework.contracts.running import Details


@define(eq=False)
class Findings:
    """Collects classifications; accuracies are in percent."""

    names: Sequence[str] | None  # of the classes
    seed: int
    with_class_mean: bool = False
    with_top5: bool = True
    metrics: dict[str, float] = field(factory=dict)
    notes: dict[str, Any] = field(factory=dict)  # for the protocol
    intervals: dict[str, tuple[float, float]] = field(factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(factory=dict)
    arrays: dict[str, np.ndarray] = field(factory=dict)

    def add(self, test: str, metric: str, result: Classification) -> None:
        """One classification of the test set ``test`` ("" the first)."""
        name = f"{test}/{metric}" if test else metric
        self._accuracy(name, result.right())
        if self.with_top5 and result.n_classes > 5:
            self._accuracy(f"{name}/top5", result.right(top=5))
        if self.with_class_mean:
            self.metrics[f"{name}/class_mean"] = _percent(class_mean(result))
            low, high = class_mean_interval(result, self.seed, f"{name}/class_mean")
            self.intervals[f"{name}/class_mean"] = (_percent(low), _percent(high))
        self._detail(test, name, result)

    def add_tries(self, test: str, metric: str, results: Sequence[Classification]) -> None:
        """The same test images, classified from several draws of training images."""
        name = f"{test}/{metric}" if test else metric
        right = torch.stack([result.right() for result in results])
        self._accuracy(name, right.mean(dim=0))
        accuracies = right.mean(dim=1)
        deviation = accuracies.std() if len(results) > 1 else accuracies.new_zeros(())
        self.metrics[f"{name}/deviation"] = _percent(float(deviation))

    def details(self) -> Details:
        return Details(intervals=self.intervals, tables=self.tables, arrays=self.arrays)

    def _accuracy(self, name: str, right: torch.Tensor) -> None:
        self.metrics[name] = _percent(float(right.mean()))
        low, high = mean_interval(right, self.seed, name)
        self.intervals[name] = (_percent(low), _percent(high))

    def _detail(self, test: str, name: str, result: Classification) -> None:
        self.tables.setdefault("classes", []).extend(class_rows(result, self.names, metric=name))
        confusion = result.confusion()
        if confusion is not None:
            # The last one of a set is that of most neighbors, and stands for the set.
            self.arrays[f"{test}_confusion" if test else "confusion"] = confusion
            if rows := confused_rows(confusion, self.names, metric=name):
                self.tables.setdefault("confused", []).extend(rows)
        empty = [row["name"] for row in class_rows(result, self.names) if not row["images"]]
        if empty:
            where = f"classes without images in {test or 'test'}"
            more = f" and {len(empty) - 10:,} more" if len(empty) > 10 else ""
            self.notes[where] = ", ".join(empty[:10]) + more


def _percent(value: float) -> float:
    return round(100 * value, 4)
