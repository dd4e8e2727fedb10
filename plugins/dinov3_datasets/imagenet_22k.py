"""ImageNet-22k (Deng et al. 2009) as it is published, a tar for each class, read where it lies.

Names, fields and types of the index are those of the reference (facebookresearch/dinov3,
data/datasets/image_net_22k.py), so that index files of either are read by the other.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_datasets.file_stamps import files_stamp
from dinov3_datasets.imagenet_configs import Imagenet22kConfig
from dinov3_datasets.index_arrays import (
    Progress,
    check_class_ids,
    data_folder,
    in_chunks,
    index_command,
    load_array,
    save_array,
)
from dinov3_datasets.tar_index import BLOCK, Members, read_block_log, read_members
from dinov3_framework import CorruptSampleError, DataError, Dataset, Sample, Target
from dinov3_framework.data.pictures import decode_image
from dinov3_framework.errors import first_few

log = logging.getLogger("dinov3_framework.datasets")

_FIELDS = {
    "class_index": "u", "class_id": "U", "start_offset": "u", "end_offset": "u", "filename": "U",
}  # fmt: skip
_THREADS = 16
_NO_IMAGE = "n06470073_47249.JPEG"  # the reference leaves it out
_LARGEST = 1 << 29  # bytes of an image that is compressed once more
_HOLDS = "the tar files, n00004475.tar and so on"


class Imagenet22k(Dataset):
    """All images of some tar files, uint8 [channels, H, W] each of its own size, with labels.

    Raises ``DataError`` for an index that is missing, damaged, or does not fit the tar files.
    """

    def __init__(self, config: Imagenet22kConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        self.root = data_folder("imagenet_22k", config.root, _HOLDS)
        self.ids = self._read_ids()
        self.targets = {"label": Target("class", classes=self.ids)}
        self.count = len(self._entries)
        self._files = OpenFiles(config.open_tars)
        self._check_tars(self._last_bytes())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        label = self.label(index)
        image = decode_image(
            self._content(index), self.name(index), self.channels, self.config.max_pixels
        )
        return Sample(image, {"label": label})

    def label(self, index: int) -> int:
        """The label, without reading the image."""
        return int(self._entries["class_index"][index])

    def name(self, index: int) -> str:
        return f"{self.ids[self.label(index)]}/{self._entries['filename'][index]}"

    def describe(self) -> str:
        return f"imagenet_22k {self.root}: {len(self):,} images, {len(self.ids):,} classes"

    def digest(self) -> str:
        return f"{len(self):,} images, their places and labels {self._digest}"

    def version(self) -> str:
        stamp = files_stamp(self.root, (f"{each}.tar" for each in self.ids))
        return f"{self.digest()}; at most {self.config.max_pixels} pixels, tar files {stamp}"

    @cached_property
    def _digest(self) -> str:
        found = hashlib.sha256("\n".join(self.ids).encode())
        for rows in in_chunks(self._entries):
            found.update(np.ascontiguousarray(rows).view(np.uint8).data)
        return found.hexdigest()[:16]

    # ------------------------------------------------------------------ reading
    def _content(self, index: int) -> bytes:
        """The bytes of an image file; raises ``CorruptSampleError``."""
        name, row = self.name(index), self._entries[index]
        start, end, filename = int(row["start_offset"]), int(row["end_offset"]), row["filename"]
        try:
            tar = self._files.get(self._tar(self.ids[row["class_index"]]))
            # Not mapped: of a map, a disk's error or a file that shrank ends the process.
            region = os.pread(tar, end - start, start)
            member = tarfile.TarInfo.frombuf(region[:BLOCK], "utf-8", "surrogateescape")
        except OSError as error:
            raise CorruptSampleError(name, error.strerror or str(error)) from error
        except tarfile.HeaderError as error:
            raise CorruptSampleError(
                name, f"{error} at byte {start:,} of its tar, which its index is not of"
            ) from error
        is_short = len(filename.encode("utf-8", "surrogateescape")) <= 100
        if is_short and member.name != filename:
            raise CorruptSampleError(name, f"its tar has {member.name} in its place")
        if len(region) - BLOCK < member.size:
            raise CorruptSampleError(name, "its tar, or its entry in the index, is cut off")
        content = region[BLOCK : BLOCK + member.size]
        return _decompressed(content, name) if content[:2] == b"\x1f\x8b" else content

    def _tar(self, class_id: str) -> Path:
        return self.root / f"{class_id}.tar"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_entries"}

    # ------------------------------------------------------------------ opening
    @cached_property
    def _entries(self) -> np.ndarray:
        """The table of all images, mapped anew in each process that is not forked."""
        return load_array(_extra(self.config) / "entries.npy", _FIELDS, self._mend())

    def _read_ids(self) -> tuple[str, ...]:
        path = _extra(self.config) / "class-ids.npy"
        ids = tuple(map(str, load_array(path, None, self._mend(path.exists()))))
        check_class_ids(ids, path, self._mend())
        return ids

    def _mend(self, replace: bool = True) -> str:
        what = "writes the index anew" if replace else "writes it"
        return f"{_command(self.config, replace)} {what}"

    def _last_bytes(self) -> np.ndarray:
        """Bytes that each class's tar must have, int64; checks the table on the way."""
        path, mend = _extra(self.config) / "entries.npy", self._mend()
        known, counts = np.array(self.ids), np.zeros(len(self.ids), np.int64)
        ends = np.zeros(len(self.ids), np.int64)
        for rows in in_chunks(self._entries):
            labels = rows["class_index"]
            if (most := int(labels.max())) >= len(known):
                raise DataError(
                    f"{path}: labels out of range: {most} where there are {len(known):,} classes, "
                    f"of 0 to {len(known) - 1:,}\n    {mend}"
                )
            if (known[labels] != rows["class_id"]).any():
                raise DataError(
                    f"{path} gives classes other ids than class-ids.npy: they are of two indexes"
                    f"\n    {mend}"
                )
            if (rows["end_offset"].astype(np.int64) - rows["start_offset"] < BLOCK).any():
                raise DataError(f"{path} has images that end before they begin\n    {mend}")
            counts += np.bincount(labels, minlength=len(known))
            np.maximum.at(ends, labels, rows["end_offset"].astype(np.int64))
        if empty := [self.ids[label] for label in np.flatnonzero(counts == 0)]:
            raise DataError(
                f"{path}: {len(empty):,} classes have no image: {first_few(empty)}\n    {mend}"
            )
        return ends

    def _check_tars(self, ends: np.ndarray) -> None:
        """Raise ``DataError`` for tar files that are missing, or shorter than the index says."""
        sizes = _in_threads(_size, [self._tar(each) for each in self.ids])
        if absent := [
            f"{each}.tar" for each, size in zip(self.ids, sizes, strict=True) if not size
        ]:
            raise DataError(
                f"imagenet_22k: {self.root} lacks {len(absent):,} of {len(self.ids):,} tar files: "
                f"{first_few(absent)}\n    fetch them, or {self._mend()}"
            )
        short = [each for each, size, end in zip(self.ids, sizes, ends, strict=True) if size < end]
        if short:
            raise DataError(
                f"{first_few([str(self._tar(each)) for each in short])}: cut off, its index goes "
                f"further\n    fetch it again; if the index is of other files, {self._mend()}"
            )

    # ------------------------------------------------------------------ the index
    @staticmethod
    def index_files(config: Imagenet22kConfig) -> list[Path]:
        """The files that :meth:`write_index` writes; raises ``DataError`` without the folder."""
        data_folder("imagenet_22k", config.root, _HOLDS)
        return [_extra(config) / name for name in ("class-ids.npy", "entries.npy")]

    @staticmethod
    def write_index(config: Imagenet22kConfig, progress: Progress | None = None) -> list[Path]:
        """Read where the members of all tar files lie and write the index, each file whole.

        ``progress`` is called with tar files done and in all. A tar whose output of ``tar -tRf``
        lies in blocks below the root, as in the published layout, is not read itself. Raises
        ``DataError`` for tar files that are damaged or empty.
        """
        root = data_folder("imagenet_22k", config.root, _HOLDS)
        ids = sorted(path.stem for path in root.glob("*.tar") if not path.name.startswith("."))
        if not ids:
            raise DataError(f"imagenet_22k: no tar files in {root}\n    root holds {_HOLDS}")
        check_class_ids(tuple(ids), root, "rename the file")
        members = _in_threads(lambda each: _members(root, each), ids, progress)
        if empty := [f"{each}.tar" for each, found in zip(ids, members, strict=True) if not found]:
            raise DataError(f"imagenet_22k: {first_few(empty)} in {root}: no image in it")
        entries = _entries_of(ids, [found for found in members if found is not None])
        logs = sum((root / "blocks" / f"{each}.log").exists() for each in ids)
        log.info(
            "%s: %s images of %s classes, %s of them by their logs in blocks",
            root, f"{len(entries):,}", f"{len(ids):,}", f"{logs:,}",
        )  # fmt: skip
        paths = Imagenet22k.index_files(config)
        for path, array in zip(paths, (np.array(ids), entries), strict=True):
            save_array(path, array)
        return paths


