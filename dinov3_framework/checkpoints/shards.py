"""Sharded tensors to and from a folder, by torch.distributed.checkpoint.

Its errors are translated: it raises a ``BaseException`` with a traceback for each rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dinov3_framework.checkpoints.safe_reader import SafeReader, TensorsOnly
from dinov3_framework.checkpoints.shard_writer import ShardWriter
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import Failure, RankFailure


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write this process's shards, and on rank 0 the index; returns the names of the files.

    To be called by every process; raises ``RankFailure`` on all if it fails on any.
    """
    writer = ShardWriter(folder)
    with _errors():
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=collectives.current_group(),
            no_dist=not collectives.is_distributed(),
        )
    return writer.written


def load_shards(reader: SafeReader, tensors: Mapping[str, Tensor]) -> None:
    """Load into ``tensors``, in place; whole or sharded in any way.

    To be called by every process; raises ``RankFailure`` on all if it fails on any.
    """
    with _errors():
        dcp.load(
            dict(tensors),
            storage_reader=reader,
            planner=TensorsOnly(),
            process_group=collectives.current_group(),
            no_dist=not collectives.is_distributed(),
        )


def read_whole(reader: SafeReader, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors, in place, by this process for itself; raises ``CheckpointError``."""
    try:
        with _errors():
            dcp.load(dict(tensors), storage_reader=reader, planner=TensorsOnly(), no_dist=True)
    except RankFailure as failure:
        raise failure.for_person() from None


@contextmanager
def _errors() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # torch warns of what is meant: there is one process.
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
            yield
    except CheckpointException as error:
        failures = {rank: cause for rank, (cause, _) in error.failures.items()}
        for cause in failures.values():
            if not isinstance(cause, Exception):
                raise cause from None  # Ctrl-C is no matter of checkpoints
        raise RankFailure([Failure.of(rank, cause) for rank, cause in failures.items()]) from error
