"""Collectives that losses and evaluations use; alone, each is the identity.

``group`` is a process group, or None for all processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if is_distributed() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if is_distributed() else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


@torch.no_grad()
def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over processes, in place and returned; without gradient."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


@torch.no_grad()
def all_reduce_max(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The maximum over processes, in place and returned; without gradient."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is the sum over processes of each one's gradient to our part."""

    @staticmethod
    def forward(ctx, tensor, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd's own stays
        dist.all_reduce(gradient, group=ctx.group)
        own = gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)]
        return own.clone(), None


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every process's [n, ...] along the first dimension, [world * n, ...], with gradient.

    All processes must pass the same shape.
    """
    if not is_distributed():
        return tensor
    return _Gather.apply(tensor, group)  # type: ignore[no-any-return,no-untyped-call]


def all_gather_object(value: object) -> list[object]:
    """Every process's picklable value, by rank."""
    if not is_distributed():
        return [value]
    values: list[object] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        dist.barrier()
