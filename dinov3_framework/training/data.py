"""The data of a training: how long a run of so many epochs is, and what a check says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.configs import ImagesConfig, replace
from dinov3_framework.contracts.data import Dataset, StreamDataset
from dinov3_framework.errors import CheckpointError, DataError, OutputError, Problem, RecipeError
from dinov3_framework.recipes.describe import rounded
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.output import (
    elsewhere,
    identity,
    identity_complaint,
    is_of_recipe,
)
from dinov3_framework.training import (
    CHECKPOINTS,
    DATA,
    ORIGIN,
    RECIPE_IDENTITY,
    STREAMS,
    TrainingConfig,
)

Config = TypeVar("Config", bound=TrainingConfig)

_MANY = 10_000  # passes over the data; the published runs on ImageNet-1k make some hundred


def build_dataset(
    config: TrainingConfig, registry: Registry, images: ImagesConfig
) -> Dataset | StreamDataset:
    """The recipe's data; raises ``DataError`` where they are missing or empty."""
    dataset: Dataset | StreamDataset = registry.build(config.dataset, channels=images.channels)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError(f"{dataset.describe()}: holds no image")
    return dataset


def with_iterations(
    config: Config, registry: Registry, images: Callable[[], ImagesConfig]
) -> tuple[Config, Dataset | StreamDataset | None]:
    """The same recipe with its epochs in iterations, and the data, where they had to be counted.

    Raises ``UserError`` where epochs are given and the data cannot be counted.
    """
    if config.epochs is None:
        return config, None
    instead = "\n    give iterations in place of epochs where that is so"
    try:
        dataset = build_dataset(config, registry, images())
    except DataError as error:
        raise DataError(f"epochs: the data are not here to be counted: {error}{instead}") from error
    if not isinstance(dataset, Dataset):
        text = f"{dataset.describe()} is a stream, which has no length{instead}"
        raise RecipeError([Problem("epochs", text)])
    iterations = max(round(config.epochs * len(dataset) / config.batch_size), 1)
    return replace(config, epochs=None, iterations=iterations), dataset


def state_problems(
    config: TrainingConfig, registry: Registry, dataset: Dataset | StreamDataset | None
) -> Iterator[Problem]:
    """Whether a run that goes on would be another than before, or see other data."""
    folder = Path(config.output_dir or "")
    state = {} if config.output_dir is None else CheckpointStore(folder / CHECKPOINTS).peek()
    if malformed(state):
        return  # the run will say so, if no older checkpoint is sound
    remedy = elsewhere(config, folder)
    if state and is_of_recipe(config, registry, folder):
        now = identity(config, registry)
        if complaint := identity_complaint(state.get(RECIPE_IDENTITY), now, remedy):
            yield Problem("output_dir", f"the newest checkpoint in {folder} {complaint}")
    if complaint := data_complaint(state, dataset, remedy):
        yield Problem("dataset", complaint)


def malformed(state: Mapping[str, Any]) -> str:
    """Which part of a checkpoint's state is no table and should be one; "" if none is."""
    tables = (RECIPE_IDENTITY, ORIGIN, STREAMS)
    return ", ".join(key for key in tables if not isinstance(state.get(key, {}), Mapping))


def require_same_run(
    state: Mapping[str, Any],
    config: TrainingConfig,
    folder: Path,
    now: Mapping[str, Any] | None,
    dataset: Dataset | StreamDataset,
) -> None:
    """Raise ``UserError`` unless a checkpoint's state is of this run, and of these data.

    ``now`` is the recipe's identity, where it is known.
    """
    there, remedy = f"{folder / CHECKPOINTS}: a checkpoint there", elsewhere(config, folder)
    if parts := malformed(state):
        raise CheckpointError(
            f"{there} is malformed: in its state, {parts} should be a table\n"
            f"    remove it from the folder, or {remedy}"
        )
    if now and (complaint := identity_complaint(state.get(RECIPE_IDENTITY), now, remedy)):
        raise OutputError(f"{there} {complaint}")
    if complaint := data_complaint(state, dataset, remedy):
        raise DataError(f"dataset: {complaint}")


def data_complaint(
    state: Mapping[str, Any], dataset: Dataset | StreamDataset | None, remedy: str
) -> str:
    """How data differ from those that a checkpoint's run has seen; "" if they do not.

    ``remedy`` is what to do in place of bringing them back.
    """
    before = state.get(DATA)
    if before is None or not isinstance(dataset, Dataset) or before == (now := dataset.digest()):
        return ""
    return (
        f"is not the data that this run began with: {before} then, {now} now\n"
        f"    bring those back, or {remedy}"
    )


def data_rows(
    config: TrainingConfig, dataset: Dataset | StreamDataset | None, complaint: str = ""
) -> list[tuple[str, str]]:
    """What is known of the data; ``dataset`` is None where this machine does not have it.

    ``complaint`` is one more note.
    """
    seen = config.iterations * config.batch_size
    rows = [("images seen", f"{seen:,}")]
    if dataset is not None:
        rows.insert(0, ("dataset", dataset.describe()))
    if isinstance(dataset, Dataset):
        passes = seen / len(dataset)
        rows.append(("passes over the data", rounded(passes)))
        notes = list(dataset.notes())
        if config.batch_size > len(dataset):
            notes.append(
                f"a step shows {config.batch_size:,} images, the data are {len(dataset):,}"
            )
        if passes > _MANY:
            notes.append("so many passes are meant for more data; fewer iterations may do")
        rows += [("note", note) for note in notes]
    if complaint:
        rows.append(("note", complaint.replace("\n    ", "; ")))
    return rows
