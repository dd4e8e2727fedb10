"""A module's tensors whole and under their official names, however they are sharded or wrapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov3_framework.errors import CheckpointError
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
def load_tensor(target: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; no process talks to another."""
    full = full.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        shard = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(full)


@torch.no_grad()
def fingerprint(network: nn.Module) -> float:
    """A number by which to know a network again, the same on every process to rounding.

    To be called by every process that holds a part of it.
    """
    total = torch.zeros((), dtype=torch.float64)
    for parameter in network.parameters():
        size = parameter.detach().abs().sum(dtype=torch.float64)
        total += (size.full_tensor() if isinstance(size, DTensor) else size).cpu()
    return float(total)


_CLOSE = 1e-5  # relative difference of fingerprints that rounding explains


def is_same(before: float, now: float) -> bool:
    """Whether two fingerprints differ by rounding at most."""
    return abs(before - now) <= _CLOSE * abs(before)


def require_same(before: float, now: float, weights: str, what: str) -> None:
    """Raise ``CheckpointError`` where the fingerprint of a teacher, say, is not what it was."""
    if not is_same(before, now):
        raise CheckpointError(
            f"{weights} is not the {what} that this run has learned from: bring that one back, or "
            "start in another output folder"
        )


@torch.no_grad()
def weights_hash(*modules: nn.Module) -> str:
    """The first digits of a SHA-256 of all values, in float32, the same on every process.

    To be called by every process; it does not depend on how modules are sharded.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in full_tensors(module):
            if collectives.is_main():
                values = tensor.float() if tensor.is_floating_point() else tensor
                digest.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    return str(collectives.all_gather_object(digest.hexdigest()[:16])[0])
