"""Collectives that losses and evaluations use; alone, each is the identity.

``group`` is a process group, or None for all processes of the run that this process takes part in.
Those are all there are, except inside :func:`within`: several students that are distilled side by
side are runs of their own, each on some of the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_run: list[dist.ProcessGroup | None] = [None]  # the last is the one in force


@contextmanager
def within(group: dist.ProcessGroup | None) -> Iterator[None]:
    """For the duration of a ``with``, "all processes" means those of ``group`` (None: all)."""
    _run.append(group)
    try:
        yield
    finally:
        _run.pop()


def current_group() -> dist.ProcessGroup | None:
    """The group that None stands for; None where it stands for all processes there are."""
    return _run[-1]


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there is more than one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(group or current_group()) > 1


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group or current_group()) if is_distributed(group) else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group or current_group()) if is_distributed(group) else 0


def place_of(rank: int) -> int:
    """What a rank of this run is among all processes there are, for messages."""
    group = current_group()
    return rank if group is None else dist.get_global_rank(group, rank)


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


@torch.no_grad()
def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over processes, in place and returned; without gradient."""
    if is_distributed(group):
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group or current_group())
    return tensor


@torch.no_grad()
def all_reduce_max(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The maximum over processes, in place and returned; without gradient."""
    if is_distributed(group):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group or current_group())
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
    if not is_distributed(group):
        return tensor
    return _Gather.apply(tensor, group or current_group())  # type: ignore[no-any-return,no-untyped-call]


def all_gather_object(value: object, group: dist.ProcessGroup | None = None) -> list[object]:
    """Every process's picklable value, by rank."""
    if not is_distributed(group):
        return [value]
    values: list[object] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group or current_group())
    return values


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        dist.barrier(group=current_group())
