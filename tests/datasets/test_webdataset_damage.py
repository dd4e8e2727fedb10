"""Shards that are damaged, cut off or meant to do harm."""

from __future__ import annotations

import itertools
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from archive_support import (
    first,
    gray,
    indexed,
    picture,
    stream,
    write_shards,
    write_tar,
)

from dinov3_framework import CorruptSampleError, DataError, Sample


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven, nine and five samples, each of a gray value of its own."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [7, 9, 5])
    return folder


def test_names_and_links_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(7))
    members: list[Any] = [("../secret.jpg", picture(50)), (str(secret), picture(60))]
    for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE)):
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, str(secret)
        members.append((link, b""))
    for name, kind in (("c.jpg", tarfile.CHRTYPE), ("d.jpg", tarfile.FIFOTYPE)):
        device = tarfile.TarInfo(name)
        device.type = kind
        members.append((device, b""))
    members.append(("e\x1b[2J.jpg", picture(70)[:50]))
    shard = write_tar(tmp_path / "shards" / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    dataset = indexed(shard)
    assert [gray(dataset[index]) for index in range(2)] == [50, 60]
    assert len(dataset) == 3
    with pytest.raises(CorruptSampleError) as caught:
        dataset[2]
    assert "\x1b" not in str(caught.value)
    assert "4 links, folders or devices passed over" in dataset.notes()
    assert sorted({gray(each) for each, _ in first(stream(shard), 3)[:3] if _ok(each)}) == [50, 60]
    assert sorted(tmp_path.rglob("*")) == before


def _ok(sample: Any) -> bool:
    return isinstance(sample, Sample)


@pytest.mark.parametrize("kept", [0.3, 0.62, 0.9])
def test_a_shard_that_is_cut_off(shards: Path, tmp_path: Path, kept: float) -> None:
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "train-001.tar"
    content = cut.read_bytes()[: -9 * 512]  # of the ending, too, there is something
    cut.write_bytes(content[: int(len(content) * kept) // 512 * 512 + 77])
    for build in (indexed, stream):
        with pytest.raises(DataError, match=r"train-001\.tar is cut off within .*\n.*again"):
            build(tmp_path)


def test_a_shard_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path, [8])
    [path] = tmp_path.iterdir()
    sequential, random = stream(tmp_path, shuffle=2), indexed(tmp_path)
    samples = sequential.open(part=0, parts=1, seed=0)
    next(samples)
    opened = indexed(tmp_path)
    opened[0]
    os.truncate(path, path.stat().st_size // 2)
    for read in (lambda: list(itertools.islice(samples, 8)), lambda: random[7]):
        with pytest.raises(DataError, match=r"train-000\.tar had .* bytes when this run began"):
            read()
    with pytest.raises(DataError, match=r"train-000\.tar is cut off: byte .* is missing"):
        opened[7]


def test_an_ending_without_zeros_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path, [3])
    [path] = tmp_path.iterdir()
    os.truncate(path, len(path.read_bytes().rstrip(b"\0")) // 512 * 512 + 512)
    assert len(indexed(tmp_path)) == 3
    assert "is it whole?" in indexed(tmp_path).notes()[0]
    stream(tmp_path)
    assert "is it whole?" in caplog.text


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    """tarfile itself takes it for the end of the archive, and says nothing."""
    write_shards(tmp_path, [8])
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(b"part/00_0005.png")] ^= 1
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 20
    with pytest.raises(DataError, match=r"train-000\.tar is damaged: no header at byte"):
        indexed(tmp_path)
    with pytest.raises(DataError, match=r"train-000\.tar is damaged"):
        first(stream(tmp_path), 8)


def test_archives_one_after_another_are_not_half_read(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4])
    one, other = sorted(tmp_path.iterdir())
    one.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(DataError, match=r"train-000\.tar goes on after the end of its archive"):
        indexed(tmp_path)
    with pytest.raises(DataError, match="goes on after the end"):
        first(stream(tmp_path), 8)


def test_declared_sizes_are_not_believed(tmp_path: Path) -> None:
    for size in (2**40, 8**11 - 1):
        info = tarfile.TarInfo("a.jpg")
        info.size = size
        write_raw(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT) + picture(1))
        with pytest.raises(DataError, match=r"a\.tar is cut off within 'a\.jpg'"):
            indexed(tmp_path)
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("a.jpg")
        info.type, info.size = kind, 2**40
        write_raw(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT) + picture(1))
        with pytest.raises(DataError, match=r"a\.tar is no tar file: a header declares"):
            indexed(tmp_path)
    info = tarfile.TarInfo("b.jpg")
    info.size = -1024  # would lead back to where it came from
    write_raw(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match="its size or name is impossible"):
        indexed(tmp_path)


def write_raw(path: Path, content: bytes) -> None:
    path.write_bytes(content.ljust(4096, b"\0") + bytes(1024))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is an empty file"),
        (b"\x1f\x8b" + bytes(600), "is compressed"),
        (b"hello " * 200, "is no tar file"),
        (bytes(10240), "there are no samples"),
    ],
)
def test_files_that_are_no_shards(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    for build in (indexed, stream):
        with pytest.raises(DataError, match=complaint):
            build(tmp_path)
