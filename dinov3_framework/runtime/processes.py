"""Processes and the device of each."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dinov3_framework.errors import Problem, RecipeError, UserError
from dinov3_framework.runtime import collectives


def environment_world_size() -> int | None:
    """The number of processes that a launcher announced, or None without one."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value is not None and "RANK" in os.environ else None


def pick_device(wanted: str) -> torch.device:
    """This process's device for ``auto``, ``cpu`` or ``cuda``."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RecipeError(
            [Problem("parallel.device", "no CUDA device is visible", 'use "auto" or "cpu"')]
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def memory_for_process(device: torch.device, processes: int) -> int | None:
    """Bytes that each of ``processes`` on this machine can have on a device; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = []
    with suppress(OSError, LookupError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return min(found) // here if found else None


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """The default process group for the duration of a ``with``.

    Alone, a group of one is made without any network, so that sharding takes the same path.
    ``timeout`` (seconds) holds for every collective: a process that hangs ends the job.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    world = environment_world_size()
    lone = world == 1 and "MASTER_ADDR" not in os.environ
    if world is not None and not lone and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"RANK and WORLD_SIZE = {world} are set in the environment, MASTER_ADDR is not: let "
            "torchrun or a launcher start the processes, or unset RANK and WORLD_SIZE"
        )
    if world is None or lone:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit)
    try:
        yield
    finally:
        dist.destroy_process_group()


def subgroups(ranks: Sequence[Sequence[int]], timeout: float) -> list[dist.ProcessGroup]:
    """A group for each list of ranks; only its own is of use to a process.

    To be called by every process. ``timeout`` as of :func:`process_group`.
    """
    limit = timedelta(seconds=timeout)
    groups: list[Any] = [dist.new_group(list(each), timeout=limit) for each in ranks]
    return groups


def wait_for_all(seconds: float) -> None:
    """Wait for every process, longer than a collective may take otherwise.

    A process that is gone ends the wait at once, as it does any collective.
    """
    if collectives.is_distributed():
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=seconds)
        dist.distributed_c10d._get_default_group().allreduce([torch.zeros(1)], options).wait()


def note_place(place: str) -> None:
    """Note where this process is, for what others say if it does not come to a collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with suppress(RuntimeError):  # gone with its process; the next collective has more to say
            _store().set(f"place/{dist.get_rank()}", place)


def missing_ranks(seconds: float) -> list[str]:
    """Who does not come to a collective, and where each was last.

    To be called by a process whose collective failed: those that wait for others call it all, and
    who does not, within ``seconds``, is the one that they wait for.
    """
    try:
        _store().set(f"waited/{dist.get_rank()}", "")
        time.sleep(seconds)
        return [
            f"rank {rank}, last seen at {_place_of(rank)}"
            for rank in range(dist.get_world_size())
            if not _store().check([f"waited/{rank}"])
        ]
    except RuntimeError:  # the store has gone with its process
        time.sleep(seconds)
        return []


def _place_of(rank: int) -> str:
    key = f"place/{rank}"
    return _store().get(key).decode() if _store().check([key]) else "the start"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def leave(code: int) -> NoReturn:
    """End this process of a job at once.

    Threads of a process group outlive it where something still refers to it, and one that then
    wants Python's lock while the interpreter ends aborts the process: a complete run would count
    as failed.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more
            continue
    os._exit(code)
