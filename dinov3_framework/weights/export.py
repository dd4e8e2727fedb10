"""Write a backbone as a file of its own, whole or gathered from many processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.parallel.state_dicts import full_tensors, official_name
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, run_on_all_ranks
from dinov3_framework.runtime.durable import no_room, written_aside
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.tensor_file import write_tensor_file
from dinov3_framework.weights.tensors import not_finite


def export_backbone(
    path: Path,
    backbone_state: Mapping[str, Tensor],
    *,
    component: str,
    config: Mapping[str, Any],
    images: ImagesConfig,
    size: int,
    provenance: Mapping[str, str],
) -> None:
    """Write a backbone as one safetensors file that :func:`load_backbone` loads on its own.

    ``backbone_state`` holds whole tensors under their official names, on any device; ``component``
    and ``config`` (plain values) are what builds the backbone; ``images`` and ``size`` (pixels)
    what it was trained on; ``provenance`` anything worth knowing of its making. To be called by
    one process. The same input gives the same bytes. Raises ``CheckpointError`` for a value that
    is not finite, and where the file cannot be written; a file that was there then stays.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in backbone_state.items()}
    info = ComponentInfo(component, config, images, size, provenance)
    export_tensors(path, specs, backbone_state.items(), info.to_metadata())


def export_gathered(path: Path, backbone: nn.Module, info: ComponentInfo) -> None:
    """Write ``backbone``, whole or sharded, as :func:`export_backbone` does.

    To be called by every process; the main one writes. Besides its shards no process holds more
    than one tensor. Raises as ``export_tensors`` does, on every process.
    """
    specs = {
        official_name(name): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in backbone.state_dict().items()
    }

    def write() -> None:
        tensors = full_tensors(backbone)
        try:
            if collectives.is_main():
                export_tensors(path, specs, tensors, info.to_metadata())
        finally:
            for _ in tensors:  # the others have a part in gathering, whatever the writer met
                pass

    with OwnErrors():
        run_on_all_ranks(write)


def export_tensors(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, Shape]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors that come one at a time, as ``specs`` announces them; never half of them.

    Raises as :func:`export_backbone` does.
    """
    path = Path(path)
    bad: list[str] = []
    try:
        with written_aside(path) as aside:
            write_tensor_file(aside, specs, _checked(tensors, bad), metadata)
            if bad:
                raise CheckpointError(
                    f"not exported to {path}:{summarize_names('with NaN or inf', bad)}"
                )
    except OSError as error:
        reason = no_room(error.errno, path.parent) or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}") from error


def _checked(tensors: Iterable[tuple[str, Tensor]], bad: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; those that are not finite are noted in ``bad``."""
    for name, tensor in tensors:
        if hasattr(tensor, "full_tensor"):  # a DTensor, whose module takes long to import
            raise TypeError(f"{name!r} is sharded: gather it first, as full_state_dict does")
        if complaint := not_finite(name, tensor):
            bad.append(complaint)
        yield name, tensor
