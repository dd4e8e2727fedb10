"""What a run says and leaves of itself: console, log, environment, whose checkpoints they are."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text
from run_support import export_bytes, is_timing, metrics, run_here
from trainer_support import trainer

from dinov3_framework import ExitCode, load_backbone
from dinov3_framework.runtime import console
from dinov3_framework.runtime.console import TrainingProgress
from dinov3_framework.weights.cli import main as show_weights

KNN = (
    'observers.knn={ use="evaluate", every=3 }',
    'observers.knn.evaluations.near={ use="knn", k=[10] }',
    'observers.knn.evaluations.near.train={ use="fashion_mnist", split="test" }',
    'observers.knn.evaluations.near.test={ use="fashion_mnist", split="test" }',
)


def test_the_folder_says_with_what_each_start_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_here(run).returncode == 0
    (run / "results.json").unlink()
    assert run_here(run).returncode == 0
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    for start in starts:
        assert torch.__version__.partition("+")[0] in start["software"]
        assert start["host"] == socket.gethostname()
        assert start["command"]
        assert any("dinov3-framework" in each for each in start["plugins"].values())
    log = (run / "run.log").read_text()
    assert log.count("crops per image") == 2, "what a start found is in the log"
    export = run / "exports" / "teacher_backbone.safetensors"
    assert "torch" in load_backbone(export).provenance["software"]
    assert "dinov3-framework" in load_backbone(export).provenance["plugins"]
    beside = json.loads((export.parent / "environment.json").read_text())["starts"]
    assert beside == starts[-1:], "host and command line go with the export's folder"
    for source in (run, export):
        assert show_weights(["show", str(source)]) == 0
        shown = capsys.readouterr().out
        assert socket.gethostname() in shown
        assert "software" in shown
    moved = export.rename(tmp_path / "given_away.safetensors")
    assert show_weights(["show", str(moved)]) == 0
    assert socket.gethostname() not in capsys.readouterr().out, "it may be given to anybody"


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    assert run_here(other, "seed=1").returncode == 0
    assert run_here(ours, "iterations=6").returncode == 0
    shutil.rmtree(ours / "checkpoints")
    shutil.copytree(other / "checkpoints", ours / "checkpoints")
    (ours / "results.json").unlink()
    for check in ((), ("--check",)):
        found = run_here(ours, *check)
        assert found.returncode == ExitCode.WRONG_INPUT
        assert "is of another run" in found.stderr
        assert "seed: 1 there, 0 now" in found.stderr
        assert f"; there, continue_from.run={ours} trains on" in found.stderr
    # What does not touch what is learnt, and where data and folders lie, may differ.
    moved = (tmp_path / "moved").absolute()
    other.rename(moved)
    (moved / "results.json").unlink()
    assert run_here(moved, "seed=1", "loader.prefetch=3", "log_every=2").returncode == 0


@pytest.mark.parametrize("key", ["recipe", "streams", "init_from"])
def test_a_state_whose_parts_are_no_tables_is_refused(tmp_path: Path, key: str) -> None:
    output = tmp_path / "run"
    with trainer(output) as trained:
        trained.store.save(2, trained.tensors(), {key: ["no table"]})
    found = run_here(output)
    assert found.returncode == ExitCode.WRONG_INPUT
    (line, _) = found.stderr.splitlines()
    assert line.endswith(f"a checkpoint there is malformed: in its state, {key} should be a table")


def test_rare_metrics_are_printed_and_the_last_evaluation_is_announced(tmp_path: Path) -> None:
    found = run_here(tmp_path / "run", *KNN, "observers.rank.use=rankme", "observers.rank.every=3")
    assert found.returncode == 0, found.stderr
    log = (tmp_path / "run" / "run.log").read_text()
    assert "iteration 3: knn@10" in log
    assert "rankme" in log
    assert "Evaluating at the end: near" in log
    assert log.index("Evaluating at the end") > log.index("iteration 6: ")


@pytest.mark.parametrize("width", [40, 80])
def test_the_progress_bar_stays_on_one_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=width)
    monkeypatch.setattr(console, "console", lambda: terminal)
    with TrainingProgress(999_000, 1_000_000, shown=True) as bar:
        bar._started -= 400_000.0
        bar.update(999_123, 123.456, 12_345.6, 100_000.0)
        screen.seek(0)
        screen.truncate()
        bar._bar.refresh()
        shown = [Text.from_ansi(line).plain for line in screen.getvalue().split("\n")]
    assert len([line for line in shown if line.strip()]) == 1
    assert max(map(len, shown)) <= width
    assert "999123" in shown[0] or width < 80
    assert ("left" in shown[0]) is (width >= 80)


def test_watching_for_collapse_changes_nothing(tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert run_here(plain).returncode == 0
    rank = ("observers.rank.use=rankme", "observers.rank.every=2", "observers.rank.images=20")
    assert run_here(watched, *rank).returncode == 0
    assert export_bytes(watched) == export_bytes(plain)


def test_evaluations_on_the_way_change_no_bit_of_a_training(tmp_path: Path) -> None:
    """Not the stream, not the noise of dropout and masks, not the weights."""
    assert run_here(tmp_path / "alone").returncode == 0
    assert run_here(tmp_path / "watched", *KNN).returncode == 0
    watched = {row["iteration"]: row for row in metrics(tmp_path / "watched")}
    assert "knn@10" in watched[6]
    for row in metrics(tmp_path / "alone"):
        for name in row.keys() - {name for name in row if is_timing(name)}:
            assert watched[row["iteration"]][name] == row[name]
    assert export_bytes(tmp_path / "alone") == export_bytes(tmp_path / "watched")
