"""The processes that hold a network, in a mesh: one row of them, or replicas of a row."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

REPLICATE, SHARD = "replicate", "shard"


def mesh_over(
    group: dist.ProcessGroup | None, device: torch.device, replicas: int, timeout: float
) -> DeviceMesh:
    """A mesh of the processes of ``group``, or of all: [processes], or [replicas, the rest].

    To be called by all of them, and those of other groups make as many meshes of theirs. The rows
    are neighbors by rank, so that with a row per machine parameters are gathered within it.
    ``timeout`` (seconds) holds for the collectives of groups that are made here.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if replicas > 1:
        table = torch.tensor(ranks).view(replicas, -1)
        own = table == dist.get_rank()
        row, column = table[own.any(1)].flatten(), table[:, own.any(0)].flatten()
        # Every process takes part in one row, then in one column, and knows of no others.
        shard = _group_of(row.tolist(), timeout)
        replicate = _group_of(column.tolist(), timeout)
        return DeviceMesh.from_group(
            [replicate, shard], device.type, table, mesh_dim_names=(REPLICATE, SHARD)
        )
    if group is None:
        return init_device_mesh(device.type, (len(ranks),))
    return DeviceMesh.from_group(group, device.type)


def _group_of(ranks: list[int], timeout: float) -> dist.ProcessGroup:
    limit = timedelta(seconds=timeout)
    # A process that is no member would get a number instead.
    return cast(dist.ProcessGroup, dist.new_group(ranks, limit, use_local_synchronization=True))


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The mesh that a network's parameters are spread over; None where it is whole."""
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            return parameter.device_mesh
    return None


def is_first(mesh: DeviceMesh | None) -> bool:
    """Whether this process is the first of a mesh, which speaks for the others."""
    return mesh is None or not any(mesh.get_coordinate() or ())


def broadcast_from_first(tensor: Tensor, mesh: DeviceMesh) -> None:
    """Give every process of a mesh the first one's tensor, in place."""
    place = mesh.get_coordinate() or ()
    for dimension in range(mesh.ndim):
        # Along a later dimension only once those at its start have the tensor.
        if not any(place[dimension + 1 :]):
            dist.broadcast(tensor, group=mesh.get_group(dimension), group_src=0)
