"""The stand-in of a run has what the run has, but for the values."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer_support import pretrain, registry, trainer

from dinov3_framework.checkpoints.folder import CheckpointFolder
from dinov3_framework.checkpoints.safe_reader import check_fit
from dinov3_framework.weights.loading import describe_backbone
from dinov3_framework.weights.opening import open_backbone
from dinov3_framework.weights.sharded import newest

# An anchor, and a loss with a buffer.
GRAM = (
    "losses.gram.use=gram",
    "augmentation.anchor_size=28",
    "losses.centre.use=centre",
    "checkpoint.every=2",
)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    folder = tmp_path / "stand_in"
    folder.mkdir()
    assert pretrain(*GRAM).write_expected_artifacts(folder)
    return folder


def test_checkpoints_have_every_tensor_of_a_run(stand_in: Path, tmp_path: Path) -> None:
    source = newest(stand_in / "checkpoints")
    assert source.path.name == "step_00000006"
    with trainer(tmp_path / "run", *GRAM) as ours:
        tensors = ours.tensors()
        check_fit(source.path, source._reader.tensors(), tensors)
    assert {name.split(".")[0] for name in tensors} == {
        "student",
        "teacher",
        "anchors",
        "losses",
        "optimizer",
    }
    assert CheckpointFolder(stand_in / "checkpoints").complete_steps() == [4, 6]


def test_the_export_has_every_tensor_of_a_run(stand_in: Path, tmp_path: Path) -> None:
    method = pretrain(*GRAM).method
    with trainer(tmp_path / "run", *GRAM) as ours:
        real = method.export(ours, method.prepare())
    assert real is not None
    with open_backbone(real, registry()) as expected:
        for source in (stand_in, stand_in / "exports" / "teacher_backbone.safetensors"):
            with open_backbone(source, registry()) as found:
                assert dict(found.content.shapes) == dict(expected.content.shapes)
                assert (found.config, found.images) == (expected.config, expected.images)
            described = describe_backbone(source, registry=registry())
            assert described.size == 28
