"""Chains of stages that run: in one go, interrupted anyhow, on two processes, moved, extended."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import small_disk
from pipeline_support import (
    CHAIN,
    KNN,
    assert_same_chain,
    exported,
    recipe_of,
    write_chain,
)
from run_support import HERE, metrics, run, run_here, two_processes
from safetensors.torch import load_file

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.cli import main
from dinov3_framework.errors import ExitCode

STAGES = ["pretrain", "adapt", "last"]


def signals(stage: str, name: str, iteration: int, rank: int = 0) -> list[str]:
    """The overrides that make a stage get a signal after an iteration."""
    keys = {"use": "signal_at", "signal": name, "iteration": iteration, "rank": rank}
    return [f"stages.{stage}.recipe.observers.s.{key}={value}" for key, value in keys.items()]


def start(recipe: Path, output: Path, *overrides: str) -> int:
    """A run of the command line in this process, with the plugin that breaks things."""
    return main([str(recipe), "--output-dir", str(output), *overrides])


@pytest.fixture(scope="module", autouse=True)
def _faults() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE / "faults_plugin"))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted chain of four stages, with an observer in the second."""
    folder = tmp_path_factory.mktemp("whole")
    watched = f'{CHAIN}{KNN}\n[stages.adapt.recipe.observers.score]\nuse = "evaluate"\nevery = 4\n'
    watched += '[stages.adapt.recipe.observers.score.evaluations.knn]\nuse = "knn"\n'
    watched += 'train = { use = "fashion_mnist", split = "test" }\n'
    watched += 'test = { use = "fashion_mnist", split = "test" }\n'
    assert start(write_chain(folder, watched), folder / "out") == 0
    return folder / "out"


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, moved to another place."""
    shutil.copytree(finished, tmp_path / "whole")
    shutil.copy(finished.parent / "chain.toml", tmp_path / "chain.toml")
    return tmp_path / "whole"


# --------------------------------------------------------------------------- what is there
@pytest.mark.slow
def test_every_stage_leaves_a_whole_run(finished: Path) -> None:
    for stage in STAGES:
        names = {path.name for path in (finished / stage).iterdir()}
        assert {"recipe.toml", "results.json", "run.log", "metrics.jsonl"} <= names
        assert {"checkpoints", "exports"} <= names
        assert recipe_of(finished / stage)["output_dir"] == str(finished / stage)
    assert recipe_of(finished / "adapt")["init_from"]["weights"] == str(finished / "pretrain")
    assert recipe_of(finished)["stages"]["adapt"]["recipe"]["init_from"]["weights"] == (
        "stage:pretrain"
    )
    results = json.loads((finished / "results.json").read_text())
    assert results["task"] == "pipeline"
    assert list(results["stages"]) == [*STAGES, "knn"]
    for stage, of_stage in results["stages"].items():
        assert of_stage == json.loads((finished / stage / "results.json").read_text())
    assert metrics(finished / "adapt")[-1]["knn@10"] is not None
    log = (finished / "run.log").read_text()
    assert "Stage adapt (2 of 4)" in log
    assert "saved" in log
    assert "saved" not in (finished / "knn" / "run.log").read_text()


@pytest.mark.slow
def test_a_stage_starts_from_what_it_names(finished: Path) -> None:
    first = exported(finished / "pretrain")
    initial = finished / "adapt" / "exports" / "initial_backbone.safetensors"
    for name, tensor in load_file(initial).items():
        assert tensor.equal(first[name]), name
    student, _ = CheckpointStore(finished / "adapt" / "checkpoints").read("student.backbone.")
    initial = finished / "last" / "exports" / "initial_backbone.safetensors"
    for name, tensor in load_file(initial).items():
        assert tensor.equal(student[f"student.backbone.{name}"]), name


@pytest.mark.slow
def test_a_stage_is_the_run_that_its_own_recipe_makes(finished: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert start(finished / "adapt" / "recipe.toml", alone, "drop=observers") == 0
    ours, theirs = exported(alone), exported(finished / "adapt")
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


# --------------------------------------------------------------------------- running again
@pytest.mark.slow
def test_running_again_skips_all_wherever_the_folder_is(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert start(whole.parent / "chain.toml", whole) == 0
    assert "This run is complete" in capsys.readouterr().err
    assert start(whole / "adapt" / "recipe.toml", whole / "adapt") == 0
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before[path]} <= {
        whole / ".lock",
        whole / "adapt" / ".lock",
    }


@pytest.mark.slow
def test_a_stage_that_is_added_is_run(whole: Path) -> None:
    recipe = whole.parent / "chain.toml"
    recipe.write_text(recipe.read_text() + KNN.replace("stages.knn", "stages.again"))
    before = (whole / "last" / "results.json").stat().st_mtime_ns
    assert start(recipe, whole) == 0
    assert "Stage last (3 of 5) is complete and is skipped." in (whole / "run.log").read_text()
    results = json.loads((whole / "results.json").read_text())["stages"]
    again, before_it = (results[name]["evaluations"]["knn"] for name in ("again", "knn"))
    assert [row["knn@10"] for row in again] == [row["knn@10"] for row in before_it]
    assert (whole / "last" / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_stage_that_changed_is_refused_by_name(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = whole.parent / "chain.toml"
    assert start(recipe, whole, "stages.adapt.recipe.batch_size=24") == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err
    assert told.startswith(f"stage adapt: {whole / 'adapt'} holds a run of another recipe:")
    assert "batch_size: 12 there, 24 now" in told
    other = "stages.last.recipe.init_from.weights=stage:pretrain"
    projectors = "stages.last.recipe.init_from.network=teacher"
    assert start(recipe, whole, other, projectors) == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err
    assert told.startswith("stage last: ")
    assert 'init_from.weights: "../adapt" there, "../pretrain" now' in told


@pytest.mark.slow
def test_a_stage_whose_origin_is_gone_is_refused(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole / "adapt" / "results.json").unlink()
    assert start(whole.parent / "chain.toml", whole) == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err
    assert "stage last has begun with what stage adapt left" in told
    assert f"delete {whole / 'last'} too" in told


# --------------------------------------------------------------------------- interrupted
@pytest.mark.slow
def test_stopped_and_killed_and_resumed_is_bit_equal(
    finished: Path, recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    # After its last step a stage has its exports left to make; the state is saved.
    late = run(output, *signals("pretrain", "SIGTERM", 4), recipe=recipe)
    assert late.returncode == ExitCode.REQUEUE, late.stderr
    assert "stage pretrain: Stopped by SIGTERM after iteration 4" in late.stderr
    assert not (output / "pretrain" / "results.json").exists()
    assert not (output / "adapt").exists()
    stopped = run(output, *signals("adapt", "SIGTERM", 1), recipe=recipe)
    assert stopped.returncode == ExitCode.REQUEUE, stopped.stderr
    assert "stage adapt: Stopped by SIGTERM after iteration 2" in stopped.stderr
    killed = run(output, *signals("adapt", "SIGKILL", 3), recipe=recipe)
    assert killed.returncode == -signal.SIGKILL
    assert "Stage pretrain (1 of 3) is complete and is skipped." in killed.stderr
    assert not (output / "adapt" / "results.json").exists()
    last = run_here(output, recipe=recipe)
    assert last.returncode == 0, last.stderr
    assert "Going on after iteration 2" in (output / "adapt" / "run.log").read_text()
    assert_same_chain(finished, output, ["pretrain", "last"])
    ours, theirs = exported(finished / "adapt"), exported(output / "adapt")
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    assert list(json.loads((output / "results.json").read_text())["stages"]) == STAGES


@pytest.mark.slow
def test_two_processes_killed_and_resumed(recipe: Path, tmp_path: Path) -> None:
    short = ["drop=stages.last", "stages.pretrain.recipe.iterations=2"]
    one, other = tmp_path / "one", tmp_path / "other"
    done = two_processes(one, *short, recipe=recipe)
    assert done.returncode == 0, done.stderr
    killed = two_processes(other, *short, *signals("adapt", "SIGKILL", 3, rank=1), recipe=recipe)
    assert killed.returncode == ExitCode.FAILED
    assert "rank 1" in killed.stderr
    done = two_processes(other, *short, recipe=recipe)
    assert done.returncode == 0, done.stderr
    assert "Going on after iteration 2" in (other / "adapt" / "run.log").read_text()
    assert_same_chain(one, other, ["pretrain", "adapt"])


# --------------------------------------------------------------------------- what a stage dies of
@pytest.mark.slow
def test_a_stage_that_cannot_go_on_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = "stages.adapt.recipe.losses"
    nan = (f"{losses}.t.use=poison", f"{losses}.t.iterations=[1,2,3,4]")
    overrides = (*nan, "stages.adapt.recipe.max_nonfinite_steps=0", "drop=stages.last")
    assert start(recipe, tmp_path / "out", *overrides) == ExitCode.DIVERGED
    told = capsys.readouterr().err
    assert "stage adapt: " in told
    assert "loss 't' on rank 0" in told
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pretrain").write_text("in the way")
    assert start(recipe, tmp_path / "other") == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err
    assert f"stage pretrain: {tmp_path / 'other' / 'pretrain'}" in told


@pytest.mark.slow
def test_a_full_disk_names_the_stage(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = ["stages.adapt.recipe.losses.dino.head.n_prototypes=20000"]
    big += ['drop=["stages.last"]']
    with small_disk(tmp_path / "disk", "tmpfs"):
        assert start(recipe, tmp_path / "disk" / "out", *big) == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("stage ")]
    assert line.startswith("stage adapt: ")
    assert "cannot save the checkpoint of step" in line
    assert "disk full" in line
    assert os.strerror(28) in line or os.strerror(27) in line
