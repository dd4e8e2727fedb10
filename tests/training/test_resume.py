"""A run that was stopped anyhow goes on and ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from run_support import Started, export_bytes, losses, processes_with, run, run_here, start

from dinov3_framework.errors import ExitCode

TWO = ("launcher.use=local", "launcher.processes=2")


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert export_bytes(one) == export_bytes(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run_here(output)
    assert done.returncode == 0, done.stderr
    return output


def test_a_complete_run_has_it_all(whole: Path) -> None:
    assert [iteration for iteration, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    results = json.loads((whole / "results.json").read_text())
    assert results["iterations"] == 6
    assert results["images_seen"] == 72
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {"step_00000004", "step_00000006"}
    assert "saved" in (whole / "run.log").read_text()


def test_a_complete_run_says_so(whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    again = run_here(whole)
    assert again.returncode == 0
    assert "This run is complete" in again.stderr
    assert "--output-dir" in again.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_written_recipe_runs_again_as_it_stands(whole: Path, tmp_path: Path) -> None:
    done = run_here(tmp_path / "again", recipe=whole / "recipe.toml")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tmp_path / "again")


def test_loader_workers_change_nothing(whole: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "workers", "loader.workers=3")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tmp_path / "workers")


def test_killed_and_resumed_is_bit_equal(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=5")
    first = run(output, *killer)
    assert first.returncode == -signal.SIGKILL
    assert not (output / "results.json").exists()
    second = run_here(output)
    assert second.returncode == 0, second.stderr
    assert "Going on after iteration 4" in (output / "run.log").read_text()
    assert_same_run(whole, output)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGHUP", "SIGINT"])
def test_asked_to_stop_saves_and_goes_on(whole: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "stopped"
    stopper = ("use=signal_at", "iteration=3", f"signal={name}")
    first = run(output, *(f"observers.stopper.{part}" for part in stopper))
    expected = ExitCode.INTERRUPTED if name == "SIGINT" else ExitCode.REQUEUE
    assert first.returncode == expected, first.stderr
    # The flag is polled with the next step's figures, which is then finished and saved.
    assert "after iteration 4" in first.stderr
    how = "saving; Ctrl-C again to quit now" if name == "SIGINT" else f"{name}: stopping after"
    assert how in first.stderr
    second = run_here(output)
    assert second.returncode == 0, second.stderr
    assert_same_run(whole, output)


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "killed"
    done = run(whole, *TWO)
    assert done.returncode == 0, done.stderr
    killer = ("use=signal_at", "iteration=5", "rank=1")
    first = run(output, *TWO, *(f"observers.killer.{part}" for part in killer))
    assert first.returncode == ExitCode.FAILED
    assert "rank 1" in first.stderr
    assert "SIGKILL" in first.stderr
    second = run(output, *TWO)
    assert second.returncode == 0, second.stderr
    assert_same_run(whole, output)


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    stopper = ("use=signal_at", "iteration=3", "rank=1", "signal=SIGTERM")
    first = run(output, *TWO, *(f"observers.stopper.{part}" for part in stopper))
    assert first.returncode == ExitCode.REQUEUE, first.stderr
    assert (output / "checkpoints" / "step_00000004").is_dir()


def test_a_signal_to_the_whole_group_leaves_the_workers_time(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "group"
    slow = ("loader.workers=2", "observers.slow.use=pause")
    started = start(output, *slow, start_new_session=True)
    wait_for_lines(started, output / "metrics.jsonl", 2)
    os.killpg(started.process.pid, signal.SIGTERM)
    done = started.finish()
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    assert run(output).returncode == 0
    assert_same_run(whole, output)


def wait_for_lines(started: Started, path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline
        assert started.process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_the_launcher_hands_a_signal_on_and_leaves_no_orphans(tmp_path: Path) -> None:
    output = tmp_path / "signalled"
    started = start(output, *TWO, "iterations=100000", "checkpoint.every=100000")
    wait_for_lines(started, output / "metrics.jsonl", 3)
    started.process.send_signal(signal.SIGTERM)
    done = started.finish()
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    assert any((output / "checkpoints").glob("step_*"))
    assert not processes_with(str(output))


@pytest.mark.slow
def test_resume_on_fewer_processes_is_equal_to_rounding(tmp_path: Path) -> None:
    # Drop path picks samples of one process; KoLeo divides by the distance of near duplicates, so
    # that rounding comes back a thousandfold.
    same = ("backbone.drop_path_rate=0.0", 'drop=["losses.koleo"]')
    rope = ("backbone.pos_embed_rope_rescale_coords=1.0",)
    whole, output = tmp_path / "whole", tmp_path / "moved"
    assert run(whole, *same, *rope).returncode == 0
    stopper = ("observers.s.use=signal_at", "observers.s.iteration=3", "observers.s.signal=SIGTERM")
    first = run(output, *same, *rope, *TWO, *stopper)
    assert first.returncode == ExitCode.REQUEUE, first.stderr
    second = run(output, *same, *rope)
    assert second.returncode == 0, second.stderr
    for (one, figures), (other, resumed) in zip(losses(whole), losses(output), strict=True):
        assert one == other
        expected, actual = json.loads(figures), json.loads(resumed)
        for name, value in expected.items():
            assert float.fromhex(actual[name]) == pytest.approx(
                float.fromhex(value), rel=1e-3, abs=1e-6
            ), f"{name} at iteration {one}"
