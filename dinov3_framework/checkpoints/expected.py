"""Checkpoints that a run will leave, names and shapes alone, for checks of what reads them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dinov3_framework.checkpoints import CheckpointConfig
from dinov3_framework.checkpoints.manifest import STATE, FileRecord, Manifest
from dinov3_framework.checkpoints.shard_writer import INDEX
from dinov3_framework.runtime.durable import write_and_sync
from dinov3_framework.schedules import iterations_of


def kept_steps(iterations: int, config: CheckpointConfig, begun: int = 0) -> list[int]:
    """The steps whose checkpoints are there at the end, ascending."""
    every = iterations_of(config.every, iterations)
    first = begun // every + 1
    saved = [*range(first * every, iterations, every), iterations]
    kept = set(saved[-config.keep :])
    if config.keep_every is not None:
        kept.update(step for step in saved if step % config.keep_every == 0)
    return sorted(kept)


def write_index(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Any) -> None:
    """A checkpoint without shards: whoever wants a value finds that it lies nowhere."""
    folder.mkdir(parents=True)
    entries = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype),
            size=tensor.size(),
            chunks=[ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())],
        )
        for name, tensor in tensors.items()
    }
    index = Metadata(state_dict_metadata=entries, storage_data={})  # type: ignore[arg-type]
    write_and_sync(folder / INDEX, pickle.dumps(index))
    write_and_sync(folder / STATE, json.dumps(state).encode())
    files = {name: FileRecord.of(folder / name) for name in (INDEX, STATE)}
    Manifest(step, files).write(folder)
