"""A backbone in its place for feature extraction: on the device, whole or sharded."""

from __future__ import annotations

import copy

import torch

from dinov3_framework.contracts import Backbone
from dinov3_framework.engine.parallel import DTYPES, Sharder, fill_from_main
from dinov3_framework.engine.settings import ParallelConfig


def placed_backbone(
    backbone: Backbone, parallel: ParallelConfig, device: torch.device, sharded: bool
) -> Backbone:
    """``backbone``, whole and on the CPU, as ``parallel`` asks; in eval mode.

    To be called by every process. ``sharded`` splits it over all of them, with the values of the
    main process: those of the others may be on the meta device. Otherwise each keeps its own, with
    parameters in ``param_dtype``.
    """
    if not sharded:
        for parameter in backbone.parameters():
            # Buffers keep their type: a table of RoPE is not to be rounded.
            parameter.data = parameter.data.to(device, DTYPES[parallel.param_dtype])
        return backbone.to(device).eval()
    placed = Sharder(parallel, device).place(_on_meta(backbone))
    fill_from_main(placed, backbone)
    return placed.eval()  # type: ignore[return-value]


def _on_meta(backbone: Backbone) -> Backbone:
    """The same network without values; takes no memory, and none to make."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    memo = {id(tensor): _blank(tensor) for tensor in tensors}
    return copy.deepcopy(backbone, memo)


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    blank = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(blank, requires_grad=tensor.requires_grad)
    return blank
