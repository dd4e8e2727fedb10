"""Memory of a large backbone on its way into N processes, and out of a sharded checkpoint.

A process's *peak* is the most anonymous memory that it had at once (RssAnon, sampled every 2 ms),
above what it had after its imports: its tensors and its buffers. Pages of mapped files do not
count, since the kernel takes them back when it wants to; and the C library is told to give freed
memory back at once, so that what it keeps for later does not count either. *Kept* is what the
process is to hold at the end, its shards. The last column sets the peak against the kept and the
largest tensor together: near 1 there is nothing left to save. Linux only.

    python benchmarks/large_models.py
    python benchmarks/large_models.py --backbone vit_huge_plus --processes 2 4 8

The weights are drawn, not downloaded. Disk: five times the backbone, in the folder for temporary
files (TMPDIR).
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attrs import field, frozen
from dinov3_ssl.configs import InitFromConfig, PretrainConfig, TeacherConfig
from dinov3_ssl.init_from import open_weights
from dinov3_ssl.networks import Blueprint, Networks
from torch import Tensor

from dinov3_framework import Constant, Registry
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.configs import WEB_IMAGES
from dinov3_framework.kinds import (
    AugmentationConfig,
    BackboneConfig,
    DatasetConfig,
    OptimizerConfig,
)
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder, tensors_of
from dinov3_framework.weights.convert import convert_backbone
from dinov3_framework.weights.export import export_gathered, export_tensors
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.loading import load_sharded
from dinov3_framework.weights.tensors import initial_tensors

MIB = 2**20
CPU = torch.device("cpu")
# Freed memory goes back at once: large blocks are mapped one by one, small ones trimmed.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(MIB // 4),
    "MALLOC_TRIM_THRESHOLD_": str(MIB // 4),
}


class Peak:
    """The most anonymous memory above that at the beginning, in bytes, while a ``with`` lasts."""

    def __enter__(self) -> Self:
        self.before = self.most = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, anonymous())
        self._over.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Measured(NamedTuple):
    """One process's memory, in bytes."""

    peak: int
    kept: int


# --------------------------------------------------------------------------- what is measured
@frozen
class Place:
    """A backbone and the files of it; what processes are given."""

    component: str
    options: Mapping[str, Any]
    folder: Path
    registry: Registry = field(factory=Registry.load, repr=False, eq=False)

    @property
    def config(self) -> BackboneConfig:
        config: BackboneConfig = self.registry.config_of("backbone", self.component, self.options)
        return config

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def meta(self) -> Any:
        with torch.device("meta"):
            return self.registry.build(self.config)

    def sizes(self) -> list[int]:
        """Bytes of every tensor."""
        state = self.meta().state_dict().values()
        return [tensor.element_size() * math.prod(tensor.shape) for tensor in state]

    def info(self) -> ComponentInfo:
        return ComponentInfo(self.component, self.options, WEB_IMAGES, 224, {})

    def write(self) -> None:
        """Draw the weights into a file, one tensor at a time."""
        meta = self.meta()
        state = meta.state_dict()
        buffers = initial_tensors(meta, [name for name, _ in meta.named_buffers()])
        generator = torch.Generator().manual_seed(0)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, blank in state.items():
                drawn = torch.empty(blank.shape).normal_(0, 0.02, generator=generator)
                yield name, buffers.get(name, drawn)

        specs = {name: (blank.dtype, tuple(blank.shape)) for name, blank in state.items()}
        export_tensors(self.weights, specs, tensors(), self.info().to_metadata())


def held(module: torch.nn.Module) -> int:
    """Bytes of a network's tensors in this process."""
    parts = [getattr(tensor, "_local_tensor", tensor) for _, tensor in tensors_of(module)]
    return sum(part.element_size() * part.numel() for part in parts)


def sharder() -> Sharder:
    return Sharder(ParallelConfig(param_dtype="bf16"), CPU)


def load_file(place: Place) -> Measured:
    """``load_sharded`` of one file."""
    return _load(place, place.weights)


def load_checkpoint(place: Place) -> Measured:
    """``load_sharded`` of a sharded checkpoint."""
    return _load(place, place.checkpoints)


