"""``continue_from``: a run that goes on with another run's training, as a later stage does.

Networks, optimizer and the count of iterations are taken over from one checkpoint of the other run;
everything else is this run's own. Names and shapes are compared before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from attrs import frozen
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov3_framework.checkpoints.folder import CheckpointFolder, name_of, step_of
from dinov3_framework.checkpoints.manifest import Damage, Manifest
from dinov3_framework.checkpoints.safe_reader import SafeReader
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import CheckpointError, Problem
from dinov3_framework.parallel.sharder import tensors_of
from dinov3_framework.training.trainer import Trainer
from dinov3_framework.weights import sharded as sharded_weights
from dinov3_framework.weights.matching import match
from dinov3_ssl.configs import ContinueFromConfig, StudentTrainingConfig
from dinov3_ssl.preflight import Parts

_STUDENT, _LOSSES, _ANCHORS = "student.", "losses.", "anchors."


@frozen
class _Place:
    """One checkpoint of another run."""

    folder: Path  # of its checkpoints
    iteration: int

    @property
    def path(self) -> Path:
        return self.folder / name_of(self.iteration)


def problems(
    origin: ContinueFromConfig, parts: Parts, config: StudentTrainingConfig
) -> list[Problem]:
    """Why this run cannot go on there; nothing but names and shapes is read."""
    place = _located(origin)
    if isinstance(place, Problem):
        return [place]
    if place.iteration >= config.iterations:
        return [
            Problem(
                "iterations",
                f"is {config.iterations:,}, and the run goes on after iteration "
                f"{place.iteration:,} of {origin.run}: nothing would be left to do",
                "iterations count from the beginning of the other run; take more",
            )
        ]
    try:
        saved = SafeReader(place.path, Manifest.read(place.path).files).tensors()
    except (CheckpointError, Damage) as error:
        return [Problem("continue_from.run", f"{place.path} cannot be used: {error}")]
    theirs = {
        name.removeprefix(_STUDENT): tuple(entry.size)
        for name, entry in saved.items()
        if name.startswith((_STUDENT, _LOSSES))
    }
    _, differences = match(
        _wanted(parts), theirs, new=origin.new, unused=origin.unused, table="continue_from"
    )
    return differences


def iteration_of(origin: ContinueFromConfig) -> int:
    """The iteration that a run goes on after; 0 if there is no such checkpoint."""
    place = _located(origin)
    return 0 if isinstance(place, Problem) else place.iteration


def rows(origin: ContinueFromConfig) -> list[tuple[str, str]]:
    """What a check says of it."""
    place = _located(origin)
    if isinstance(place, Problem):
        return []
    return [("run", origin.run), ("goes on after iteration", f"{place.iteration:,}")]


def take_over(origin: ContinueFromConfig, trainer: Trainer) -> tuple[int, dict[str, str]]:
    """Load the other run's state into a trainer's, in place; its iteration, and word of it.

    To be called by every process. Raises ``CheckpointError`` where the checkpoint is damaged.
    """
    place = _located(origin)
    if isinstance(place, Problem):
        raise CheckpointError(f"{place.where}: {place.message}")
    tensors = trainer.tensors()
    owners = {f"optimizer.{name}": owner for name, owner in trainer.optimizer.owners().items()}

    def select(saved: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
        def is_new(name: str) -> bool:
            """Whether a tensor keeps its value: its owner in the student is new."""
            owner = owners.get(name, name).removeprefix("teacher.").removeprefix(_STUDENT)
            return name not in saved and any(fnmatchcase(owner, each) for each in origin.new)

        return {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith(_ANCHORS) and not is_new(name)
        }

    restored = CheckpointStore(place.folder).restore(tensors, step=place.iteration, select=select)
    if restored is None:
        raise CheckpointError(f"{place.path} is gone")
    before = restored.state.get("init_from", {})
    return restored.step, before | {
        "continue_from": origin.run,
        "continue_from.iteration": str(restored.step),
    }


def _located(origin: ContinueFromConfig) -> _Place | Problem:
    where, path = "continue_from.run", Path(origin.run)
    if not path.exists():
        return Problem(where, f"there is no {path}", "give the folder of the run to go on with")
    wanted = origin.iteration
    folder = sharded_weights.checkpoint_in(path)
    if folder is None and sharded_weights.is_checkpoint(path):
        step = step_of(path)
        if step is None or wanted not in (None, step):
            return Problem(where, f"{path} is not the checkpoint of iteration {wanted}")
        folder, wanted = path.parent, step
    if folder is None:
        return Problem(where, f"there is no checkpoint in {path}")
    steps = CheckpointFolder(folder).complete_steps()
    if not steps:
        return Problem(where, f"there is no complete checkpoint in {folder}")
    if wanted is None:
        return _Place(folder, steps[-1])
    if wanted not in steps:
        shown = ", ".join(f"{step:,}" for step in steps[-8:])
        return Problem(
            "continue_from.iteration",
            f"there is no checkpoint of iteration {wanted:,} in {folder}",
            f"there are those of {shown}",
        )
    return _Place(folder, wanted)


def _wanted(parts: Parts) -> dict[str, Shape]:
    """Names and shapes of what this run takes over; teacher and optimizer are like the student."""
    shapes: dict[str, Shape] = {
        name: tuple(tensor.shape) for name, tensor in tensors_of(parts.blueprint.student())
    }
    for name, loss in parts.losses.items():
        shapes |= {f"{_LOSSES}{name}.{n}": tuple(b.shape) for n, b in loss.named_buffers()}
    return shapes
