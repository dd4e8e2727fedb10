"""Random numbers that belong to an image of a batch, and sums over all processes.

A step's images get the same numbers however they are spread over processes: each has a generator
of its own, keyed by its place in the batch and by a seed that the first process draws from torch's
global generator, which the trainer seeds by the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov3_framework import collectives, keyed_seed


def is_simulated(tensor: Tensor) -> bool:
    """Whether a tensor has no values, as in the estimate of a step."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def sums(values: Sequence[int], like: Tensor) -> list[int]:
    """The sums of some numbers over all processes, which all have to call this."""
    if not collectives.is_distributed() or is_simulated(like):
        return list(values)
    total = torch.tensor(list(values), dtype=torch.int64, device=like.device)
    return [int(value) for value in collectives.all_reduce_sum(total).tolist()]


def image_generators(images: Tensor, purpose: str) -> list[torch.Generator]:
    """A generator for each of a process's images [B, ...]; all processes have to call this."""
    if is_simulated(images):
        return [torch.Generator(images.device) for _ in images]
    rank, seed = collectives.rank(), int(torch.randint(2**62, ()))
    counts = [0] * collectives.world_size()
    counts[rank] = len(images)
    seed, *counts = sums([0 if rank else seed, *counts], images)
    first = sum(counts[:rank])
    return [
        torch.Generator(images.device).manual_seed(keyed_seed(seed, purpose, first + place))
        for place in range(len(images))
    ]


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers in 0..1, on the generator's device."""
    return torch.rand(*shape, generator=generator, device=generator.device)
