"""Sharded checkpoints, opened as weights like any file.

Tensors are read one at a time: a checkpoint may be far larger than the memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov3_framework.checkpoints.folder import CheckpointFolder
from dinov3_framework.checkpoints.manifest import MARKER, STATE, Damage, Manifest, parse_state
from dinov3_framework.checkpoints.safe_reader import SafeReader
from dinov3_framework.checkpoints.shard_writer import INDEX
from dinov3_framework.checkpoints.shards import read_whole
from dinov3_framework.errors import CheckpointError
from dinov3_framework.runtime.durable import read_file
from dinov3_framework.weights._files import OpenWeights, StoredTensor

log = logging.getLogger(__name__)


def checkpoint_in(path: Path) -> Path | None:
    """The folder of checkpoints that a path means: itself, a run's, or that of one checkpoint."""
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and CheckpointFolder(folder).newest_first():
            return folder
    return None


def numbered_in(path: Path) -> Path | None:
    """The newest of the checkpoints in a folder of them, named by numbers alone."""
    found = [each for each in path.iterdir() if each.name.isdecimal() and is_checkpoint(each)]
    return max(found, key=lambda each: int(each.name), default=None)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one sharded checkpoint, ours or another's."""
    return (path / INDEX).is_file()


def open_newest(folder: Path, kind: str = "backbone", thorough: bool = True) -> OpenWeights:
    """Open the newest sound checkpoint in a folder of them; damaged ones are skipped and logged.

    Every file is compared with its hash, or, if not ``thorough``, those that no tensor lies in.
    """
    troubles = []
    for path in CheckpointFolder(folder).newest_first():
        try:
            return _open_own(path, kind, thorough)
        except CheckpointError as error:
            log.warning("skipping a checkpoint: %s", error)
            troubles.append(str(error))
    raise CheckpointError("\n  ".join([f"no checkpoint in {folder} can be used:", *troubles]))


def open_checkpoint(path: Path, kind: str = "backbone", thorough: bool = True) -> OpenWeights:
    """Open one sharded checkpoint: this framework's, verified, or another's, its tensors alone."""
    if (path / MARKER).is_file():
        return _open_own(path, kind, thorough)
    files = {each.name for each in path.iterdir() if each.is_file()}
    reader = SafeReader(path, files, foreign=True)
    return _opened(path, "a sharded checkpoint of torch.distributed", reader, {})


def _open_own(path: Path, kind: str, thorough: bool) -> OpenWeights:
    try:
        manifest = Manifest.read(path)
    except Damage as damage:
        raise CheckpointError(f"{path} is damaged: {damage}") from damage
    damages = manifest.damages(path, manifest.files if thorough else [INDEX, STATE])
    if damages:
        raise CheckpointError(f"{path} is damaged: {'; '.join(damages)}")
    try:
        # A run's recipe says what its checkpoints hold; one that stands alone says it by itself.
        metadata = parse_state(read_file(path / STATE)).get(kind, {})
    except Damage as damage:
        raise CheckpointError(f"{path} is damaged: {damage}") from damage
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is damaged: {STATE}: its {kind!r} is no table")
    reader = SafeReader(path, manifest.files)
    return _opened(path, "a sharded checkpoint of dinov3_framework", reader, metadata)


def _opened(
    path: Path, description: str, reader: SafeReader, metadata: Mapping[str, str]
) -> OpenWeights:
    tensors = {
        name: StoredTensor(tuple(entry.size), partial(_read, reader, name, entry))
        for name, entry in reader.tensors().items()
    }
    return OpenWeights(path, description, tensors, metadata=metadata)


def _read(reader: SafeReader, name: str, entry: TensorStorageMetadata) -> Tensor:
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    read_whole(reader, {name: tensor})
    return tensor
