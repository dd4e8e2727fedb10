"""The one trainer: its loop, its optimizer, its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from dinov3_framework.checkpoints import CheckpointConfig
from dinov3_framework.configs import (
    ImagesConfig,
    InvalidOption,
    config,
    not_negative,
    option,
    positive,
)
from dinov3_framework.data import LoaderConfig
from dinov3_framework.kinds import DatasetConfig, ObserverConfig, OptimizerConfig, TaskConfig
from dinov3_framework.parallel import ParallelConfig

CHECKPOINTS = "checkpoints"  # below a run's folder
RECIPE_IDENTITY = "recipe"  # in a checkpoint: what decides on what its run learns
DATA = "data"  # in a checkpoint: the digest of the run's data
ORIGIN = "init_from"  # in a checkpoint: where the first values came from
STREAMS = "streams"  # in a checkpoint: where streams go on


@config
class TrainingConfig(TaskConfig):
    """What all trainings share: data, an optimizer, and the loop around them."""

    iterations: int = option(
        "optimizer steps of the run; 0 leaves it to epochs", default=0, check=not_negative
    )
    epochs: float | None = option(
        "passes over the data that the run is to make, in place of iterations",
        default=None,
        check=positive,
    )
    batch_size: int = option("images of one optimizer step, over all processes", check=positive)
    accumulation_steps: int = option(
        "micro-batches that a process splits its share of the batch into",
        default=1,
        check=positive,
    )
    dataset: DatasetConfig = option("where the images come from")
    images: ImagesConfig = option("channels and normalization", factory=ImagesConfig)
    optimizer: OptimizerConfig = option("how the networks learn")
    loader: LoaderConfig = option("how batches are made", factory=LoaderConfig)
    parallel: ParallelConfig = option("devices, precision, sharding", factory=ParallelConfig)
    checkpoint: CheckpointConfig = option("what is saved when", factory=CheckpointConfig)
    observers: dict[str, ObserverConfig] = option(
        "what watches the run, by names of your choice", factory=dict
    )
    log_every: int = option("iterations between lines of metrics.jsonl", default=10, check=positive)
    max_nonfinite_steps: int = option(
        "steps in a row that may be skipped for a NaN or inf before the run ends",
        default=3,
        check=not_negative,
    )

    def __attrs_post_init__(self) -> None:
        if not (self.iterations or self.epochs):
            raise InvalidOption("iterations", "missing: how long the run is; or give epochs")
        if self.iterations and self.epochs:
            raise InvalidOption(
                "epochs",
                f"{self.epochs:g}, and iterations are {self.iterations:,}: one of them says how "
                'long the run is; set epochs = "none" or iterations = 0',
            )

    def free_keys(self, output_dir: Path) -> Sequence[str]:
        """Where the data lie, if a checkpoint says by their names whether they are the same."""
        from dinov3_framework.checkpoints.store import CheckpointStore
        from dinov3_framework.runtime.output import is_complete

        if is_complete(output_dir) or DATA not in CheckpointStore(output_dir / CHECKPOINTS).peek():
            return ()
        return self.places()

    def places(self) -> Sequence[str]:
        return list(_places("dataset", self.dataset))


def _places(key: str, dataset: DatasetConfig) -> Iterator[str]:
    """The keys of a dataset, and of those that it is made of, that say where something lies."""
    cls: Any = type(dataset)
    for field in attrs.fields(cls):
        value = getattr(dataset, field.name)
        if field.metadata.get("is_place"):
            yield f"{key}.{field.name}"
        elif isinstance(value, DatasetConfig):
            yield from _places(f"{key}.{field.name}", value)
        elif isinstance(value, Mapping):
            for name, part in value.items():
                if isinstance(part, DatasetConfig):
                    yield from _places(f"{key}.{field.name}.{name}", part)
