"""Student, teacher and anchors: names, first values, refreshes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dinov3_ssl.networks import refresh_due
from torch import nn
from trainer_support import pretrain, trainer

from dinov3_framework import AnchorConfig, Loss
from dinov3_framework.parallel.sharder import initial_values

GRAM = ("losses.gram.use=gram", "augmentation.anchor_size=28")


def test_official_names(tmp_path: Path) -> None:
    with trainer(tmp_path, *GRAM) as ours:
        assert list(ours.unit.placed.student) == ["backbone", "dino_head", "ibot_head"]
        assert list(ours.unit.placed.teacher) == list(ours.unit.placed.student)
        assert list(ours.unit.placed.anchors) == ["gram"]
        names = ours.unit.placed.named_state()
    for expected in (
        "student.backbone.patch_embed.proj.weight",
        "teacher.dino_head.last_layer.weight",
        "anchors.gram.cls_token",
    ):
        assert expected in names


def test_teacher_and_anchors_start_as_the_student(tmp_path: Path) -> None:
    with trainer(tmp_path, *GRAM) as ours:
        nets = ours.unit.placed
        student = nets.student.state_dict()
        assert student
        for name, value in nets.teacher.state_dict().items():
            assert torch.equal(value, student[name])
        for name, value in nets.anchors["gram"].state_dict().items():
            assert torch.equal(value, student[f"backbone.{name}"])
        initial = nets.initial_backbone()
        assert not initial.training
        for name, value in initial.state_dict().items():
            assert torch.equal(value, student[f"backbone.{name}"])
        assert nets.student.training
        assert not nets.teacher.training
        frozen = [*nets.teacher.parameters(), *nets.anchors.parameters()]
        assert frozen
        assert not any(parameter.requires_grad for parameter in frozen)
        assert all(parameter.requires_grad for parameter in nets.student.parameters())


def test_first_values_depend_on_the_seed_and_not_on_other_networks(tmp_path: Path) -> None:
    with trainer(tmp_path / "a") as ours:
        one = {name: value.clone() for name, value in ours.unit.placed.named_state().items()}
    torch.manual_seed(12345)
    with trainer(tmp_path / "b", 'drop=["losses.dino"]') as ours:
        for name, value in ours.unit.placed.named_state().items():
            assert torch.equal(value, one[name])
    with trainer(tmp_path / "c", "seed=1") as ours:
        other = ours.unit.placed.named_state()
    assert not torch.equal(other["student.backbone.cls_token"], one["student.backbone.cls_token"])


def test_drawing_first_values_leaves_the_global_generator_alone() -> None:
    blueprint = pretrain().method.prepare().blueprint
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    initial_values(blueprint.backbone, seed=0)
    assert torch.equal(torch.rand(2), expected)


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.forgotten = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2))

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)


def test_what_init_weights_forgets_is_found() -> None:
    with torch.device("meta"):
        blueprint = Forgetful()
    with pytest.raises(RuntimeError, match=r"init_weights\(\) left 'forgotten' without"):
        initial_values(blueprint, seed=0)


def test_the_teacher_follows_by_its_momentum(tmp_path: Path) -> None:
    with trainer(tmp_path) as ours:
        nets = ours.unit.placed
        with torch.no_grad():
            for parameter in nets.student.parameters():
                parameter.add_(1.0)
        before = {name: p.clone() for name, p in nets.teacher.named_parameters()}
        nets.update_teacher(0.75)
        for name, parameter in nets.teacher.named_parameters():
            torch.testing.assert_close(parameter, before[name] + 0.25)


@pytest.mark.parametrize(
    ("anchor", "due"),
    [
        (AnchorConfig(), []),
        (AnchorConfig(period=3), [3, 6, 9, 12, 15]),
        (AnchorConfig(period=3, first_refresh=7), [9, 12, 15]),
        (AnchorConfig(period=3, first_refresh=6, max_refreshes=2), [6, 9]),
        (AnchorConfig(period=3, first_refresh=1, max_refreshes=1), [3]),
        (AnchorConfig(period=1, max_refreshes=0), []),
        (AnchorConfig(period=20), []),
    ],
)
def test_when_an_anchor_is_refreshed(anchor: AnchorConfig, due: list[int]) -> None:
    assert [done for done in range(1, 16) if refresh_due(anchor, done)] == due


def test_a_loss_without_projector_gets_no_head(tmp_path: Path) -> None:
    parts = pretrain(*GRAM).method.prepare()
    assert set(parts.blueprint.projectors) == {"dino", "ibot"}
    assert isinstance(parts.losses["koleo"], Loss)
    assert all(p.is_meta for p in parts.blueprint.student().parameters())
