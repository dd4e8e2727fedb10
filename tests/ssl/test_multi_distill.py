"""Several students of one teacher, side by side on real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from dinov3_ssl.multi_distill import MultiDistill, processes_of
from dinov3_ssl.sharing import Exchange
from distill_support import MULTI
from run_support import is_timing, losses, metrics, processes_with, run, run_here
from run_support import start as begin
from trainer_support import registry

from dinov3_framework import ExitCode, RecipeError, load_backbone
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.runtime.lock import locked

STUDENTS = ("wide", "narrow", "conv")
CROPS = ("augmentation.global_size=64", "augmentation.local_size=32")
CONV_LOSS = "students.conv.losses.p"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher") / "run"
    wide = ("backbone.embed_dim=48", "backbone.num_heads=4", "backbone.patch_size=16")
    done = run_here(output, *wide, *CROPS, "iterations=2")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three students on four processes, to the end."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(output, f"teacher.weights={teacher}", recipe=MULTI)
    assert done.returncode == 0, done.stderr
    return output


def task(*overrides: str) -> MultiDistill:
    config = structure_recipe(registry(), compose(MULTI, overrides))
    return MultiDistill(config, registry=registry())


# --------------------------------------------------------------------------- sharing
def test_samples_go_where_they_are_wanted() -> None:
    """Ten samples made by four processes, wanted whole by two, one and one of them."""
    have = [range(2), range(2, 5), range(5, 7), range(7, 10)]
    want = [range(5), range(5, 10), range(10), range(10)]
    everyone = [Exchange.between(rank, have, want) for rank in range(4)]
    for rank, wanted in enumerate(want):
        got = [
            place
            for sender, exchange in enumerate(everyone)
            for place in list(have[sender])[exchange.send[rank]]
        ]
        assert got == list(wanted)
        assert everyone[rank].receive == [
            len(range(*exchange.send[rank].indices(3))) for exchange in everyone
        ]
    nobody = everyone[1].only(1, [True, False, True, False])
    assert nobody.receive == [0, 0, 0, 0]
    assert [part.stop - part.start for part in nobody.send] == [3, 0, 3, 0]


def test_shares_keep_their_proportion() -> None:
    config = task().config
    assert processes_of(config, 4) == {"wide": 2, "narrow": 1, "conv": 1}
    assert processes_of(config, 8) == {"wide": 4, "narrow": 2, "conv": 2}
    assert processes_of(config, 3) is None


# --------------------------------------------------------------------------- checking
def test_problems_are_told_at_the_students_that_have_them(teacher: Path) -> None:
    start = f"teacher.weights={teacher}"
    report = task(start).check(4)
    assert report.missing == []
    assert "wide: parameters" in report.sections
    assert "conv: batch" in report.sections
    assert "teacher" in report.sections
    (said,) = task(start).check(1).missing
    assert "they share 4 processes (2 + 1 + 1)" in said
    with pytest.raises(RecipeError) as caught:
        task(
            *(start, "students.wide.backbone.in_chans=4"),
            "optimizer.lr={use='cosine', start=0.0, peak=1e-3, end=1e-5, warmup=50}",
        ).check(4)
    where = [problem.where for problem in caught.value.problems]
    assert sorted(where) == sorted({*where}), "each once"
    assert "students.wide.backbone.in_chans" in where
    assert "optimizer.lr" in where
    with pytest.raises(RecipeError, match="cannot be split over 2 processes"):
        task(start, "batch_size=11").check(4)


# --------------------------------------------------------------------------- running
@pytest.mark.slow
def test_each_student_has_a_run_of_its_own(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert list(results["students"]) == list(STUDENTS)
    for name in STUDENTS:
        folder = whole / name
        assert [line["iteration"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]
        assert all(None not in line.values() for line in metrics(folder))
        assert "saved" in (folder / "run.log").read_text()
        assert (folder / "checkpoints" / "step_00000006").is_dir()
        loaded = load_backbone(folder)
        assert loaded.component == ("convnext" if name == "conv" else "vit")
    assert losses(whole / "wide") != losses(whole / "narrow")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("wide", 2), ("conv", 1)])
def test_the_same_numbers_as_alone(
    whole: Path, teacher: Path, tmp_path: Path, name: str, processes: int
) -> None:
    """A student's own recipe, which the run left, as a plain distillation."""
    recipe = tmp_path / "alone.toml"
    shutil.copy(whole / name / "recipe.toml", recipe)
    count = ("launcher.use=local", f"launcher.processes={processes}")
    start = run_here if processes == 1 else run
    done = start(tmp_path / "alone", *count, recipe=recipe)
    assert done.returncode == 0, done.stderr
    for ours, alone in zip(metrics(whole / name), metrics(tmp_path / "alone"), strict=True):
        learnt = {key for key in ours if not is_timing(key)}
        assert learnt == {key for key in alone if not is_timing(key)}
        for key in learnt:
            assert ours[key] == pytest.approx(alone[key], rel=1e-5), (ours["iteration"], key)
    both = [CheckpointStore(f / "checkpoints") for f in (whole / name, tmp_path / "alone")]
    (one, _), (other, _) = (store.read("teacher.backbone.") for store in both)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_student_whose_folder_is_in_use_ends_all(teacher: Path, tmp_path: Path) -> None:
    """The recipe in a student's folder runs there alone, too."""
    output = tmp_path / "run"
    aside = output / "wide" / "exports" / ".x.safetensors.0123abcd"  # of an interrupted export
    aside.parent.mkdir(parents=True)
    aside.touch()
    two = ("students.wide.processes=1", "launcher.processes=2", 'drop=["students.conv"]')
    start = (f"teacher.weights={teacher}", "iterations=400", *two)
    with locked(output / "narrow"):
        done = run(output, *start, recipe=MULTI)
    assert done.returncode == ExitCode.WRONG_INPUT, done.stderr
    assert f"{output / 'narrow'} is in use by process {os.getpid()} " in done.stderr
    assert not (output / "narrow" / "recipe.toml").exists()
    assert not processes_with(str(output))
    started = begin(output, *start, recipe=MULTI)
    try:
        deadline = time.monotonic() + 60
        while not (output / "wide" / "checkpoints").exists():
            assert time.monotonic() < deadline
            assert started.process.poll() is None
            time.sleep(0.05)
        assert not aside.exists()
        alone = run_here(output / "wide", recipe=output / "wide" / "recipe.toml")
        assert alone.returncode == ExitCode.WRONG_INPUT
        assert f"{output / 'wide'} is in use by process " in alone.stderr
    finally:
        started.process.send_signal(signal.SIGTERM)
        started.finish()


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_all_go_on(whole: Path, teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    start = (f"teacher.weights={teacher}", "checkpoint.every=1")
    killer = (
        *("observers.killer.use=signal_at", "observers.killer.iteration=4"),
        "observers.killer.rank=3",
    )
    done = run(output, *start, *killer, recipe=MULTI)
    assert done.returncode not in (0, int(ExitCode.WRONG_INPUT))
    assert "rank 3" in done.stderr
    assert not processes_with(str(output))
    # One student is behind: all go back to what they have in common.
    for step in CheckpointStore(output / "narrow" / "checkpoints").steps()[-1:]:
        shutil.rmtree(output / "narrow" / "checkpoints" / f"step_{step:08}")
    again = run(output, *start, recipe=MULTI)
    assert again.returncode == 0, again.stderr
    for name in STUDENTS:
        assert losses(output / name) == losses(whole / name)
        (ours, _), (theirs, _) = (
            CheckpointStore(folder / name / "checkpoints").read() for folder in (output, whole)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_one_that_diverges_ends_all_and_the_others_keep_their_state(
    teacher: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    poison = (f"{CONV_LOSS}.use=poison", f"{CONV_LOSS}.rank=3", f"{CONV_LOSS}.iterations=[2, 4, 5]")
    start = (f"teacher.weights={teacher}", "max_nonfinite_steps=1", "checkpoint.every=100")
    done = run(output, *start, *poison, recipe=MULTI)
    assert done.returncode == ExitCode.DIVERGED, done.stderr
    assert "iteration 5: not finite: " in done.stderr
    assert "loss 'p' on rank 3" in done.stderr
    assert "conv: iteration 5" in done.stderr, "the others say whose fault it was"
    for name in ("wide", "narrow"):
        store = CheckpointStore(output / name / "checkpoints")
        assert store.steps() == [5]
        assert all(tensor.isfinite().all() for tensor in store.read()[0].values())
        # A step that is skipped in one student is none of the others' business.
        assert all(line["loss"] is not None for line in metrics(output / name))
    assert CheckpointStore(output / "conv" / "checkpoints").steps() == []
    assert [line["p"] for line in metrics(output / "conv")] == [0, None, 0, None]
    assert not processes_with(str(output))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    stop = (
        *("observers.stop.use=signal_at", "observers.stop.iteration=2"),
        *("observers.stop.signal=SIGTERM", "observers.stop.rank=3", "checkpoint.every=100"),
    )
    # The teacher's export has no projectors: each student has new ones made of the same tokens.
    export = teacher / "exports" / "teacher_backbone.safetensors"
    done = run(output, f"teacher.weights={export}", *stop, recipe=MULTI)
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    steps = {CheckpointStore(output / n / "checkpoints").steps()[-1] for n in STUDENTS}
    assert len(steps) == 1
    assert steps < {2, 3, 4}
    log = (output / "conv" / "run.log").read_text()
    assert "no projector of loss 'dino': it gets a new one" in log
