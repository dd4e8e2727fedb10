"""The stand-in of a run has what the run has, but for the values."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from trainer_support import pretrain, trainer

from dinov3_framework.engine.checkpoint_folder import CheckpointFolder
from dinov3_framework.engine.loading import describe_backbone
from dinov3_framework.engine.safe_reader import check_fit
from dinov3_framework.engine.sharded_weights import newest

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
    assert pretrain(*GRAM).stand_in(folder)
    return folder


def test_checkpoints_have_every_tensor_of_a_run(stand_in: Path, tmp_path: Path) -> None:
    source = newest(stand_in / "checkpoints")
    assert source.path.name == "step_00000006"
    with trainer(tmp_path / "run", *GRAM) as ours:
        tensors = ours._tensors()
        check_fit(source.path, source._reader.tensors(), tensors)
    assert {name.split(".")[0] for name in tensors} == {
        "student",
        "teacher",
        "anchors",
        "losses",
        "optimizer",
    }
    assert CheckpointFolder(stand_in / "checkpoints").complete_steps() == [4, 6]


def test_the_export_has_every_tensor_and_takes_no_room(stand_in: Path, tmp_path: Path) -> None:
    path = stand_in / "exports" / "teacher_backbone.safetensors"
    real = tmp_path / "real.safetensors"
    with trainer(tmp_path / "run", *GRAM) as ours:
        pretrain(*GRAM)._export(real, ours.networks, ours.maker.augmentation, {})
    described = describe_backbone(stand_in)
    assert described.size == describe_backbone(real).size == 28
    assert described.images == describe_backbone(real).images
    with safe_open(path, "pt") as one, safe_open(real, "pt") as other:
        assert sorted(one.keys()) == sorted(other.keys())
        for name in one.keys():  # noqa: SIM118  # a handle is no mapping
            assert one.get_slice(name).get_shape() == other.get_slice(name).get_shape()
            assert one.get_slice(name).get_dtype() == other.get_slice(name).get_dtype()
    assert described.provenance["iterations"] == "6"
    assert path.stat().st_blocks * 512 < path.stat().st_size
