"""metrics.jsonl, and the numbers that processes reduce."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from disks import small_disk

from dinov3_framework import OutputError
from dinov3_framework.training.metrics import MetricsFile, read_metrics, reduce_step_metrics

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


@pytest.mark.parametrize("rest", [b'{"iteration": 4, "lo', b"\xff\xfe\x00", b"\0\0\0\0\n"])
def test_a_broken_last_line_is_left_out(tmp_path: Path, rest: bytes) -> None:
    path = written(tmp_path / "metrics.jsonl", 3)
    path.write_bytes(path.read_bytes() + rest)
    assert iterations(path) == [0, 1, 2, 3]
    file = MetricsFile(path, 3)
    file.write(4, {"loss": 0.0})
    file.close()
    assert iterations(path) == [0, 1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 5


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


def _member(rank: int, world: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    sound = reduce_step_metrics({"a": torch.tensor(1.0 + rank), "r": rank}, {}, False, CPU)
    bad = torch.tensor([1.0, math.nan, math.inf][rank])
    guarded = {"loss 'x'": bad, "loss 'y'": torch.tensor(0.0)}
    poisoned = reduce_step_metrics({"a": bad}, guarded, rank == 2, CPU)
    dist.destroy_process_group()
    results.put((rank, sound, poisoned.nonfinite, poisoned.stop))


@pytest.mark.slow
def test_three_processes_know_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    store = str(tmp_path / "store")
    members = [context.Process(target=_member, args=(rank, 3, store, results)) for rank in range(3)]
    for member in members:
        member.start()
    answers = [results.get(timeout=120) for _ in members]
    for member in members:
        member.join(60)
        assert member.exitcode == 0
    for _, sound, nonfinite, stop in answers:
        assert sound.metrics == {"a": 2.0, "r": 1.0}
        assert sound.nonfinite == {}
        assert not sound.stop
        assert nonfinite == {"loss 'x'": [1, 2]}
        assert stop
