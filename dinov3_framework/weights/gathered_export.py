"""Writes a backbone that is spread over processes as one file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dinov3_framework.parallel.state_dicts import full_tensors, official_name
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, together
from dinov3_framework.weights.export import export_tensors
from dinov3_framework.weights.info import BackboneInfo


def export_gathered(path: Path, backbone: nn.Module, info: BackboneInfo) -> None:
    """Write ``backbone``, whole or sharded, as ``load_backbone`` reads it.

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

    try:
        together(write)
    except RankFailure as failure:
        raise failure.for_process() from failure.own
