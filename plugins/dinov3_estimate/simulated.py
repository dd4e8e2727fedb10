"""Where a step is simulated: a fake process group, and networks without memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from attrs import field, frozen
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
class SimulatedRank:
    """One of the processes of a job."""

    world_size: int
    rank: int = 0
    spans: Sequence[range] = field(default=(), converter=tuple)  # ranks of trainings side by side

    @property
    def span(self) -> range:
        """The ranks of the training that this process takes part in."""
        return next((s for s in self.spans if self.rank in s), range(self.world_size))


class SimulatedSharder(Sharder):
    """Shards as the real one does, then allocates without memory; nothing is compiled.

    Only the allocation is fake: to cut meta tensors into shards is many times faster with real
    ones. ``placed`` are all networks, of this sharder and of those made by ``over_all``.
    """

    def __init__(
        self,
        config: ParallelConfig,
        tensors: FakeTensorMode,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(replace(config, compile=False), CPU, group)
        self.tensors = tensors
        self.placed: list[nn.Module] = []

    def _machine_problems(self) -> Sequence[Problem]:
        return ()  # the device is another one's

    def over_all(self) -> SimulatedSharder:
        other = SimulatedSharder(self.config, self.tensors)
        other.placed = self.placed
        return other

    def allocate(self, module: nn.Module) -> nn.Module:
        with self.tensors:
            placed = super().allocate(module)
        self.placed.append(placed)
        return placed


@contextmanager
def fake_process_group(rank: SimulatedRank) -> Iterator[FakeTensorMode]:
    """Be a process of a job for the duration of a ``with``.

    Tensors made under the mode that it yields have shapes and no values. What was made before,
    such as a loss's buffers, may be used under it and is not changed.
    """
    _forget_meshes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank.rank, world_size=rank.world_size)
    try:
        groups = subgroups([list(span) for span in rank.spans], timeout=60)
        own = [group for group, span in zip(groups, rank.spans, strict=True) if rank.rank in span]
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
