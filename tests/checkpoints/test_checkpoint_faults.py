"""Checkpoints survive damage, full disks and killed processes."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import checkpoint_processes as processes
import pytest
import torch
import torch.multiprocessing as mp
from disks import small_disk

from dinov3_framework.checkpoints.manifest import FileRecord, Manifest
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.errors import CheckpointError

SHARD = "__0_0.distcp"
LOGGER = "dinov3_framework.checkpoints.store"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(count: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for index in range(count):
            data[(index + 1) * len(data) // (count + 1)] ^= 0x10
        path.write_bytes(data)

    return damage


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    ("manifest.json", pipe, "no regular file"),
    ("COMPLETE", pipe, "no regular file"),
    ("state.json", pipe, "bytes, the manifest says"),
    (SHARD, truncate, "bytes, the manifest says"),
    (SHARD, Path.unlink, "is missing"),
    (SHARD, flip(1), "SHA-256"),
    (SHARD, flip(4), "SHA-256"),
    (".metadata", truncate, "bytes, the manifest says"),
    (".metadata", Path.unlink, "is missing"),
    (".metadata", flip(1), "SHA-256"),
    ("state.json", flip(1), "SHA-256"),
    ("manifest.json", flip(2), "SHA-256"),
    ("manifest.json", Path.unlink, "is missing"),
    ("COMPLETE", Path.unlink, "is missing"),
    ("COMPLETE", truncate, "COMPLETE"),
]


@pytest.mark.parametrize(("file", "damage", "reason"), DAMAGES)
def test_damage_means_the_checkpoint_before(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"w": torch.full((3, 4), float(step))}, {"value": step})
    damage(tmp_path / "step_00000002" / file)
    tensors = {"w": torch.zeros(3, 4)}
    with caplog.at_level(logging.WARNING, LOGGER):
        restored = CheckpointStore(tmp_path).restore(tensors)
    assert restored is not None
    assert (restored.step, restored.state) == (1, {"value": 1})
    assert tensors["w"].tolist() == [[1.0] * 4] * 3
    [warning] = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert "step_00000002" in warning
    assert file in warning
    assert reason in warning

    damage(tmp_path / "step_00000001" / file)
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(tmp_path).restore({"w": torch.zeros(3, 4)})
    for part in ("step_00000002 is damaged", "step_00000001 is damaged", reason):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"[" * 100_000])
def test_a_state_that_is_no_table_though_its_hash_is_right(tmp_path: Path, content: bytes) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"w": torch.full((3, 4), float(step))}, {"value": step})

    def rewrite(folder: Path) -> None:
        manifest = Manifest.read(folder)
        for name in ("state.json", "manifest.json", "COMPLETE"):
            (folder / name).unlink()
        (folder / "state.json").write_bytes(content)
        record = FileRecord.of(folder / "state.json")
        Manifest(manifest.step, {**manifest.files, "state.json": record}).write(folder)

    rewrite(tmp_path / "step_00000002")
    tensors = {"w": torch.zeros(3, 4)}
    assert CheckpointStore(tmp_path).peek() == {"value": 1}
    assert CheckpointStore(tmp_path).restore(tensors).step == 1  # type: ignore[union-attr]
    assert (tensors["w"] == 1).all()
    rewrite(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match=r"step_00000001 is damaged: state.json: is malf"):
        CheckpointStore(tmp_path).restore(tensors)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_alone_would_not_notice_flipped_bytes(tmp_path: Path) -> None:
    """What the manifest is for: if this fails, torch has learnt to check."""
    import torch.distributed.checkpoint as dcp

    path = CheckpointStore(tmp_path).save(1, {"w": torch.ones(1000)}, {})
    data = (path / SHARD).read_bytes()
    place = data.index(torch.ones(1000).numpy().tobytes())
    (path / SHARD).write_bytes(data[: place + 2] + b"\x00" + data[place + 3 :])
    loaded = {"w": torch.zeros(1000)}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert loaded["w"][0] != 1


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        store.save(step, {"w": torch.ones(8)}, {})
    flip(1)(tmp_path / "step_00000020" / SHARD)
    assert store.restore({"w": torch.zeros(8)}).step == 10  # type: ignore[union-attr]
    store.save(15, {"w": torch.ones(8)}, {})
    assert store.steps() == [10, 15, 20]
    store.save(25, {"w": torch.ones(8)}, {})
    assert store.steps() == [15, 25]


def test_a_newer_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"w": torch.ones(2)}, {})
    marker = tmp_path / "step_00000002" / "COMPLETE"
    marker.write_text(marker.read_text().replace("checkpoint 1\n", "checkpoint 2\n"))
    with pytest.raises(CheckpointError, match=r"format 2 .* reads format 1"):
        store.restore({"w": torch.zeros(2)})


def test_shares_cover_all_files_evenly() -> None:
    sizes = {f"f{n}": FileRecord(size, "") for n, size in enumerate([90, 10, 50, 40, 30, 20, 60])}
    shares = [Manifest(1, sizes).share(rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert {sum(sizes[name].bytes for name in share) for share in shares} <= {90, 100, 110}


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_disk_full(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder, kind):
        store = CheckpointStore(folder, keep=1)
        store.save(1, {"w": torch.ones(100_000)}, {})
        with pytest.raises(CheckpointError) as error:
            store.save(2, {"w": torch.ones(1_000_000)}, {})
        for part in ("disk full", str(folder), "MiB free", "step 1 is untouched"):
            assert part in str(error.value)
        assert names_in(folder) == ["step_00000001"]
        tensors = {"w": torch.zeros(100_000)}
        assert store.restore(tensors).step == 1  # type: ignore[union-attr]
        assert tensors["w"].all()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save the checkpoint of step 1"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, {"w": torch.ones(1)}, {})


def test_killed_while_saving(tmp_path: Path) -> None:
    process = mp.get_context("spawn").Process(target=processes.save_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = [name for name in names_in(tmp_path) if name.startswith(".saving-step_00000002")]
    assert len(left) == 1
    assert SHARD in names_in(tmp_path / left[0])

    store = CheckpointStore(tmp_path)
    tensors = {"w": torch.zeros(1000)}
    assert store.restore(tensors).state == {"step": 1}  # type: ignore[union-attr]
    assert tensors["w"].all()
    assert left[0] in names_in(tmp_path)  # reading removes nothing
    store.save(3, {"w": torch.ones(1000)}, {})
    assert names_in(tmp_path) == ["step_00000001", "step_00000003"]
