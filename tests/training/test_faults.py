"""What goes wrong on one process or in one worker ends the run on all, soon and with its cause."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_support import metrics, processes_with, run, saved, two_processes

from dinov3_framework import ExitCode
from dinov3_framework.checkpoints.finite import nonfinite_tensors
from dinov3_framework.runtime.lock import locked


def flaky(**options: object) -> tuple[str, ...]:
    """A dataset with troubles; the keys of the one that it replaces go with it."""
    return ("dataset.use=flaky", *(f"dataset.{key}={value}" for key, value in options.items()))


def loss(use: str, **options: object) -> tuple[str, ...]:
    return (f"losses.t.use={use}", *(f"losses.t.{key}={value}" for key, value in options.items()))


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What it complained of; there is no traceback in it.

    But for what Python's own thread says that hands tensors over, if a worker dies just then.
    """
    text = re.sub(
        r"\[rank0\]: Traceback.*?resource_sharer.*?\n(?!\[rank0\])", "", done.stderr, flags=re.S
    )
    assert "Traceback" not in text, done.stderr
    return text.splitlines()


# --------------------------------------------------------------------------- loader workers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("kill_at", "a loader worker died (killed, or out of memory); last read by worker "),
        ("hang_at", "no batch came within loader.timeout = 2 s; last read by worker "),
    ],
)
def test_a_worker_that_dies_or_hangs(tmp_path: Path, trouble: str, words: str) -> None:
    loader = ("loader.workers=2", "loader.timeout=2.0")
    started = time.monotonic()
    done = run(tmp_path / "run", *flaky(**{trouble: 30}), *loader, "iterations=20")
    assert done.returncode == ExitCode.WRONG_INPUT, done.stderr
    assert time.monotonic() - started < 60
    (line,) = [line for line in lines_of(done) if line.startswith(words)]
    assert "sample 30" in line
    assert not processes_with(str(tmp_path))


@pytest.mark.slow
def test_a_killed_run_starts_again_at_once(tmp_path: Path) -> None:
    # Its loader workers notice only after some seconds that nobody wants their batches.
    output = tmp_path / "run"
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=3")
    first = run(output, "loader.workers=2", *killer)
    assert first.returncode == -signal.SIGKILL
    second = run(output, "loader.workers=2")
    assert second.returncode == 0, second.stderr


# --------------------------------------------------------------------------- one rank of two
@pytest.mark.slow
def test_bad_data_on_one_rank_end_all(tmp_path: Path) -> None:
    output = tmp_path / "run"
    trouble = flaky(corrupt_every=2, rank=1)
    done = two_processes(output, *trouble, "loader.max_corrupt=3")
    assert done.returncode == ExitCode.WRONG_INPUT, done.stderr
    text = "\n".join(lines_of(done))
    assert "[rank 1] 4 samples could not be decoded, the last: image" in text
    assert "loader.max_corrupt = 3 are allowed" in text
    assert not processes_with(str(output))


@pytest.mark.slow
def test_out_of_memory_on_one_rank(tmp_path: Path) -> None:
    done = two_processes(tmp_path / "run", *loss("trouble", what="out_of_memory", rank=1))
    assert done.returncode == ExitCode.WRONG_INPUT, done.stderr
    text = "\n".join(lines_of(done))
    assert "[rank 1] out of memory with 6 images per process and micro-batch" in text


@pytest.mark.slow
def test_an_observer_that_fails_on_one_rank(tmp_path: Path) -> None:
    done = two_processes(
        tmp_path / "run", "observers.x.use=raise_at", "observers.x.iteration=2", "iterations=50"
    )
    assert done.returncode == ExitCode.WRONG_INPUT, done.stderr
    assert "the observer cannot go on" in lines_of(done)
    assert len(metrics(tmp_path / "run")) < 4


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(tmp_path: Path) -> None:
    output = tmp_path / "run"
    started = time.monotonic()
    trouble = loss("trouble", what="sleep", rank=1, iteration=3)
    limits = ("parallel.timeout=5.0", "launcher.shutdown_timeout=5")
    done = two_processes(output, *trouble, *limits)
    assert done.returncode == ExitCode.FAILED, done.stderr
    assert time.monotonic() - started < 90
    text = "\n".join(lines_of(done))
    assert "did not come to a collective within parallel.timeout = 5 s" in text
    assert "(rank 1, last seen at iteration 3, forward and backward)" in text
    assert "loader" not in text
    assert not processes_with(str(output))


