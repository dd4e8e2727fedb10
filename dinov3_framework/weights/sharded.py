"""Backbones in sharded checkpoints, as a source of weights like any file.

Tensors are read one at a time: a checkpoint may be far larger than the memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from dinov3_framework.checkpoints.folder import CheckpointFolder
from dinov3_framework.checkpoints.manifest import MARKER, STATE, Damage, Manifest
from dinov3_framework.checkpoints.safe_reader import SafeReader
from dinov3_framework.checkpoints.shard_writer import INDEX
from dinov3_framework.checkpoints.shards import read_whole
from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import CheckpointError

log = logging.getLogger(__name__)


@frozen
class ShardedSource:
    """A checkpoint's tensors; a ``recognition.Opened``."""

    path: Path
    kind: str
    _reader: SafeReader = field(repr=False)
    shapes: Mapping[str, Shape] = field(repr=False)
    settings: Mapping[str, Any] = field(factory=dict)
    preprocessor: Mapping[str, Any] = field(factory=dict)
    metadata: Mapping[str, str] = field(factory=dict)

    @classmethod
    def of(
        cls, path: Path, kind: str, reader: SafeReader, metadata: Mapping[str, str]
    ) -> ShardedSource:
        shapes = {name: tuple(entry.size) for name, entry in reader.tensors().items()}
        return cls(path, kind, reader, shapes, metadata=metadata)

    def read(self, name: str) -> Tensor:
        entry = self._reader.tensors()[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        read_whole(self._reader, {name: tensor})
        return tensor


def checkpoint_in(path: Path) -> Path | None:
    """The folder of checkpoints that a path means: itself, a run's, or that of one checkpoint."""
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and CheckpointFolder(folder).newest_first():
            return folder
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one sharded checkpoint, ours or another's."""
    return (path / INDEX).is_file()


def newest(folder: Path, thorough: bool = True) -> ShardedSource:
    """The newest sound checkpoint in a folder of them; damaged ones are passed over, aloud.

    Every file is compared with its hash, or, if not ``thorough``, those that no tensor lies in.
    """
    troubles = []
    for path in CheckpointFolder(folder).newest_first():
        try:
            return _own(path, thorough)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            troubles.append(str(error))
    raise CheckpointError("\n  ".join([f"no checkpoint in {folder} can be used:", *troubles]))


def one(path: Path, thorough: bool = True) -> ShardedSource:
    """One sharded checkpoint: this framework's, verified, or another's, tensors alone."""
    return _own(path, thorough) if (path / MARKER).is_file() else _foreign(path)


def _own(path: Path, thorough: bool) -> ShardedSource:
    try:
        manifest = Manifest.read(path)
    except Damage as damage:
        raise CheckpointError(f"{path} is damaged: {damage}") from damage
    damages = manifest.damages(path, manifest.files if thorough else [INDEX, STATE])
    if damages:
        raise CheckpointError(f"{path} is damaged: {'; '.join(damages)}")
    kind = "a sharded checkpoint of dinov3_framework"
    # A run's recipe says what its checkpoints hold; one that stands alone says it by itself.
    metadata = json.loads((path / STATE).read_bytes()).get("backbone", {})
    return ShardedSource.of(path, kind, SafeReader(path, manifest.files), metadata)


def _foreign(path: Path) -> ShardedSource:
    files = {each.name for each in path.iterdir() if each.is_file()}
    kind = "a sharded checkpoint of torch.distributed"
    return ShardedSource.of(path, kind, SafeReader(path, files, foreign=True), {})
