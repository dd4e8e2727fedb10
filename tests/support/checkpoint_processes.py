"""What the processes of the checkpoint tests do; they import this module, not the tests."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dinov3_framework.checkpoints.manifest import FileRecord, Manifest
from dinov3_framework.checkpoints.safe_reader import SafeReader
from dinov3_framework.checkpoints.shard_writer import ShardWriter, _AttentiveFile
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.errors import CheckpointError
from dinov3_framework.parallel.state_dicts import full_state_dict


def run_processes(world_size: int, scratch: Path, worker: Callable[..., Any], *args: Any) -> list:
    """Run ``worker(*args)`` on gloo processes; returns their results by rank, or fails."""
    scratch.mkdir(parents=True, exist_ok=True)
    mp.spawn(_start, (world_size, scratch, worker, args), nprocs=world_size)
    return [
        torch.load(scratch / f"result_{rank}", weights_only=False) for rank in range(world_size)
    ]


def _start(
    rank: int, world_size: int, scratch: Path, worker: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{scratch}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(worker(*args), scratch / f"result_{rank}")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- a sharded model and its optimizer
def trained_tensors(steps: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """An FSDP2 module whose sizes divide by nothing, and AdamW, after ``steps`` steps.

    Without a process group, the same unsharded.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    module.register_buffer("counts", torch.arange(3))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(module[0], mesh=mesh)
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for step in range(max(steps, 1)):
        module(torch.full((4, 5), 0.5 + step)).square().mean().backward()
        if steps == 0:
            for parameter in module.parameters():
                parameter.grad = parameter.grad * 0
        optimizer.step()
        optimizer.zero_grad()
    tensors = {f"model.{n}": t.detach() for n, t in module.named_parameters()}
    tensors["model.counts"] = module.counts
    for (name, _), state in zip(
        module.named_parameters(), optimizer.state_dict()["state"].values(), strict=True
    ):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return module, tensors


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def save_trained(folder: Path, step: int) -> dict[str, Tensor]:
    _, tensors = trained_tensors(steps=3)
    CheckpointStore(folder).save(step, tensors, {"saved_by": dist.get_world_size()})
    return whole(tensors)


def restore_and_save_trained(folder: Path) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    _, tensors = trained_tensors(steps=0)
    store = CheckpointStore(folder)
    restored = store.restore(tensors)
    found = {name: tensor.clone() for name, tensor in whole(tensors).items()}
    for tensor in tensors.values():
        tensor += 1
    store.save(restored.step + 1, tensors, {"saved_by": dist.get_world_size()})
    return restored.step, restored.state, found


def gather_full() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module, tensors = trained_tensors(steps=2)
    return full_state_dict(torch.compile(module)), whole(tensors)


# ---------------------------------------------------------------- faults on one rank
def on_two(folder: Path) -> dict[str, Any]:
    """Everything that two processes are needed for; starting them takes longest."""
    return {
        "sharded": save_trained(folder / "sharded", 5),
        "gathered": gather_full(),
        "damage": one_rank_sees_damage(folder / "damage"),
        "unreadable": one_rank_cannot_read(folder / "unreadable"),
        "disagreement": one_rank_disagrees(folder / "disagreement"),
        "unwritable": one_rank_cannot_write(folder / "unwritable"),
    }


def on_rank_1(owner: Any, name: str, replacement: Any) -> Any:
    """Replace an attribute for the length of a with block, on rank 1 alone."""
    return mock.patch.object(owner, name, replacement) if dist.get_rank() == 1 else nullcontext()


def restore_second_to_last(folder: Path) -> tuple[int, list[str], Tensor]:
    """The step restored, what was logged, the tensor."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("dinov3_framework.checkpoints.store")
    logger.addHandler(handler)
    tensors = {"w": torch.zeros(4)}
    restored = CheckpointStore(folder).restore(tensors)
    logger.removeHandler(handler)
    return restored.step, lines, tensors["w"]


def save_two(folder: Path) -> None:
    store = CheckpointStore(folder)
    for step in (1, 2):
        store.save(step, {"w": torch.full((4,), float(step))}, {})


def one_rank_sees_damage(folder: Path) -> tuple[int, list[str], Tensor]:
    """Rank 1 alone finds the newer of two checkpoints damaged."""
    save_two(folder)
    sound = Manifest.damages

    def damages(self: Manifest, path: Path, names: list[str]) -> list[str]:
        return ["__1_0.distcp: bad sector"] if self.step == 2 else sound(self, path, names)

    with on_rank_1(Manifest, "damages", damages):
        return restore_second_to_last(folder)


def one_rank_cannot_read(folder: Path) -> tuple[int, list[str], Tensor]:
    """The newest checkpoint verifies, and then rank 1 gets an I/O error while reading it."""
    save_two(folder)
    read = SafeReader.read_data

    def fail(self: SafeReader, *args: Any) -> Any:
        if "step_00000002" in str(self.path):
            raise OSError(5, "Input/output error")
        return read(self, *args)

    with on_rank_1(SafeReader, "read_data", fail):
        return restore_second_to_last(folder)


def one_rank_disagrees(folder: Path) -> list[str]:
    """Rank 1 has another shape, and then refuses the state."""
    store = CheckpointStore(folder)
    store.save(1, {"w": torch.ones(4)}, {})
    rank = dist.get_rank()

    def accept(_: Any) -> None:
        if rank == 1:
            raise CheckpointError("another recipe")

    messages = []
    for size, check in ((4 + rank, None), (4, accept)):
        try:
            store.restore({"w": torch.zeros(size)}, accept=check)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def one_rank_cannot_write(folder: Path) -> list[tuple[str, list[str]]]:
    """Rank 1 fails before, while and after it writes its shard; then all is well."""
    store = CheckpointStore(folder)
    tensors = trained_tensors(steps=1)[1]
    store.save(1, tensors, {})

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    seen = []
    for step, (owner, name, replacement) in enumerate(
        [
            (ShardWriter, "storage_meta", fail),
            (_AttentiveFile, "write", fail),
            (FileRecord, "of", staticmethod(fail)),
        ],
        start=2,
    ):
        try:
            with on_rank_1(owner, name, replacement):
                store.save(step, tensors, {})
        except CheckpointError as error:
            dist.barrier()
            seen.append((str(error), sorted(path.name for path in folder.iterdir())))
    store.save(9, tensors, {})
    return seen


# ---------------------------------------------------------------- killed
def save_and_die(folder: Path) -> None:
    """Saves step 1, and is killed when all of step 2 but the index is written."""
    torch.set_num_threads(1)
    store = CheckpointStore(folder)
    store.save(1, {"w": torch.ones(1000)}, {"step": 1})
    ShardWriter.finish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    store.save(2, {"w": torch.zeros(1000)}, {"step": 2})
