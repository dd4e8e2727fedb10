"""Functions run by several processes that are connected."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fork_server import call_in_processes


def run_processes(world_size: int, scratch: Path, worker: Callable[..., Any], *args: Any) -> list:
    """Run ``worker(*args)`` on gloo processes; returns their results by rank, or fails."""
    scratch.mkdir(parents=True, exist_ok=True)
    meeting = f"file://{scratch}/rendezvous"
    return call_in_processes(world_size, scratch, connected, world_size, meeting, worker, args)


def connected(
    rank: int, world_size: int, meeting: str, worker: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=meeting,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        return worker(*args)
    finally:
        dist.destroy_process_group()
