"""Losses say what they need; it is checked, computed once, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dinov3_ssl.objective import Objective
from trainer_support import NO_LOSSES, pretrain, trainer

from dinov3_framework import Anchor, Constant, Loss, LossResult, StepOutputs, View
from dinov3_framework.contracts.losses import check_needs
from dinov3_framework.contracts.training import Step
from dinov3_framework.training.trainer import Trainer


class Reads(Loss):
    """A loss that needs what it is told to."""

    def __init__(self, *needs: str, anchor: Anchor | None = None) -> None:
        super().__init__()
        self.needs, self._anchor = frozenset(needs), anchor
        self.seen: StepOutputs | None = None

    def anchor(self) -> Anchor | None:
        return self._anchor

    def forward(self, step: StepOutputs) -> LossResult:
        self.seen = step
        return LossResult(step.student["global"].cls.mean(), {"extra": 2.0})


def augmentation(local: int = 2, masks: bool = True, anchor: bool = False) -> Any:
    views = {"global": View(2, 28), "local": View(local, 14)}
    if anchor:
        views["anchor"] = View(2, 56)
    return SimpleNamespace(views=views, makes_masks=masks)


# --------------------------------------------------------------------------- needs
@pytest.mark.parametrize(
    ("need", "made", "words"),
    [
        ("masks", augmentation(masks=False), "the augmentation makes no masks"),
        ("student.local.class", augmentation(local=0), "makes global, local crops only"),
        ("teacher.local.class", augmentation(), "the teacher sees global"),
        ("anchor.anchor.patches", augmentation(anchor=True), "the anchor sees nothing"),
        ("student.medium.class", augmentation(), "the student sees global, local"),
        ("pupil.global.class", augmentation(), "of networks student, teacher, anchor"),
        ("student.global.registers", augmentation(), "outputs class, storage, patches"),
        ("student", augmentation(), "a need is 'masks' or network.view.output"),
    ],
)
def test_needs_that_are_not_met(need: str, made: Any, words: str) -> None:
    (problem,) = check_needs({"mine": Reads(need, "student.global.class")}, made)
    assert problem.where == "losses.mine"
    assert f"needs {need!r}: " in problem.message
    assert words in problem.message


def test_needs_that_are_met() -> None:
    loss = Reads("masks", "student.local.storage", "teacher.global.patches", "student.global.class")
    anchored = Reads("anchor.anchor.patches", anchor=Anchor())
    assert check_needs({"a": loss, "b": anchored}, augmentation(anchor=True)) == []
    (problem,) = check_needs({"b": anchored}, augmentation())
    assert "makes global, local crops only" in problem.message


# --------------------------------------------------------------------------- what is computed
@contextmanager
def objective(tmp_path: Path, **losses: Reads) -> Iterator[tuple[Objective, Trainer]]:
    with trainer(tmp_path, NO_LOSSES, "losses.p.use=scaled_mean") as ours:
        configs = dict.fromkeys(losses, ours.config.losses["p"])
        yield Objective(losses, configs, ours.unit.placed, ours.config.images), ours


def calls(ours: Trainer, role: str) -> list[Any]:
    """What a role's backbone is called with from now on."""
    backbone = getattr(ours.unit.placed, role)["backbone"]
    seen: list[Any] = []
    whole = backbone.forward_features

    def record(images: Any, masks: Any = None) -> Any:
        seen.append((images, masks))
        return whole(images, masks)

    backbone.forward_features = record
    return seen


def batch(ours: Trainer) -> Any:
    return ours.maker[0, 0]


def test_nothing_is_computed_that_nobody_needs(tmp_path: Path) -> None:
    with objective(tmp_path, a=Reads("student.global.class")) as (whole, ours):
        student, teacher = calls(ours, "student"), calls(ours, "teacher")
        whole(batch(ours), Step(0, 10))
    ((images, masks),) = student
    assert [tuple(view.shape) for view in images] == [(24, 1, 28, 28)]
    assert masks == [None], "nobody needs masks, so nothing is hidden"
    assert teacher == []


