"""What a step does: matrix products, bytes that go through memory, messages."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from attrs import define, field


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
