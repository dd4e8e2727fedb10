"""Whole runs from weights: the command line, a kill, a resumption without the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from init_from_support import assert_same, features, own_export, reference_checkpoint, start, vit
from run_support import TINY, export_bytes, losses, metrics, run, run_here
from trainer_support import pretrain, snapshot, steps, trainer

from dinov3_framework import load_backbone
from dinov3_framework.cli import main


def test_a_resumed_run_does_not_read_the_weights(tmp_path: Path) -> None:
    path, output = own_export(tmp_path, vit()), tmp_path / "new"
    overrides = start(path, into="both")
    with trainer(output, *overrides) as ours:
        steps(ours, 1)
        ours._save()
        before = snapshot(ours)
        expected = steps(ours, 1)
    path.unlink()
    with trainer(output, *overrides) as resumed:
        resumed.resume()
        assert resumed.done == 1
        assert_same(snapshot(resumed), before)
        assert steps(resumed, 1) == expected
        assert torch.equal(features(resumed.run.initial_model().backbone), features(vit()))
        assert resumed.origin["init_from"] == str(path)
    report = pretrain(*overrides, f"output_dir={json.dumps(str(output))}").check(1)
    (row,) = report.sections["init_from"]
    assert row == ("weights", f"{path}, not read: the run goes on after iteration 1")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    path, output = own_export(tmp_path, vit()), tmp_path / "new"
    with trainer(output, *start(path)):
        pass
    with trainer(output, *start(path)) as ours:
        ours.resume()
        assert ours.done == 0
        assert torch.equal(features(ours.unit.placed.teacher["backbone"]), features(vit()))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_checkpoint(tmp_path_factory.mktemp("source"), vit())


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from the command line, and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    done = run_here(output, *start(source, projectors=True, new=["ibot_head.*"]))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


@pytest.mark.slow
def test_a_run_from_the_command_line(finished: tuple[Path, str], source: Path) -> None:
    output, printed = finished
    count = len(vit().state_dict())
    line = f"backbone: {count} loaded, 0 new, 0 unused; dino_head: 7 loaded, 0 new, 0 unused"
    assert line in printed
    assert line in (output / "run.log").read_text()
    assert None not in metrics(output)[-1].values()
    first = load_backbone(output / "exports" / "initial_backbone.safetensors")
    last = load_backbone(output / "exports" / "teacher_backbone.safetensors")
    assert torch.equal(features(first.backbone), features(vit()))
    assert not torch.equal(features(last.backbone), features(vit()))
    for loaded in (first, last):
        assert loaded.provenance["init_from"] == str(source)
        assert loaded.provenance["init_from.network"] == "teacher"
        counts = f"{count + 7} loaded, 7 new, 0 unused"
        assert loaded.provenance["init_from.tensors"] == counts


@pytest.mark.slow
def test_a_run_from_another_runs_folder(finished: tuple[Path, str], tmp_path: Path) -> None:
    before, _ = finished
    exported = load_backbone(before / "exports" / "teacher_backbone.safetensors")
    with trainer(tmp_path, *start(before)) as ours:
        assert torch.equal(
            features(ours.unit.placed.teacher["backbone"]), features(exported.backbone)
        )
        assert ours.origin["init_from"] == str(before)
        assert ours.origin["init_from.iterations"] == "6"
        assert ours.origin["init_from.init_from"] == exported.provenance["init_from"]
    with trainer(tmp_path / "heads", *start(before / "checkpoints", projectors=True)) as ours:
        assert torch.equal(
            features(ours.unit.placed.teacher["backbone"]), features(exported.backbone)
        )
        assert ours.origin["init_from.tensors"].endswith(" loaded, 0 new, 0 unused")


@pytest.mark.slow
def test_killed_and_resumed_without_the_weights(
    finished: tuple[Path, str], source: Path, tmp_path: Path
) -> None:
    (whole, _), output = finished, tmp_path / "killed"
    overrides = start(source, projectors=True, new=["ibot_head.*"])
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=5")
    killed = run(output, *overrides, *killer)
    assert killed.returncode != 0
    assert not (output / "results.json").exists()
    away = source.rename(source.with_suffix(".away"))
    try:
        resumed = run_here(output, *overrides)
    finally:
        away.rename(source)
    assert resumed.returncode == 0, resumed.stderr
    assert "not read: the run goes on after iteration 4" in resumed.stdout
    assert losses(output) == losses(whole)
    assert export_bytes(output) == export_bytes(whole)


def test_a_check_says_what_is_wrong_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = own_export(tmp_path, vit(depth=1)), tmp_path / "new"
    arguments = [str(TINY), *start(path), "--check", "--output-dir", str(output)]
    assert main(arguments) == 2
    assert 'new = ["backbone.blocks.1.*"]' in capsys.readouterr().err
    assert main([*arguments, 'init_from.new=["backbone.blocks.1.*"]']) == 0
    assert "init_from\n" in capsys.readouterr().out
    assert not output.exists()
