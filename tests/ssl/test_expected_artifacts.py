"""What a run is expected to leave is what it leaves, but for the values."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer_support import pretrain, registry, trainer

from dinov3_framework import Backbone
from dinov3_framework.checkpoints.folder import CheckpointFolder
from dinov3_framework.weights.loading import describe_backbone
from dinov3_framework.weights.sharded import open_newest

# An anchor, and a loss with a buffer.
GRAM = (
    "losses.gram.use=gram",
    "augmentation.anchor_size=28",
    "losses.center.use=center",
    "checkpoint.every=2",
)


def shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    assert pretrain(*GRAM).write_expected_artifacts(folder)
    return folder


def test_checkpoints_have_every_tensor_of_a_run(artifacts: Path, tmp_path: Path) -> None:
    source = open_newest(artifacts / "checkpoints")
    assert source.path.name == "step_00000006"
    with trainer(tmp_path / "run", *GRAM) as ours:
        tensors = ours.tensors()
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {name.split(".")[0] for name in tensors} == {
        "student",
        "teacher",
        "anchors",
        "losses",
        "optimizer",
    }
    assert CheckpointFolder(artifacts / "checkpoints").complete_steps() == [4, 6]


def test_the_export_has_every_tensor_of_a_run(artifacts: Path, tmp_path: Path) -> None:
    method = pretrain(*GRAM).method
    with trainer(tmp_path / "run", *GRAM) as ours:
        real = method.export(ours, method.prepare())
    assert real is not None
    expected = describe_backbone(real, registry=registry())
    for source in (artifacts, artifacts / "exports" / "teacher_backbone.safetensors"):
        found = describe_backbone(source, registry=registry())
        assert shapes(found.backbone) == shapes(expected.backbone)
        assert (found.config, found.images) == (expected.config, expected.images)
        assert found.size == 28
