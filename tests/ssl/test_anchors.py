"""Anchors that begin as weights or as the momentum teacher of an iteration, and what keeps them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_support import export_bytes, losses, run, run_here
from torch import Tensor
from trainer_support import pretrain, save, steps, trainer

from dinov3_framework import ExitCode, RecipeError
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.training.trainer import Trainer

GRAM = ("losses.gram.use=gram", "augmentation.anchor_size=56")
ANCHOR = "losses.gram.anchor"
OTHER = ("backbone.embed_dim=48", "backbone.depth=1")  # another backbone than the tiny recipe's


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teachers of iterations 4 and 6 are kept."""
    output = tmp_path_factory.mktemp("earlier") / "run"
    done = run_here(output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another backbone."""
    output = tmp_path_factory.mktemp("another") / "run"
    done = run_here(output, *OTHER, "iterations=2")
    assert done.returncode == 0, done.stderr
    return output


def teacher_of(output: Path, step: int) -> dict[str, Tensor]:
    whole, _ = CheckpointStore(output / "checkpoints").read("teacher.backbone.")
    assert (output / "checkpoints" / f"step_{step:08}").is_dir()
    return {name.removeprefix("teacher.backbone."): value for name, value in whole.items()}


def test_an_anchor_begins_as_weights(earlier: Path, tmp_path: Path) -> None:
    place = earlier / "checkpoints" / "step_00000006"
    with trainer(tmp_path / "run", *GRAM, f"{ANCHOR}.weights={place}") as ours:
        anchor = dict(ours.unit.placed.anchors["gram"].named_parameters())
        expected = teacher_of(earlier, 6)
        assert anchor
        for name, parameter in anchor.items():
            assert torch.equal(parameter, expected[name])
        assert not torch.equal(
            anchor["cls_token"], ours.unit.placed.teacher["backbone"].get_parameter("cls_token")
        )
        steps(ours, 2)
        for name, parameter in ours.unit.placed.anchors["gram"].named_parameters():
            assert torch.equal(parameter, expected[name]), "it is never refreshed"


def test_an_anchor_may_be_of_another_backbone(another: Path, tmp_path: Path) -> None:
    with trainer(tmp_path / "run", *GRAM, f"{ANCHOR}.weights={another}") as ours:
        assert ours.unit.placed.anchors["gram"].embed_dim == 48
        (figures,) = steps(ours, 1)
    assert figures["gram"] > 0


@pytest.mark.parametrize("key", ["period=2", "start=3"])
def test_one_that_is_refreshed_may_not(another: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=r"its weights are of another backbone") as caught:
        pretrain(*GRAM, f"{ANCHOR}.weights={another}", f"{ANCHOR}.{key}").check(1)
    assert {problem.where for problem in caught.value.problems} == {ANCHOR}


@pytest.mark.parametrize("key", ["norm_layer=layernorm", "pos_embed_rope_base=50.0"])
def test_nor_with_other_settings_behind_equal_shapes(earlier: Path, key: str) -> None:
    anchor = (*GRAM, f"{ANCHOR}.weights={earlier}", f"backbone.{key}")
    pretrain(*anchor).check(1)
    name = key.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"a backbone with another {name} than the student's"):
        pretrain(*anchor, f"{ANCHOR}.period=2").check(1)


def darkest_shown(ours: Trainer) -> float:
    """What the next step shows the anchor where images are darkest: normalized values."""
    shown: list[float] = []
    anchor = ours.unit.placed.anchors["gram"]
    look = anchor.forward_features

    def noting(images: Tensor, *others: Any) -> Any:
        shown.append(float(images[0].min() if isinstance(images, list) else images.min()))
        return look(images, *others)

    anchor.forward_features = noting
    steps(ours, 1)
    del anchor.forward_features
    return shown[-1]


@pytest.mark.parametrize("key", ["period=2", "start=2"])
def test_once_it_is_the_teacher_it_sees_images_as_the_teacher_does(
    earlier: Path, tmp_path: Path, key: str
) -> None:
    """Mean and deviation belong to the network: of the weights before, of the run afterwards."""
    recipe = (*GRAM, f"{ANCHOR}.weights={earlier}", f"{ANCHOR}.{key}", "checkpoint.every=1")
    own = ("images.mean=[0.9]", "images.std=[0.1]")
    with trainer(tmp_path / "run", *recipe, *own) as ours:
        before = [darkest_shown(ours) for _ in range(2)]
        save(ours)
        assert darkest_shown(ours) == pytest.approx(-9, abs=0.5)
    assert all(value > -3 for value in before), "as the weights were shown them"
    with trainer(tmp_path / "run", *recipe, *own) as resumed:
        resumed.resume()
        assert darkest_shown(resumed) == pytest.approx(-9, abs=0.5)


def test_weights_that_are_not_there_are_missing_and_refused(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    (said,) = pretrain(*GRAM, f"{ANCHOR}.weights={nowhere}").check(1).missing
    assert said.startswith(f"{ANCHOR}.weights: there is no {nowhere}")
    done = run_here(tmp_path / "run", *GRAM, f"{ANCHOR}.weights={nowhere}")
    assert done.returncode == ExitCode.WRONG_INPUT
    assert f"{ANCHOR}.weights: there is no" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_anchor_that_begins_later(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", *GRAM, f"{ANCHOR}.start=2") as ours:
        before = steps(ours, 2)
        assert all("gram" not in figures for figures in before)
        teacher = {n: p.clone() for n, p in ours.unit.placed.teacher["backbone"].named_parameters()}
        (first,) = steps(ours, 1)
        assert first["gram"] >= 0
        for name, parameter in ours.unit.placed.anchors["gram"].named_parameters():
            assert torch.equal(parameter, teacher[name]), "the teacher before iteration 2"


def test_the_momentum_teacher_as_it_is(tmp_path: Path) -> None:
    live = ("losses.gram.use=gram", f"{ANCHOR}=none", "backbone.drop_path_rate=0.0")
    with trainer(tmp_path / "run", *live, "augmentation.masking=none", "drop=losses.ibot") as ours:
        assert not ours.unit.placed.anchors
        (figures,) = steps(ours, 1)
    # Before the first step student and teacher are one, but for what training draws (RoPE).
    assert figures["gram"] < 0.05


@pytest.mark.slow
def test_anchors_survive_a_resume_without_their_weights(earlier: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(earlier / "exports", weights)
    anchor = (
        f"{ANCHOR}.weights={weights / 'teacher_backbone.safetensors'}",
        f"{ANCHOR}.period=4",
        "checkpoint.every=1",
    )
    whole = run_here(tmp_path / "whole", *GRAM, *anchor)
    assert whole.returncode == 0, whole.stderr
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=3")
    assert run(tmp_path / "killed", *GRAM, *anchor, *killer).returncode != 0
    shutil.rmtree(weights)
    again = run_here(tmp_path / "killed", *GRAM, *anchor)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert export_bytes(tmp_path / "killed") == export_bytes(tmp_path / "whole")
    ours, theirs = (
        CheckpointStore(tmp_path / name / "checkpoints").read("anchors.")[0]
        for name in ("killed", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
