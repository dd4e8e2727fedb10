"""Networks in their place: in which precision, compiled, recomputed and sharded (FSDP2) as a recipe
asks, and their first values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dinov3_framework.contracts.networks import Backbone, Shardable
from dinov3_framework.errors import Problem, RecipeError
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.activation_checkpointing import recompute
from dinov3_framework.parallel.check import machine_problems, parallel_problems
from dinov3_framework.parallel.compiling import compile_blocks
from dinov3_framework.parallel.fp8_linears import use_fp8
from dinov3_framework.parallel.meshes import broadcast_from_first, is_first, mesh_of, mesh_over
from dinov3_framework.parallel.state_dicts import load_tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Sharder:
    """Places networks as a recipe's ``[parallel]`` asks.

    They are spread over the processes of ``group``, or over all; to be made by each of those, and
    where others are in groups of theirs, by these too. Raises ``RecipeError`` for what the group
    or this machine cannot do.
    """

    def __init__(
        self,
        config: ParallelConfig,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.group = group
        processes = dist.get_world_size(group)
        problems = [*parallel_problems(config, processes), *self._machine_problems()]
        if problems:
            raise RecipeError(problems)
        self.mesh: DeviceMesh | None = None
        # One process in full precision has nothing to shard and nothing to cast.
        if processes > 1 or config.param_dtype != "fp32":
            self.mesh = mesh_over(group, device, config.replicas, config.timeout)

    def _machine_problems(self) -> Iterable[Problem]:
        return machine_problems(self.config, self.device)

    def over_all(self) -> Sharder:
        """The same for what is spread over all processes there are."""
        return type(self)(self.config, self.device)

    def place(self, module: nn.Module, *, trains: bool = True) -> nn.Module:
        """Shard a network that is on the meta device and allocate it, without values.

        Only one that ``trains`` has anything to recompute. Names of parameters stay as they are.
        """
        if isinstance(module, Shardable):
            self._prepare(module, trains)
        if self.mesh is not None:
            self._shard(module, self.mesh)
        return self.allocate(module)

    def allocate(self, module: nn.Module) -> nn.Module:
        """Move a network from the meta device, without values."""
        return module.to_empty(device=self.device)

    def _prepare(self, network: Shardable, trains: bool) -> None:
        """What comes before sharding, from the inside out: a block is compiled as it then is."""
        if self.config.fp8 != "off" and isinstance(network, Backbone):
            use_fp8(self.config, network)
        if trains and self.config.checkpointing != "none":
            for block in network.blocks_to_shard():
                recompute(block, selective=self.config.checkpointing == "selective")
        if self.config.compile:
            compile_blocks(network.blocks_to_shard())

    def _shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        types: dict[str, Any] = {
            "param_dtype": DTYPES[self.config.param_dtype],
            "reduce_dtype": DTYPES[self.config.reduce_dtype],
        }
        if isinstance(module, Shardable) and (blocks := list(module.blocks_to_shard())):
            # Inputs are cast once, at the root: a block would also cast its float32 RoPE tables.
            inner = MixedPrecisionPolicy(**types, cast_forward_inputs=False)
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=inner, reshard_after_forward=True)
        fully_shard(
            module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**types), reshard_after_forward=True
        )
        for name in getattr(module, "forward_methods", ()):
            register_fsdp_forward_method(module, name)


class MetaSharder(Sharder):
    """Leaves networks on the meta device: for their names and shapes alone, without processes."""

    def __init__(self, config: ParallelConfig) -> None:
        self.config, self.device, self.group, self.mesh = config, torch.device("meta"), None, None

    def over_all(self) -> MetaSharder:
        return self

    def place(self, module: nn.Module, *, trains: bool = True) -> nn.Module:
        return module


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, the buffers that state dicts leave out too."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def state_of(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of several networks as ``<network>.<name>``, for a train unit's ``state``."""
    return {
        f"{network}.{name}": tensor.detach()
        for network, module in networks.items()
        for name, tensor in tensors_of(module)
    }


def initialize(module: nn.Module, blueprint: nn.Module, seed: int) -> None:
    """Give a placed network the values that ``blueprint.init_weights()`` draws from ``seed``.

    ``blueprint`` is the same network, whole, on the meta device. Of the processes that share the
    network the first alone draws, on the CPU, and the rest receive their shards one tensor at a
    time: the values depend neither on the device nor on how many processes there are.
    """
    whole = initial_values(blueprint, seed) if is_first(mesh_of(module)) else blueprint
    fill_from_main(module, whole)


def initial_values(blueprint: nn.Module, seed: int) -> nn.Module:
    """A copy of a meta-device network on the CPU, with the values drawn from ``seed``."""
    whole = copy.deepcopy(blueprint).to_empty(device="cpu")
    for tensor in (*whole.parameters(), *whole.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))  # whatever init_weights forgets must be found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole.init_weights()  # type: ignore[operator]
    for name, tensor in tensors_of(whole):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(
                f"{type(whole).__name__}.init_weights() left {name!r} without a finite value"
            )
    return whole


@torch.no_grad()
def fill_from_main(module: nn.Module, whole: nn.Module) -> None:
    """Copy a whole network into one that is spread over processes, of which the first has it."""
    mesh = mesh_of(module)
    source = dict(tensors_of(whole))
    for name, target in tensors_of(module):
        full = source[name].detach()
        if full.is_meta:
            full = torch.empty_like(full, device=target.device)
        full = full.to(target.device)
        if mesh is not None:
            broadcast_from_first(full, mesh)
        load_tensor(target, full)


@torch.no_grad()
def copy_network(source: nn.Module, target: nn.Module) -> None:
    """Copy every parameter and buffer between two networks sharded alike."""
    values = dict(tensors_of(source))
    for name, tensor in tensors_of(target):
        _local(tensor).copy_(_local(values[name]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def momentum_update(teacher: nn.Module, student: nn.Module) -> Callable[[float], None]:
    """A function m -> teacher = m teacher + (1 - m) student, over all parameters."""
    ours = [_local(parameter.data) for parameter in teacher.parameters()]
    theirs = [_local(parameter.data) for parameter in student.parameters()]

    @torch.no_grad()
    def update(momentum: float) -> None:
        torch._foreach_mul_(ours, momentum)
        torch._foreach_add_(ours, theirs, alpha=1 - momentum)

    return update
