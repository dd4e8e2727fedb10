"""Where a step is rehearsed: pretended processes, and tensors without memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

# Registers the "fake" backend: collectives of any number of processes that do nothing.
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinov3_framework.engine.parallel import Sharder
from dinov3_framework.engine.settings import ParallelConfig

CPU = torch.device("cpu")


class PretendingSharder(Sharder):
    """Shards as the real one does, then allocates without memory.

    Only the allocation is pretended: to cut meta tensors into shards is many times faster with
    real ones.
    """

    def __init__(self, config: ParallelConfig, tensors: FakeTensorMode) -> None:
        super().__init__(config, CPU)
        self.tensors = tensors

    def allocate(self, module: nn.Module) -> nn.Module:
        with self.tensors:
            return super().allocate(module)


@contextmanager
def pretended(world_size: int) -> Iterator[FakeTensorMode]:
    """The first of ``world_size`` processes, for the duration of a ``with``.

    Tensors made under the mode that it yields have shapes and no values. What was made before,
    such as a loss's buffers, may be used under it and is not changed.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()
        gc.collect()  # networks refer to themselves in circles
