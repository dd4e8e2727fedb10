"""What the processes of the parallel tests do; they import this module, not the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from checkpoint_processes import whole
from dinov3_ssl.networks import Networks
from torch import Tensor
from trainer_support import pretrain, save, steps, trainer_of

from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.meshes import mesh_of
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.parallel.state_dicts import full_state_dict
from dinov3_framework.training.trainer import Trainer

CPU = torch.device("cpu")


def started(output: Path, *overrides: str) -> Trainer:
    """The tiny recipe's trainer, among the processes that are already connected."""
    task = pretrain(*overrides)
    return trainer_of(task, output)


def learn(output: Path, count: int, *overrides: str, kept: bool = False) -> dict[str, Any]:
    """Some steps from where a run was left: its figures, and all of its state, whole."""
    ours = started(output, *overrides)
    ours.resume()
    begun, figures = ours.done, steps(ours, count)
    if kept:
        save(ours)
    mesh = mesh_of(ours.unit.placed.student["backbone"])
    return {
        "begun": begun,
        "mesh": mesh and (mesh.mesh.tolist(), mesh.mesh_dim_names),
        "figures": figures,
        "state": {name: tensor.detach().clone() for name, tensor in whole(ours.tensors()).items()},
        "export": full_state_dict(ours.unit.placed.teacher["backbone"]),
    }


def four(folder: Path, recipe: tuple[str, ...]) -> dict[str, Any]:
    """Everything that four processes are needed for; starting them takes longest."""
    replicas = ("parallel.replicas=2",)
    return {
        "sharded": learn(folder / "sharded", 2, *recipe),
        "replicated": learn(folder / "replicated", 2, *recipe, *replicas, kept=True),
        "whole": learn(folder / "whole", 2, *recipe, "parallel.replicas=4"),
        "full": learn(folder / "full", 2, *recipe, "parallel.checkpointing=full"),
        "selective": learn(folder / "selective", 2, *recipe, "parallel.checkpointing=selective"),
        "fp8": learn(folder / "fp8", 2, *recipe, "parallel.fp8=emulated"),
        "groups": in_groups(recipe, replicas=1),
        "groups_of_replicas": in_groups(recipe, replicas=2),
    }


def in_groups(recipe: tuple[str, ...], replicas: int) -> dict[str, Any]:
    """Two networks side by side, each of other values, on ranks 0 and 1 and on ranks 2 and 3."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    index = dist.get_rank() // 2
    config = attrs.evolve(ParallelConfig(), replicas=replicas)
    networks = Networks(
        pretrain(*recipe).method.prepare().blueprint,
        Sharder(config, CPU, groups[index]),
        seed=index,
    )
    # Only now and then do both groups come to the same place: nothing may wait for the other one.
    backbone: Any = networks.student["backbone"]
    for step in range(1 + index):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 1, 28, 28, generator=generator).chunk(2)[dist.get_rank() % 2]
        (backbone(images) ** 3).mean().backward()
    gradients = {name: gathered(p.grad) for name, p in backbone.named_parameters()}
    mesh = mesh_of(backbone)
    return {
        "mesh": mesh and mesh.mesh.tolist(),
        "student": {name: gathered(tensor) for name, tensor in backbone.state_dict().items()},
        "gradients": {name: grad for name, grad in gradients.items() if grad is not None},
    }


def gathered(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else whole({"": tensor.detach()})[""].clone()