def test_each_network_runs_once_however_many_ask(tmp_path: Path) -> None:
    needs = ("student.global.class", "student.local.class", "teacher.global.patches", "masks")
    a, b = Reads(*needs), Reads(*needs)
    with objective(tmp_path, a=a, b=b) as (whole, ours):
        student, teacher = calls(ours, "student"), calls(ours, "teacher")
        made = batch(ours)
        outcome = whole(made, Step(4, 10))
    ((images, masks),) = student
    assert [tuple(view.shape) for view in images] == [(24, 1, 28, 28), (24, 1, 14, 14)]
    assert torch.equal(masks[0], made.masks.flatten(0, 1))
    assert masks[1] is None
    ((images, masks),) = teacher
    assert masks is None, "the teacher sees everything"
    assert a.seen is not None
    assert b.seen is not None
    assert a.seen.student["local"] is b.seen.student["local"]
    views = a.seen.student["global"], a.seen.student["local"], a.seen.teacher["global"]
    assert [view.grid for view in views] == [(4, 4), (2, 2), (4, 4)]
    assert views[0].cls.shape == (2, 12, 32)
    assert views[0].storage.shape == (2, 12, 1, 32)
    assert views[1].patches.shape == (2, 12, 4, 32)
    assert not views[2].cls.requires_grad
    assert a.seen.iteration == 4
    assert set(outcome.losses) == {"a", "b"}
    assert outcome.metrics["b/extra"] == 2.0


def test_the_total_is_weighted(tmp_path: Path) -> None:
    with trainer(tmp_path, "losses.koleo.weight=0.5", "losses.dino.weight=2.0") as ours:
        outcome = ours.unit.objective(batch(ours), Step(0, 10))
    parts = outcome.losses
    expected = 2 * parts["dino"] + parts["ibot"] + 0.5 * parts["koleo"]
    torch.testing.assert_close(outcome.total.detach(), expected)
    assert outcome.metrics["dino/weight"] == 2.0
    assert outcome.total.requires_grad
    assert not any(loss.requires_grad for loss in parts.values())


def test_anchors_see_the_view_they_name(tmp_path: Path) -> None:
    gram = ("losses.gram.use=gram", "augmentation.anchor_size=42")
    with trainer(tmp_path, *gram) as ours:
        grids = []
        whole = ours.unit.objective.losses["gram"].forward

        def record(step: StepOutputs) -> LossResult:
            grids.append(step.anchor.grid if step.anchor is not None else None)
            return whole(step)

        ours.unit.objective.losses["gram"].forward = record
        ours.unit.objective(batch(ours), Step(0, 10))
    assert grids == [(6, 6)]


class Projects(Reads):
    def forward(self, step: StepOutputs) -> LossResult:
        return LossResult(step.project(step.student["global"].cls).mean())


def test_projecting_without_a_projector_is_said(tmp_path: Path) -> None:
    losses = {"mine": Projects("student.global.class")}
    with (
        objective(tmp_path, **losses) as (whole, ours),
        pytest.raises(KeyError, match="loss 'mine' projects tokens and built no projector"),
    ):
        whole(batch(ours), Step(0, 10))


def test_state_is_the_losses_buffers(tmp_path: Path) -> None:
    with trainer(tmp_path, "losses.c.use=center") as ours:
        assert set(ours.unit.objective.named_state()) == {"losses.c.center"}
        assert "losses.c.center" in ours.tensors()


def test_a_loss_weight_may_be_a_schedule() -> None:
    config = pretrain('losses.koleo.weight={use="cosine", start=0.0, peak=1.0, end=1.0, warmup=4}')
    schedule = config.config.losses["koleo"].weight
    assert [schedule.at(i, 6) for i in (0, 2, 5)] == [0.0, 0.5, 1.0]
    assert config.config.losses["dino"].weight == Constant(value=1.0)
