"""The task ``index``: what a dataset needs beside its files, so that it opens at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dinov3_datasets.configs import IndexConfig
from dinov3_datasets.index_arrays import Progress
from dinov3_framework import DataError, Plan, Problem, RecipeError, Registry, Task, write_results
from dinov3_framework.errors import OutputError, first_few
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.console import console

log = logging.getLogger("dinov3_framework.datasets")

_SECONDS_BETWEEN_LINES = 10.0


@runtime_checkable
class Indexable(Protocol):
    """A dataset class whose datasets can be indexed before they can be opened.

    Both are static methods: there is no dataset yet.
    """

    @staticmethod
    def index_files(config: Any) -> Sequence[Path]:
        """The files of which the index consists; raises ``DataError`` without the data."""
        ...

    @staticmethod
    def write_index(config: Any, progress: Progress | None = None) -> list[Path]:
        """Write them, each whole, in place of those that are there; which they are.

        ``progress`` is called with how much is done and how much there is in all.
        """
        ...


class IndexTask(Task):
    """Writes the index of one dataset, in one process."""

    def __init__(self, config: IndexConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        name, indexable = self._indexable()
        rows, missing = [("dataset", name)], []
        try:
            files = indexable.index_files(self.config.dataset)
            self._refuse(files)
        except DataError as error:
            missing.append(str(error))
        else:
            rows += [("written anew" if path.exists() else "written", str(path)) for path in files]
        return Plan({"index": rows}, missing)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        if not collectives.is_main():
            return
        name, indexable = self._indexable()
        self._refuse(indexable.index_files(self.config.dataset))
        with ProgressBar("index") as progress:
            paths = indexable.write_index(self.config.dataset, progress)
        for path in paths:
            log.info("Written: %s (%s bytes)", path, f"{path.stat().st_size:,}")
        write_results(
            output_dir, {"task": "index", "dataset": name, "written": [str(path) for path in paths]}
        )

    def _indexable(self) -> tuple[str, Indexable]:
        """The dataset's name, and its class or whatever else makes it."""
        component = self.registry.of_config(self.config.dataset).component
        factory = component.resolve()
        if not isinstance(factory, Indexable):
            message = f"the dataset {component.name} has no index, and opens without one"
            raise RecipeError([Problem("dataset.use", message)])
        return component.name, factory

    def _refuse(self, files: Sequence[Path]) -> None:
        """Raise ``OutputError`` for files that are there already, unless they may be replaced."""
        there = [path for path in files if path.exists()]
        if there and not self.config.replace:
            raise OutputError(
                f"{first_few(there)} {'is' if len(there) == 1 else 'are'} there already\n"
                "    to write the index anew, add replace=true (and --overwrite, if the run's "
                "folder is the same)"
            )


class ProgressBar:
    """A bar on a terminal, elsewhere a line every ten seconds; called with (done, total)."""

    def __init__(self, name: str) -> None:
        self._printed = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console(),
            disable=not console().is_terminal,
        )
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not console().is_terminal and now - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = now
            log.info("%s of %s done", f"{done:,}", f"{total:,}")