class OpenFiles:
    """Descriptors of the files that were read last; of each process its own once pickled."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: OrderedDict[Path, int] = OrderedDict()

    def get(self, path: Path) -> int:
        """A descriptor to read from by position, so that forks may share it."""
        if path not in self._open:
            while len(self._open) >= self.most:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return self._open[path]

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return type(self), (self.most,)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _in_threads(
    function: Any, values: Sequence[Any], progress: Progress | None = None
) -> list[Any]:
    """``function`` of each value, in their order."""
    pool, results = ThreadPoolExecutor(_THREADS), []
    try:
        for job in [pool.submit(function, value) for value in values]:
            results.append(job.result())
            if progress is not None:
                progress(len(results), len(values))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _size(path: Path) -> int:
    """Bytes of a file; 0 if there is none that can be read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _members(root: Path, class_id: str) -> Members | None:
    """The images of a class; None if there are none."""
    tar, block_log = root / f"{class_id}.tar", root / "blocks" / f"{class_id}.log"
    found = read_block_log(block_log, tar) if block_log.exists() else read_members(tar)
    found = found.without(_NO_IMAGE)
    if len(found.ends) and found.ends[-1] > np.iinfo(np.uint32).max:
        raise DataError(f"{tar} has over 4 GiB, more than the index can hold; split it")
    return found if found.names else None


