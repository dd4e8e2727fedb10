"""A module's tensors whole and under their official names, however they are sharded or wrapped."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3_framework.runtime import collectives

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def official_name(name: str) -> str:
    """A name in a state dict without what torch.compile, FSDP and the like put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@torch.no_grad()
def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All of ``module``'s tensors, whole and under their official names, one at a time.

    To be iterated to its end by every process: sharded tensors are gathered on the way. Those that
    are not are the module's own.
    """
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield official_name(name), full.detach()


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all of ``module``'s tensors, whole, on the CPU of rank 0; elsewhere nothing.

    To be called by every process. Besides the result, no process holds more than one tensor.
    """
    state = {}
    for name, full in full_tensors(module):
        if collectives.is_main():
            state[name] = full.to("cpu", copy=True)
    return state


@torch.no_grad()
def put(target: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; no process talks to another."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    full = full.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        shard = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(full)