# --------------------------------------------------------------------------- the guard
@pytest.mark.slow
def test_nan_on_one_rank_leaves_all_as_they_were(tmp_path: Path) -> None:
    output = tmp_path / "run"
    every = ("checkpoint.every=1", "checkpoint.keep=9", "iterations=4")
    done = two_processes(output, *loss("poison", iterations="[3]", rank=1), *every)
    assert done.returncode == 0, done.stderr
    log = (output / "run.log").read_text()
    assert "iteration 3: not finite: " in log
    assert "loss 't' on rank 1" in log
    before, after, later = (saved(output, step, tmp_path) for step in (2, 3, 4))
    assert before.keys() == after.keys()
    assert {name.split(".")[0] for name in before} == {"student", "teacher", "optimizer"}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert tensor.isfinite().all(), name
    assert any(not torch.equal(tensor, later[name]) for name, tensor in after.items())
    third = metrics(output)[2]
    assert third["iteration"] == 3
    assert third["loss"] is None
    assert third["dino"] is not None


@pytest.mark.slow
def test_a_run_that_diverges_says_so_once(tmp_path: Path) -> None:
    output = tmp_path / "run"
    poison = loss("poison", iterations="[3, 4, 5, 6]", rank=0)
    done = two_processes(output, *poison, "max_nonfinite_steps=1")
    assert done.returncode == ExitCode.DIVERGED, done.stderr
    text = "\n".join(lines_of(done))
    assert text.count("2 steps in a row (max_nonfinite_steps = 1)") == 1
    assert "loss 't' on rank 0" in text
    for name, tensor in saved(output, 2, tmp_path).items():
        assert tensor.isfinite().all(), name
    assert not (output / "checkpoints" / "step_00000004").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_update_that_overflows_is_never_saved(tmp_path: Path, processes: int) -> None:
    output = tmp_path / "run"
    # All gradients are finite; what the second step makes of them is not.
    rate = ("optimizer.lr.start=0.0", "optimizer.lr.peak=1e39", "optimizer.lr.warmup=1")
    start = run if processes == 1 else two_processes
    done = start(output, *rate, "checkpoint.every=1", "checkpoint.keep=9")
    assert done.returncode == ExitCode.DIVERGED, done.stderr
    text = "\n".join(lines_of(done))
    assert text.count("iteration 2: not finite after the update, so not saved: student.") == 1
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000001"]
    for name, tensor in saved(output, 1, tmp_path).items():
        assert tensor.isfinite().all(), name


def test_what_is_not_finite_is_named() -> None:
    sound = {"a": torch.ones(3), "n": torch.ones(2, dtype=torch.int64), "empty": torch.ones(0)}
    assert nonfinite_tensors(sound) == []
    for value in (math.nan, math.inf, -math.inf):
        bad = torch.ones(4, 5)
        bad[2, 3] = value
        assert nonfinite_tensors({**sound, "loss.center": bad, "b": bad.bfloat16()}) == [
            "b",
            "loss.center",
        ]


# --------------------------------------------------------------------------- the folder
@pytest.mark.slow
def test_a_run_into_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with locked(output):
        done = run(output)
    assert done.returncode == ExitCode.WRONG_INPUT
    (line,) = lines_of(done)
    assert line.startswith(f"{output} is in use by process {os.getpid()} on host ")
    assert [path.name for path in output.iterdir()] == [".lock"]


# --------------------------------------------------------------------------- the end of a process
_LEAVE = """
import atexit, multiprocessing, sys, time
from dinov3_framework.runtime.processes import leave
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
worker.start()
print(worker.pid)
atexit.register(print, "the interpreter ended")
leave(75)
"""


def test_a_process_of_a_job_leaves_with_its_code_and_without_orphans() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LEAVE], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.REQUEUE
    (pid,) = done.stdout.split()  # what was printed arrives, and nothing after it
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        status = Path("/proc", pid, "stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
