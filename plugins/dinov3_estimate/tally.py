"""What a step does: matrix products, bytes that go through memory, messages between processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from attrs import define, field
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

PER_MACHINE = 8  # accelerators that NVLink joins


class Product(NamedTuple):
    """A matrix product (or attention, or convolution)."""

    dtype: str  # fp32, bf16, fp8 ...
    flops: int
    bytes: int  # read and written


class Message(NamedTuple):
    """A collective as one process takes part in it."""

    name: str  # all_gather, reduce_scatter ...
    bytes: int  # of the whole: what is gathered, what is reduced; all_to_all: this process's part
    processes: int
    machines: int
    in_backward: bool

    @property
    def wire_bytes(self) -> float:
        """What this process sends by the ring algorithm."""
        share = (self.processes - 1) / self.processes
        return self.bytes * share * (2 if self.name == "all_reduce" else 1)

    @property
    def can_hide(self) -> bool:
        """Whether computation goes on meanwhile: FSDP's own messages, not those of a loss."""
        return self.in_backward or self.name in ("all_gather", "reduce_scatter")


@define
class Tally:
    """Counts of one step or of a part of it."""

    products: Counter[Product] = field(factory=Counter)
    messages: Counter[Message] = field(factory=Counter)
    kernels: int = 0  # operations that do something, of every sort
    moved: int = 0  # bytes read and written by operations that are no products

    def add(self, other: Tally, times: int = 1) -> None:
        for mine, theirs in ((self.products, other.products), (self.messages, other.messages)):
            for key, count in theirs.items():
                mine[key] += times * count  # type: ignore[index]
        self.kernels += times * other.kernels
        self.moved += times * other.moved

    def flops(self) -> dict[str, int]:
        """By the type that is calculated in, the most first."""
        found: Counter[str] = Counter()
        for product, count in self.products.items():
            found[product.dtype] += count * product.flops
        return dict(found.most_common())


# --------------------------------------------------------------------------- messages
Sized = Callable[[Any, Any], Any]  # (arguments, result) -> the tensors that make up the whole


def _argument(index: int) -> Sized:
    return lambda args, result: args[index]


def _result(args: Any, result: Any) -> Any:
    return result


def _larger(args: Any, result: Any) -> Any:
    """Of what an exchange gives to this process and takes from it."""
    return max(args[0], args[1], key=_bytes)


# Name of the operation -> what it is called, what the whole of it is, where its group stands.
_MESSAGES: dict[str, tuple[str, Sized, int]] = {
    "c10d::allreduce_": ("all_reduce", _argument(0), 1),
    "c10d::broadcast_": ("broadcast", _argument(0), 1),
    "c10d::reduce_": ("reduce", _argument(0), 1),
    "c10d::allgather_": ("all_gather", _argument(0), 2),
    "c10d::_allgather_base_": ("all_gather", _argument(0), 2),
    "c10d::reduce_scatter_": ("reduce_scatter", _argument(1), 2),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", _argument(1), 2),
    "c10d::gather_": ("gather", _argument(0), 2),
    "c10d::scatter_": ("scatter", _argument(1), 2),
    "c10d::alltoall_": ("all_to_all", _larger, 2),
    "c10d::alltoall_base_": ("all_to_all", _larger, 2),
    "_c10d_functional::all_reduce": ("all_reduce", _argument(0), 2),
    "_c10d_functional::all_reduce_": ("all_reduce", _argument(0), 2),
    "_c10d_functional::broadcast": ("broadcast", _argument(0), 2),
    "_c10d_functional::broadcast_": ("broadcast", _argument(0), 2),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", _result, 2),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", _result, 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", _argument(0), 3),
    "_c10d_functional::all_to_all_single": ("all_to_all", _argument(0), 3),
}


def message(func: Any, args: Any, result: Any, in_backward: bool) -> Message | None:
    """What an operation sends, if it is a collective of several processes."""
    found = _MESSAGES.get(func._schema.name)
    if found is None:
        return None
    name, whole, place = found
    ranks = dist.get_process_group_ranks(_group(args[place]))
    machines = len({rank // PER_MACHINE for rank in ranks})
    return Message(name, _bytes(whole(args, result)), len(ranks), machines, in_backward)


def _group(value: Any) -> dist.ProcessGroup:
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, str):
        return _resolve_process_group(value)  # type: ignore[arg-type]
    return dist.ProcessGroup.unbox(value)


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
