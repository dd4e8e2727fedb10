"""metrics.jsonl, and the numbers that processes reduce."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from disks import small_disk
from process_groups import run_processes

from dinov3_framework import OutputError
from dinov3_framework.training.metrics import (
    FiniteCheck,
    MetricsFile,
    read_metrics,
    reduce_step_metrics,
)

CPU = torch.device("cpu")


# --------------------------------------------------------------------------- the file
def written(path: Path, upto: int) -> Path:
    file = MetricsFile(path, 0)
    for iteration in range(upto + 1):
        file.write(iteration, {"loss": iteration / 3})
    file.close()
    return path


def iterations(path: Path) -> list[int]:
    return [line["iteration"] for line in read_metrics(path)]


def test_lines_come_back(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 2)
    assert read_metrics(path) == [{"iteration": i, "loss": i / 3} for i in range(3)]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    file.close()
    line = json.loads(file.path.read_text(), parse_constant=pytest.fail)
    assert line == {"iteration": 1, "a": None, "b": None, "c": None, "d": 1.0}


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(7, {"loss": 1.0})
    assert iterations(file.path) == [7]
    file.close()


def test_resuming_takes_away_what_will_be_done_again(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 6)
    file = MetricsFile(path, 4)
    assert iterations(path) == [0, 1, 2, 3, 4]
    file.write(5, {"loss": 0.0})
    file.close()
    assert iterations(path) == [0, 1, 2, 3, 4, 5]


def test_starting_anew_measures_iteration_0_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 3)
    MetricsFile(path, 0).close()
    assert iterations(path) == []


@pytest.mark.parametrize(
    "rest", [b'{"iteration": 4, "lo', b"\xff\xfe\x00", b"\0\0\0\0\n", b"[" * 10**5]
)
def test_a_broken_last_line_is_left_out(tmp_path: Path, rest: bytes) -> None:
    path = written(tmp_path / "metrics.jsonl", 3)
    path.write_bytes(path.read_bytes() + rest)
    assert iterations(path) == [0, 1, 2, 3]
    file = MetricsFile(path, 3)
    file.write(4, {"loss": 0.0})
    file.close()
    assert iterations(path) == [0, 1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 5


def test_what_is_damaged_costs_no_other_line(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 6)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"loss", b"lo\xff\n")
    lines[5] = b"7\n"  # JSON, but no line of ours
    path.write_bytes(b"".join(lines))
    assert iterations(path) == [0, 1, 3, 4, 6]
    MetricsFile(path, 5).close()
    assert iterations(path) == [0, 1, 3, 4]


def test_resuming_does_not_read_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = (f'{{"iteration": {i}, "loss": 0.5}}\n' for i in range(1, 500_001))
    path.write_text("".join(lines))
    kept = path.read_bytes().index(b'{"iteration": 499991,')
    tracemalloc.start()
    MetricsFile(path, 499_990).close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size == kept
    assert peak < 1 << 20


def test_a_last_line_without_its_end_gets_one(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 3)
    path.write_bytes(path.read_bytes().rstrip())
    file = MetricsFile(path, 3)
    file.write(4, {"loss": 0.0})
    file.close()
    assert iterations(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk_is_named(tmp_path: Path, kind: str) -> None:
    with small_disk(tmp_path / "disk", kind):
        file = MetricsFile(tmp_path / "disk" / "metrics.jsonl", 0)
        with pytest.raises(OutputError, match=r"disk full.*make room"):
            file.write(1, {f"{number:010000}": 1.0 for number in range(400)})
        file.close()


def test_a_folder_in_its_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl" / "x").mkdir(parents=True)
    with pytest.raises(OutputError, match="directory"):
        MetricsFile(tmp_path / "metrics.jsonl", 0)


# --------------------------------------------------------------------------- agreeing
def test_alone() -> None:
    figures = {"a": torch.tensor(2.0), "b": 3, "c": math.nan}
    guarded = {"x": torch.tensor(1.0), "y": torch.tensor([1.0, math.inf])}
    agreed = reduce_step_metrics(figures, guarded, False, CPU)
    assert (agreed.metrics["a"], agreed.metrics["b"]) == (2.0, 3.0)
    assert math.isnan(agreed.metrics["c"])
    assert agreed.nonfinite == {"y": [0]}
    assert not agreed.stop
    assert reduce_step_metrics({}, {}, True, CPU).stop


def _on_three() -> tuple[FiniteCheck, FiniteCheck]:
    rank = dist.get_rank()
    sound = reduce_step_metrics({"a": torch.tensor(1.0 + rank), "r": rank}, {}, False, CPU)
    bad = torch.tensor([1.0, math.nan, math.inf][rank])
    guarded = {"loss 'x'": bad, "loss 'y'": torch.tensor(0.0)}
    return sound, reduce_step_metrics({"a": bad}, guarded, rank == 2, CPU)


@pytest.mark.slow
def test_three_processes_know_the_same(tmp_path: Path) -> None:
    for sound, poisoned in run_processes(3, tmp_path, _on_three):
        assert sound.metrics == {"a": 2.0, "r": 1.0}
        assert sound.nonfinite == {}
        assert not sound.stop
        assert poisoned.nonfinite == {"loss 'x'": [1, 2]}
        assert poisoned.stop
