"""Promises of a task before it runs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.testing.suite import Suite


class TaskSuite(Suite):
    """Promises of what a task says of a recipe that is right; it is not run."""

    kind = "task"
    contract = Task
    world_size: int = 1

    def arguments(self) -> dict[str, Any]:
        return {"registry": self.known}

    @cached_property
    def task(self) -> Task:
        task: Task = self.build()
        return task

    def test_check_writes_nothing(self) -> None:
        """``check`` leaves the working directory and ``output_dir`` as they are."""
        folders = [Path.cwd(), Path(self.config.output_dir or ".")]
        before = [_entries(folder) for folder in folders]
        self.task.check(self.world_size)
        same = before == [_entries(folder) for folder in folders]
        assert same, f"check() wrote into {' or '.join(map(str, folders))}"

    def test_check(self) -> None:
        """``check`` gives a plan of (label, value) rows, and the same when asked again."""
        plan = self.task.check(self.world_size)
        assert isinstance(plan, Plan), f"check() must give a Plan, gave {plan!r}"
        for section, rows in plan.sections.items():
            assert all(len(row) == 2 and _are_texts(row) for row in rows), (
                f"the section {section!r} of the plan must hold (label, value) rows of text"
            )
        assert _are_texts(plan.missing), "missing must be lines of text"
        same = plan == self.task.check(self.world_size)
        assert same, "check() reports something else when asked again"

    def test_expected_artifacts(self, tmp_path: Path) -> None:
        """``write_expected_artifacts`` says whether it wrote anything."""
        said, wrote = self.task.write_expected_artifacts(tmp_path), _entries(tmp_path)
        assert said is bool(wrote), f"write_expected_artifacts() gave {said} and wrote {wrote}"


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
