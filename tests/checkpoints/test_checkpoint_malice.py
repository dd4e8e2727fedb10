"""Nothing in a checkpoint is run, and nothing outside of it is read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dinov3_framework.checkpoints.manifest import FileRecord, Manifest
from dinov3_framework.checkpoints.safe_reader import SafeReader
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


ALLOWED = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
    pathlib.PosixPath,
    torch.Size,
    torch.serialization._get_layout,
)


def built(target: object, state: object) -> bytes:
    """A pickle that names ``target``, sets ``state`` on it, and then asks for what is refused."""
    code = io.BytesIO()
    code.write(pickle.PROTO + b"\x02")
    code.write(pickle.GLOBAL + f"{target.__module__}\n{target.__name__}\n".encode())
    code.write(pickle.dumps(state, 2)[2:-1])
    code.write(pickle.BUILD + pickle.GLOBAL + b"os\nmkdir\n" + pickle.STOP)
    return code.getvalue()


@pytest.mark.parametrize("target", ALLOWED, ids=lambda target: target.__name__)
@pytest.mark.parametrize("state", [{"marker": 1}, (None, {"marker": 1})], ids=["state", "slots"])
def test_a_refused_index_leaves_the_process_as_it_was(
    tmp_path: Path, target: object, state: object
) -> None:
    (tmp_path / ".metadata").write_bytes(built(target, state))
    before = dict(vars(target))
    with pytest.raises(CheckpointError, match="refused"):
        SafeReader(tmp_path, ["x"])
    assert dict(vars(target)) == before
    assert not hasattr(target, "marker")
    # What the file does is real: an unpickler that may build these classes marks them.
    if target is metadata.StorageMeta:
        with suppress(Exception):
            pickle.loads(built(target, state))
        assert hasattr(target, "marker") is isinstance(state, tuple)
        if hasattr(target, "marker"):
            del target.marker


@pytest.mark.parametrize(
    "code",
    [
        pickle.PROTO + b"\x04" + pickle.NONE + b"r\x00\x00\x01\x00" + pickle.STOP,
        pickle.PROTO + b"\x04" + pickle.NONE + b"p65536\n" + pickle.STOP,
        pickle.PROTO + b"\x04" + b"\x8d" + (1 << 20).to_bytes(8, "little") + pickle.STOP,
        pickle.PROTO + b"\x04" + b"\x82\x01" + pickle.STOP,
        pickle.PROTO + b"\x04" + b"P1\n" + pickle.STOP,
        pickle.PROTO + b"\x04" + b"(" * 1000,
        b"",
    ],
    ids=[
        "large memo",
        "large memo in text",
        "large string",
        "extension",
        "persistent",
        "open",
        "empty",
    ],
)
def test_instructions_that_no_index_has_are_not_followed(tmp_path: Path, code: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match="refused"):
        SafeReader(tmp_path, [])


def test_a_tensor_is_no_larger_than_what_is_stored(checkpoint: Path) -> None:
    index = FileSystemReader(checkpoint).read_metadata()
    entry = index.state_dict_metadata["w"]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 50])
    forge(checkpoint, index)
    with pytest.raises(CheckpointError, match="larger than what is stored"):
        CheckpointStore(checkpoint.parent).read()
