"""What the processes of the test of sharded depth heads do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from dinov3_depth.configs_heads import DptDepthConfig, LinearDepthConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov3_framework import FeatureInfo, HeadFeatures, Registry, Target
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder, initial_values
from dinov3_framework.parallel.state_dicts import full_state_dict, load_tensor

HEADS: dict[str, Any] = {
    "linear": LinearDepthConfig(layers=(1, 3), bins=6, class_token=True),
    "dpt": DptDepthConfig(
        widths=(4, 6, 8, 10), channels=8, hidden=6, bins=5, readout="project", gradient=0.5
    ),
}
IMAGES, SIDE, WIDTH = 4, 64, 32


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def work(param_dtype: str = "fp32") -> dict[str, Any]:
    """The loss of all images, the gradients of it, and the buffers after it, by head."""
    results = {}
    for name, config in HEADS.items():
        results[name] = _trained(config, param_dtype)
    return results


def _trained(config: Any, param_dtype: Any) -> dict[str, Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    features = (FeatureInfo(WIDTH, 16),) * 4
    with torch.device("meta"):
        targets = {"depth": Target("map", unit="m")}
        head: Any = Registry.load().build(config, features=features, targets=targets)
    state = initial_values(head, 0).state_dict()
    parallel = ParallelConfig(param_dtype=param_dtype)
    head = Sharder(parallel, torch.device("cpu")).place(head)
    for key, value in head.state_dict().items():
        load_tensor(value, state[key])
    part = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    layers = head.needs.layers
    maps = [drawn(IMAGES, WIDTH, 4, 4 + index)[part][..., :4] for index in range(len(layers))]
    cls = [drawn(IMAGES, WIDTH + index)[part][:, :WIDTH] for index in range(len(layers))]
    given = HeadFeatures(maps, cls if head.needs.class_token else (), (SIDE, SIDE))
    depth = (drawn(IMAGES, SIDE, SIDE).abs() * 3)[part]
    loss = head.train().loss(head(given), {"depth": depth}).loss
    loss.backward()
    gradients = {}
    for key, parameter in head.named_parameters():
        found = parameter.grad
        assert found is not None, key
        gradients[key] = found.full_tensor() if isinstance(found, DTensor) else found
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {
        "sharded": any(isinstance(each, DTensor) for each in head.parameters()),
        "loss": total / world,
        "gradients": gradients,
        "buffers": {k: v for k, v in full_state_dict(head).items() if "running" in k},
    }
