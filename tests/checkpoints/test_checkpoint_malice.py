"""Nothing in a checkpoint is run, and nothing outside of it is read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dinov3_framework.checkpoints.manifest import FileRecord, Manifest
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.errors import CheckpointError

SHARD = "__0_0.distcp"


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def forge(path: Path, index: object) -> None:
    """Give a checkpoint another index and a manifest that vouches for it."""
    (path / ".metadata").write_bytes(pickle.dumps(index))
    manifest = Manifest.read(path)
    for name in ("manifest.json", "COMPLETE"):
        (path / name).unlink()
    record = FileRecord.of(path / ".metadata")
    Manifest(manifest.step, {**manifest.files, ".metadata": record}).write(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return CheckpointStore(tmp_path / "checkpoints").save(1, {"w": torch.ones(4)}, {})


def restore_only(checkpoint: Path) -> None:
    CheckpointStore(checkpoint.parent).restore({"w": torch.zeros(4)})


def test_an_index_cannot_run_code(tmp_path: Path, checkpoint: Path) -> None:
    target = tmp_path / "pwned"
    forge(checkpoint, Payload(target))
    with pytest.raises(CheckpointError, match=r"refused.*asks for posix.mkdir"):
        restore_only(checkpoint)
    assert not target.exists()
    with pytest.raises(Exception, match="NoneType"):
        FileSystemReader(checkpoint).read_metadata()
    assert target.exists()  # torch's own reader ran it: the payload is a real one


def test_an_index_cannot_run_code_from_within(tmp_path: Path, checkpoint: Path) -> None:
    index = FileSystemReader(checkpoint).read_metadata()
    index.planner_data = {"w": Payload(tmp_path / "pwned")}
    forge(checkpoint, index)
    with pytest.raises(CheckpointError, match="refused"):
        restore_only(checkpoint)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("elsewhere", ["../x", "/etc/passwd", "a/b", "..", "stranger.distcp"])
def test_shards_lie_in_the_checkpoint(checkpoint: Path, elsewhere: str) -> None:
    index = FileSystemReader(checkpoint).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = elsewhere
    for path in (checkpoint.parent / "x", checkpoint / "stranger.distcp"):
        path.write_bytes((checkpoint / SHARD).read_bytes())
    forge(checkpoint, index)
    with pytest.raises(CheckpointError, match=r"refused.*'w' lies"):
        restore_only(checkpoint)


def test_a_manifest_cannot_name_files_elsewhere(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text().replace(SHARD, "../x")
    (checkpoint / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "COMPLETE").write_text(f"dinov3 checkpoint 1\n{digest}\n")
    with pytest.raises(CheckpointError, match=r"'../x' is not a plain file name"):
        restore_only(checkpoint)


def test_items_are_tensors(checkpoint: Path) -> None:
    index = FileSystemReader(checkpoint).read_metadata()
    index.state_dict_metadata["w"] = BytesStorageMetadata()
    forge(checkpoint, index)
    with pytest.raises(CheckpointError, match=r"refused.*'w' is not a tensor"):
        restore_only(checkpoint)


def test_an_index_that_is_none(checkpoint: Path) -> None:
    for index in ({"a": 1}, 3, torch.Size([1])):
        forge(checkpoint, index)
        with pytest.raises(CheckpointError, match="refused"):
            restore_only(checkpoint)


def test_a_manifest_is_readable(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text())
    assert content["step"] == 1
    sha = hashlib.sha256((checkpoint / SHARD).read_bytes()).hexdigest()
    assert content["files"][SHARD]["sha256"] == sha