def _load(place: Place, source: Path) -> Measured:
    with Peak() as peak:
        loaded = load_sharded(source, sharder=sharder(), registry=place.registry)
    return Measured(peak.bytes, held(loaded.backbone))


def _started(place: Place) -> Networks:
    zero = Constant(value=0.0)
    config = PretrainConfig(
        iterations=1,
        batch_size=1,
        dataset=DatasetConfig(),
        augmentation=AugmentationConfig(),
        backbone=place.config,
        init_from=InitFromConfig(weights=str(place.weights)),
        losses={},
        teacher=TeacherConfig(momentum=zero),
        optimizer=OptimizerConfig(lr=zero, weight_decay=zero),
    )
    blueprint = Blueprint.draw(place.registry, place.config, {})
    with open_weights(config, blueprint, place.registry) as weights:
        return Networks(blueprint, sharder(), 0, first=weights)


def start_training(place: Place) -> Measured:
    """``init_from``: student and teacher."""
    with Peak() as peak:
        networks = _started(place)
    return Measured(peak.bytes, held(networks.student) + held(networks.teacher))


def save_and_export(place: Place) -> Measured:
    """The teacher's export at the end of a run; saves the checkpoint that others read."""
    networks = _started(place)
    CheckpointStore(place.checkpoints).save(1, networks.named_state(), {})
    with Peak() as peak:
        export_gathered(
            place.folder / "end.safetensors", networks.teacher["backbone"], place.info()
        )
    return Measured(peak.bytes, 0)


def convert_checkpoint(place: Place) -> Measured:
    """A sharded checkpoint to one file."""
    target = place.folder / "converted.safetensors"
    with Peak() as peak:
        convert_backbone(place.checkpoints, target, registry=place.registry)
    return Measured(peak.bytes, 0)


# --------------------------------------------------------------------------- processes
Action = Callable[[Place], Measured]


def measure(actions: Sequence[Action], place: Place, processes: int) -> list[list[Measured]]:
    """Run actions one after the other on so many processes; of each, the figures by rank."""
    with tempfile.TemporaryDirectory() as scratch:
        before = dict(os.environ)
        os.environ.update(ALLOCATOR)
        try:
            arguments = (place.component, dict(place.options), place.folder)
            mp.spawn(_work, (processes, scratch, actions, arguments), nprocs=processes)
        finally:
            os.environ.clear()
            os.environ.update(before)
        by_rank = [
            torch.load(Path(scratch) / str(rank), weights_only=True) for rank in range(processes)
        ]
    return [[Measured(*each) for each in found] for found in zip(*by_rank, strict=True)]


def _work(
    rank: int, world: int, scratch: str, actions: Sequence[Action], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{scratch}/store", world)
    timeout = timedelta(minutes=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        place = Place(*arguments)
        place.meta()  # imports what is imported when it is built
        found = []
        for action in actions:
            found.append(tuple(action(place)))
            gc.collect()
            dist.barrier()
        torch.save(found, f"{scratch}/{rank}")
    finally:
        dist.destroy_process_group()


def rows(place: Place, counts: Sequence[int]) -> Iterator[list[str]]:
    largest = max(place.sizes())
    for index, count in enumerate([*counts, 1]):
        actions: list[Action] = [load_file, start_training, load_checkpoint]
        if index == 0:
            actions.insert(2, save_and_export)
        elif index == len(counts):
            actions = [convert_checkpoint]
        for action, found in zip(actions, measure(actions, place, count), strict=True):
            peak, kept = max(each.peak for each in found), max(each.kept for each in found)
            figures = [f"{value / MIB:,.0f}" for value in (kept, largest, peak)]
            what = (action.__doc__ or "").partition(";")[0].rstrip(".")
            yield [what, str(count), *figures, f"{peak / (kept + largest):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory that large backbones take.")
    parser.add_argument("--backbone", default="vit_large", help="a component's name")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(options.backbone, {}, Path(folder))
        place.write()
        size = sum(place.sizes()) / MIB
        print(f"{options.backbone}, {size:,.0f} MiB in float32; MiB, the worst process's\n")
        columns = ["what", "processes", "kept", "largest tensor", "peak", "peak / (kept + largest)"]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for row in rows(place, options.processes):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
