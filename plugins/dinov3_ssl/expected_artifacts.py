"""What a training run will leave, without the values: for the checks of what is to start from it.

Checkpoints have their index and no shards; in place of the exported file there is such a checkpoint
of the backbone alone.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
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
from dinov3_framework.checkpoints.folder import name_of
from dinov3_framework.checkpoints.manifest import STATE, FileRecord, Manifest
from dinov3_framework.checkpoints.shard_writer import INDEX
from dinov3_framework.parallel.sharder import tensors_of
from dinov3_framework.recipes.compose import to_toml
from dinov3_framework.recipes.structure import unstructure
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.durable import write_and_sync
from dinov3_framework.training.optimizer import MOMENTS, parameter_settings
from dinov3_framework.weights.info import BackboneInfo
from dinov3_framework.weights.locations import EXPORT, RECIPE
from dinov3_ssl.configs import TrainingConfig, resolved_backbone
from dinov3_ssl.preflight import Parts


def write_stand_in(
    folder: Path, config: TrainingConfig, parts: Parts, registry: Registry, begun: int = 0
) -> None:
    """Write recipe, checkpoints and export of a finished run into ``folder``.

    ``begun`` is the iteration that the run goes on after.
    """
    (folder / RECIPE).write_text(to_toml(unstructure(registry, config)), "utf-8")
    tensors = dict(_state(config, parts))
    for step in kept_steps(config.iterations, config.checkpoint, begun):
        place = folder / "checkpoints" / name_of(step)
        _write_index(place, step, tensors, {"iterations": config.iterations})
    component, values = registry.values_of(resolved_backbone(config))
    size = parts.augmentation.views["global"].size
    info = BackboneInfo(component, values, config.images, size, {"network": "teacher"})
    # Whole files are mapped into memory when they are opened, and this one may be larger.
    backbone = parts.blueprint.backbone.state_dict()
    _write_index(folder / EXPORT, config.iterations, backbone, {"backbone": info.to_metadata()})


def kept_steps(iterations: int, config: CheckpointConfig, begun: int = 0) -> list[int]:
    """The steps whose checkpoints are there at the end, ascending."""
    first = begun // config.every + 1
    saved = [*range(first * config.every, iterations, config.every), iterations]
    kept = set(saved[-config.keep :])
    if config.keep_every is not None:
        kept.update(step for step in saved if step % config.keep_every == 0)
    return sorted(kept)


def _state(config: TrainingConfig, parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, on the meta device."""
    student = parts.blueprint.student()
    networks = {"student": student, "teacher": student}
    anchors = {
        f"anchors.{name}": parts.blueprint.anchor_backbone(name) for name in parts.blueprint.anchors
    }
    for role, network in (networks | anchors).items():
        for name, tensor in tensors_of(network):
            yield f"{role}.{name}", tensor
    for called, loss in parts.losses.items():
        for name, buffer in loss.named_buffers():
            yield f"losses.{called}.{name}", buffer
    optimizer = config.optimizer
    for part, module in student.items():
        parameters = dict(module.named_parameters())
        settings = parameter_settings(
            module,
            layerwise_decay=optimizer.layerwise_decay,
            patch_embed_lr_mult=optimizer.patch_embed_lr_mult,
        )
        for name in settings:
            prefix = f"optimizer.{part}.{name}"
            for moment in MOMENTS:
                own = parameters[name]
                yield f"{prefix}.{moment}", own.new_empty(()) if moment == "step" else own


def _write_index(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Any) -> None:
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