def _entries_of(ids: Sequence[str], members: Sequence[Members]) -> np.ndarray:
    """The index, a row an image, as the reference writes it."""
    dtype = np.dtype(
        [
            ("class_index", "<u4"),
            ("class_id", f"<U{max(map(len, ids))}"),
            ("start_offset", "<u4"),
            ("end_offset", "<u4"),
            ("filename", f"<U{max(len(name) for each in members for name in each.names)}"),
        ]
    )
    entries = np.empty(sum(len(each.names) for each in members), dtype)
    start = 0
    for label, (class_id, found) in enumerate(zip(ids, members, strict=True)):
        rows = entries[start : start + len(found.names)]
        rows["class_index"], rows["class_id"] = label, class_id
        rows["start_offset"], rows["end_offset"] = found.starts, found.ends
        rows["filename"] = found.names
        start += len(rows)
    return entries


def _decompressed(content: bytes, name: str) -> bytes:
    """What a gzip file holds; some images of ImageNet-22k are compressed once more."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            found = file.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptSampleError(name, f"is gzip, which is damaged: {error}") from error
    if len(found) > _LARGEST:
        raise CorruptSampleError(name, f"is gzip of more than {_LARGEST:,} bytes")
    return found


def _extra(config: Imagenet22kConfig) -> Path:
    return Path(config.extra or f"{config.root}/extra").expanduser()


def _command(config: Imagenet22kConfig, replace: bool = False) -> str:
    values = {"root": config.root, "extra": config.extra}
    return index_command("imagenet_22k", values, replace)
