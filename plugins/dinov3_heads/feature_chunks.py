"""What a frozen backbone says of samples, kept: in memory, or in files that runs share.

Samples stand in *chunks*, so many that follow each other in the dataset. A chunk is one safetensors
file, written aside and renamed, or the same tensors in memory: there is a whole one or none. Files
are mapped into memory, so that a sample costs the reading of its own rows alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework import CorruptSampleError, DataError, HeadFeatures, Sample
from dinov3_framework.runtime.durable import no_room, open_file, parse_json, written_aside
from dinov3_heads.plain_targets import pack, unpack

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("maps", "cls", "storage")  # of HeadFeatures: those that are kept
_OPEN = 1024  # files that stay mapped
_CONTENT = "content"


@frozen(eq=False)
class StoredSample:
    """A backbone's features of one sample, and its transformed targets."""

    maps: Sequence[Tensor]  # [D, h, w]
    cls: Sequence[Tensor]  # [D]
    storage: Sequence[Tensor]  # [R, D]
    dtype: torch.dtype  # that they were computed in
    image_size: tuple[int, int]  # pixels, height and width
    targets: Mapping[str, Any]


@frozen(eq=False)
class Chunk:
    """Samples that follow each other in a dataset; rows are those that could be read.

    ``tensors`` are ``maps.N`` [rows, D, h, w], ``cls.N`` [rows, D] and ``storage.N`` [rows, R, D],
    and those of targets;
    ``content`` says the rest, as JSON holds it. Maps whose channels lie together are [rows, h, w,
    D]: convolutions sum another order of their input in another order, and give other bits.
    """

    tensors: Mapping[str, Tensor]
    content: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        features: HeadFeatures | None,
        samples: Mapping[int, Sample],
        corrupt: Mapping[int, CorruptSampleError],
        dtype: torch.dtype | None,
    ) -> Chunk:
        """``samples`` by index, a row each of ``features`` (None where there are no samples).

        Features are kept in ``dtype``, or in the one that they have. Raises ``DataError`` where
        that cannot hold them, and for targets of unknown types.
        """
        tensors: dict[str, Tensor] = {}
        content: dict[str, Any] = {
            "rows": list(samples),
            "corrupt": {str(index): [each.name, each.reason] for index, each in corrupt.items()},
            "targets": [
                {
                    name: pack(value, f"{index}.{name}", tensors)
                    for name, value in sample.targets.items()
                }
                for index, sample in samples.items()
            ],
        }
        if features is not None:
            found = {
                f"{part}.{number}": each
                for part in PARTS
                for number, each in enumerate(getattr(features, part))
            }
            last = [name for name, each in found.items() if each.ndim == 4 and each.stride(1) == 1]
            found |= {name: found[name].permute(0, 2, 3, 1) for name in last}
            computed = str(features.maps[0].dtype).removeprefix("torch.")
            content |= {"size": list(features.image_size), "last": last, "dtype": computed}
            for name, each in found.items():
                tensors[name] = _kept(name, each.detach()[: len(samples)], dtype)
        return cls(tensors, content)

    def __getitem__(self, index: int) -> StoredSample:
        """Of a sample of the dataset; ``CorruptSampleError`` for one that could not be read."""
        if (reason := self.content["corrupt"].get(str(index))) is not None:
            raise CorruptSampleError(*reason)
        row = self.content["rows"].index(index)
        height, width = self.content["size"]
        targets = self.content["targets"][row]
        return StoredSample(
            **{part: self._rows(part, row) for part in PARTS},
            dtype=getattr(torch, self.content["dtype"]),
            image_size=(height, width),
            targets={name: unpack(each, self.tensors) for name, each in targets.items()},
        )

    def _rows(self, kind: str, row: int) -> list[Tensor]:
        found: list[Tensor] = []
        while (name := f"{kind}.{len(found)}") in self.tensors:
            value = self.tensors[name][row]
            found.append(value.permute(2, 0, 1) if name in self.content["last"] else value)
        return found

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    # ------------------------------------------------------------------ bytes and files
    def to_bytes(self) -> bytes:
        from safetensors.torch import save

        metadata = {_CONTENT: json.dumps(self.content)}
        return save(dict(self.tensors), metadata)  # type: ignore[no-any-return]

    @classmethod
    def from_bytes(cls, data: bytes) -> Chunk:
        from safetensors.torch import load

        size = int.from_bytes(data[:8], "little")
        return cls._read(load(data), parse_json(data[8 : 8 + size])["__metadata__"])

    @classmethod
    def from_file(cls, path: Path) -> Chunk:
        """A chunk mapped into memory; ``ValueError`` or ``OSError`` for what is no whole one."""
        from safetensors import SafetensorError, safe_open

        open_file(path).close()
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls._read(tensors, file.metadata() or {})
        except (SafetensorError, LookupError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Chunk:
        return cls(tensors, parse_json(metadata[_CONTENT]))


def _kept(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    kept = value.to(dtype or value.dtype).contiguous().cpu()
    if dtype is not None and not bool(kept.isfinite().all()):
        raise DataError(
            f"features {name} are too large for {dtype}; set feature_dtype to bf16, or leave it out"
        )
    return kept


# --------------------------------------------------------------------------- stores
class ChunkStore:
    """The chunks of ``count`` samples, ``size`` in each, by their number."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._chunks: dict[int, Chunk] = {}

    @property
    def numbers(self) -> range:
        return range(-(-self.count // self.size))

    def indices(self, number: int) -> range:
        """The samples of a chunk."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def __getitem__(self, index: int) -> StoredSample:
        return self.chunk(index // self.size)[index]

    def chunk(self, number: int) -> Chunk:
        return self._chunks[number]

    def add(self, number: int, chunk: Chunk) -> None:
        self._chunks[number] = chunk

    def missing(self) -> list[int]:
        """The chunks that are not there yet."""
        return [number for number in self.numbers if number not in self._chunks]

    shared = False  # whether what one process adds is there for all


class ChunkFolder(ChunkStore):
    """The same in files of a folder, which other processes and later runs read."""

    shared = True

    def __init__(self, folder: Path, count: int, size: int) -> None:
        super().__init__(count, size)
        self.folder = folder
        self._opened = lru_cache(_OPEN)(Chunk.from_file)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08}.safetensors"

    def chunk(self, number: int) -> Chunk:
        path = self.path(number)
        try:
            return self._opened(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"features at {path} cannot be read: {error}\n    remove that file, and the run "
                "makes it again; with several machines the folder must be one that all of them see"
            ) from error

    def add(self, number: int, chunk: Chunk) -> None:
        path = self.path(number)
        try:
            with written_aside(path) as aside:
                aside.write_bytes(chunk.to_bytes())
        except OSError as error:
            reason = no_room(error.errno, path.parent) or str(error)
            raise DataError(f"features cannot be kept at {path}: {reason}") from error

    def missing(self) -> list[int]:
        return [number for number in self.numbers if not self._is_whole(self.path(number))]

    @staticmethod
    def _is_whole(path: Path) -> bool:
        try:
            Chunk.from_file(path)
        except (OSError, ValueError):
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {name: each for name, each in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__ |= state
        self._opened = lru_cache(_OPEN)(Chunk.from_file)
