"""An estimated step against a real one: predicted peak of memory, and the measured one.

A small ViT is trained on N processes of this machine (gloo), and each takes one and the same step
several times. *Counted* is what the tensors of the real step take at most, by the same ledger that
the estimate keeps; *measured* is the most anonymous memory (RssAnon, sampled every 2 ms) above
what the process had before its networks. All are of the process that takes most. Linux only.

The C library's allocator is told to give freed memory back at once, and a step is taken before by
other networks of the same sizes, so that what libraries keep for their next time is there already
(see benchmarks/large_models.py). Counted is above predicted where gloo copies what it reduces.

    python benchmarks/rehearsal.py
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dinov3_estimate.recorder import OpRecorder
from dinov3_estimate.simulated import SimulatedRank
from dinov3_estimate.step import register_static, simulate
from large_models import ALLOCATOR, MIB, Peak, anonymous

from dinov3_framework import Registry
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.training.task import TrainingTask
from dinov3_framework.training.trainer import Trainer

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
# Large enough that tensors are most of what a process takes.
MODEL = (
    "augmentation.global_size=96",
    "augmentation.local_size=48",
    "augmentation.local_crops=4",
    "backbone.patch_size=8",
    "backbone.embed_dim=384",
    "backbone.depth=4",
    "backbone.num_heads=6",
    "backbone.ffn_ratio=4.0",
    "backbone.drop_path_rate=0.2",
    "losses.dino.head.n_prototypes=8192",
    "losses.ibot.head.n_prototypes=4096",
    "batch_size=8",
    "loader.workers=0",
    "observers={}",
)
CASES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("parallel.param_dtype=fp32",),
    "bf16": ("parallel.param_dtype=bf16",),
    "bf16, 2 micro-batches": ("parallel.param_dtype=bf16", "accumulation_steps=2", "batch_size=16"),
}


class Compared(NamedTuple):
    """Bytes at the peak of a step."""

    predicted: int
    counted: int
    measured: int


def task_of(overrides: Sequence[str], registry: Registry) -> TrainingTask:
    config = structure_recipe(registry, compose(QUICKSTART, [*MODEL, *overrides]))
    task = registry.build(config, registry=registry)
    assert isinstance(task, TrainingTask)
    return task


def compare(cases: Sequence[Sequence[str]], processes: int) -> list[Compared]:
    """Estimate steps here and take them on real processes; a case is overrides of the recipe."""
    registry, rank = Registry.load(), SimulatedRank(processes)
    predicted = [
        simulate(task_of(overrides, registry), rank, granularity=1).peak.total
        for overrides in cases
    ]
    with tempfile.TemporaryDirectory() as scratch:
        before = dict(os.environ)
        os.environ.update(ALLOCATOR)
        try:
            mp.spawn(_work, (processes, scratch, cases), nprocs=processes)
        finally:
            os.environ.clear()
            os.environ.update(before)
        by_rank = [torch.load(f"{scratch}/{rank}") for rank in range(processes)]
    # Of each case the process that takes most, in either way of looking.
    most = torch.tensor(by_rank).amax(0).tolist()
    return [Compared(*row) for row in zip(predicted, *zip(*most, strict=True), strict=True)]


# --------------------------------------------------------------------------- real processes
def _work(rank: int, world: int, scratch: str, cases: Sequence[Sequence[str]]) -> None:
    torch.set_num_threads(1)
    registry = Registry.load()
    store = dist.FileStore(f"{scratch}/store", world)
    timeout = timedelta(minutes=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        found = [_real(overrides, registry, Path(scratch)) for overrides in cases]
        torch.save(found, f"{scratch}/{rank}")
    finally:
        dist.destroy_process_group()


def _real(overrides: Sequence[str], registry: Registry, folder: Path) -> tuple[int, int]:
    """What this process's tensors take at most in a step, and what the process does."""
    # What a step loads, connects or keeps for its next time is there before it is measured.
    trainer = _trainer(overrides, registry, folder)
    trainer.step(_batches(trainer))
    del trainer
    gc.collect()
    before = anonymous()
    trainer = _trainer(overrides, registry, folder)
    with Peak() as peak:
        trainer.step(_batches(trainer))
    return _counted(trainer), peak.most - before


def _trainer(overrides: Sequence[str], registry: Registry, folder: Path) -> Trainer:
    task = task_of(overrides, registry)
    dataset = registry.build(task.config.dataset, channels=task.config.images.channels)
    return task.trainer(task.method.prepare(), dataset, folder / "run")


def _batches(trainer: Trainer) -> Iterator[Any]:
    """Those of the first step, which the estimate simulates."""
    return (trainer.maker[0, index] for index in range(trainer.config.accumulation_steps))


def _counted(trainer: Trainer) -> int:
    """The greatest sum of tensors in one more step."""
    recorder = OpRecorder()
    register_static(recorder.ledger, trainer)
    batches = _batches(trainer)
    with recorder:
        trainer.step(batches)
    return recorder.ledger.peak().total


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare estimated steps with real ones.")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    print("| step | predicted | counted | measured | predicted / measured |\n" + "|---" * 5 + "|")
    for name, found in zip(CASES, compare([*CASES.values()], options.processes), strict=True):
        sizes = [f"{value / MIB:,.0f}" for value in found]
        row = [name, *sizes, f"{found.predicted / found.measured:.2f}"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
