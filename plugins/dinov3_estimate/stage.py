"""Where a step is rehearsed: pretended processes, and tensors without memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from attrs import frozen
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import debug

# Registers the "fake" backend: collectives of any number of processes that do nothing.
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinov3_framework.configs import replace
from dinov3_framework.errors import Problem
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.processes import subgroups

CPU = torch.device("cpu")


@frozen
class Seat:
    """One of the pretended processes."""

    world_size: int
    rank: int = 0
    spans: Sequence[range] = ()  # the ranks of runs side by side; none: all are of one run

    @property
    def span(self) -> range:
        """The ranks of the run that this process takes part in."""
        return next((s for s in self.spans if self.rank in s), range(self.world_size))


class PretendingSharder(Sharder):
    """Shards as the real one does, then allocates without memory; nothing is compiled.

    Only the allocation is pretended: to cut meta tensors into shards is many times faster with
    real ones.
    """

    def __init__(
        self,
        config: ParallelConfig,
        tensors: FakeTensorMode,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(replace(config, compile=False), CPU, group)
        self.tensors = tensors

    def _machine_problems(self) -> Sequence[Problem]:
        return ()  # this one only pretends to be another

    def over_all(self) -> PretendingSharder:
        """The same for what is spread over all processes there are."""
        return PretendingSharder(self.config, self.tensors)

    def allocate(self, module: nn.Module) -> nn.Module:
        with self.tensors:
            return super().allocate(module)


@contextmanager
def pretended(seat: Seat) -> Iterator[FakeTensorMode]:
    """A process of a run, for the duration of a ``with``.

    Tensors made under the mode that it yields have shapes and no values. What was made before,
    such as a loss's buffers, may be used under it and is not changed.
    """
    _forget_meshes()
    dist.init_process_group("fake", store=FakeStore(), rank=seat.rank, world_size=seat.world_size)
    try:
        groups = subgroups([list(span) for span in seat.spans], timeout=60)
        own = [group for group, span in zip(groups, seat.spans, strict=True) if seat.rank in span]
        with collectives.within(own[0] if own else None):
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()
        _forget_meshes()
        gc.collect()  # networks refer to themselves in circles


def _forget_meshes() -> None:
    """What sharded operations give is remembered with its mesh, whose groups may be gone.

    Meshes of the same ranks count as equal, so that another process group would be led to those.
    """
    debug._clear_sharding_prop_cache()
