"""What is not finite in the state of a run, so that it is never saved as a sound checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov3_framework.runtime.agreement import gather_from_all_ranks


def nonfinite_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those in which any process has a NaN or inf; called by every process.

    Each process reads its shards once, without a copy, and waits for its device once.
    """
    return sorted({name for part in gather_from_all_ranks(_own, tensors) for name in part})


@torch.no_grad()
def _own(tensors: Mapping[str, Tensor]) -> list[str]:
    local = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    names = [name for name, tensor in local.items() if tensor.numel()]
    # The least and the greatest of numbers one of which is a NaN are NaN.
    edges = [torch.stack(torch.aminmax(local[name])).float() for name in names]
    if not edges:
        return []
    device = max((edge.device for edge in edges), key=lambda device: device.type != "cpu")
    found = torch.stack([edge.to(device) for edge in edges]).isfinite().all(dim=1).tolist()
    return [name for name, finite in zip(names, found, strict=True) if not finite]
