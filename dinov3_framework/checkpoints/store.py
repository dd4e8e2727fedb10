"""Checkpoints of a run: whole or not there, checked when read, loadable on any number of processes.

A checkpoint is a folder ``step_00001200`` of torch.distributed.checkpoint shards (one file a
process), their index, ``state.json``, a manifest with every file's SHA-256 and a marker. It is
written as ``.saving-...`` and renamed when all of it is on the disk, so that a process killed at
any moment leaves the checkpoints before it as they were. All processes must see the same folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov3_framework.checkpoints.folder import CheckpointFolder, step_of
from dinov3_framework.checkpoints.manifest import STATE, Damage, FileRecord, Manifest, parse_state
from dinov3_framework.checkpoints.safe_reader import SafeReader, check_fit
from dinov3_framework.checkpoints.shard_writer import INDEX
from dinov3_framework.checkpoints.shards import load_shards, write_shards
from dinov3_framework.errors import CheckpointError
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import (
    RankFailure,
    broadcast_from_rank0,
    gather_from_all_ranks,
    run_on_all_ranks,
)
from dinov3_framework.runtime.durable import no_room, read_file, write_and_sync

_log = logging.getLogger(__name__)


@frozen
class Restored:
    """What a checkpoint held besides the tensors, and the folder it is."""

    step: int
    state: dict[str, Any]
    path: Path


@frozen
class _Sound:
    """A checkpoint whose files are those of its manifest."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]

    def reader(self) -> SafeReader:
        return SafeReader(self.path, self.manifest.files)


Select = Callable[[Mapping[str, TensorStorageMetadata]], Mapping[str, Tensor]]
_Prepare = Callable[[_Sound], tuple[SafeReader, Mapping[str, Tensor]]]


class CheckpointStore:
    """The checkpoints in one folder.

    The ``keep`` newest stay, and every one whose step is a multiple of ``keep_every``. ``save``,
    ``restore`` and ``read`` are to be called by all processes together.
    """

    def __init__(self, folder: Path, *, keep: int = 3, keep_every: int | None = None) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError("keep and keep_every must be at least 1")
        self.folder = Path(folder)
        self._entries = CheckpointFolder(self.folder)
        self._keep, self._keep_every = keep, keep_every
        self._damaged: set[str] = set()

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending; contents are not verified."""
        return self._entries.complete_steps()

    def peek(self) -> dict[str, Any]:
        """The ``state`` of the newest complete checkpoint, not verified; empty if there is none.

        By one process for itself.
        """
        for path in self._entries.newest_first():
            try:
                return parse_state(read_file(path / STATE))
            except (OSError, Damage):
                continue
        return {}

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Save all tensors and ``state`` (JSON values; rank 0's) as the checkpoint of ``step``.

        ``tensors`` has the same names on all processes; its values are plain tensors, equal on all
        processes, or DTensors, of which each process writes its shards. Returns when everything is
        on the disk and what it supersedes is removed. Raises ``CheckpointError`` on all processes
        if it fails on any; the checkpoints before it are then untouched.
        """
        aside: Path | None = None
        try:
            text = run_on_all_ranks(json.dumps, dict(state), allow_nan=False, indent=1)
            aside = broadcast_from_rank0(self._entries.make_room, step)
            names = write_shards(aside, tensors)
            records = gather_from_all_ranks(_records, aside, names)
            files = {name: record for part in records for name, record in part.items()}
            target = broadcast_from_rank0(self._commit, step, aside, files, text)
        except RankFailure as failure:
            if aside is not None and collectives.is_main():
                shutil.rmtree(aside, ignore_errors=True)
            raise self._cannot_save(step, failure) from failure
        self._damaged.discard(target.name)
        if collectives.is_main():
            self._entries.prune(step, self._keep, self._keep_every, self._damaged)
            _log.info("saved %s", target)
        return target

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        *,
        accept: Callable[[Mapping[str, Any]], None] | None = None,
        step: int | None = None,
        select: Select | None = None,
    ) -> Restored | None:
        """Load the newest sound checkpoint into ``tensors``, in place; None if there is none.

        ``step`` asks for the checkpoint of that step alone. ``select`` gets the checkpoint's
        tensors by name and says which of ``tensors`` to load; without it, names must be the same.
        ``accept`` gets the checkpoint's state before anything is loaded and may raise. A damaged
        checkpoint is passed over, on all processes alike and with a warning. Raises
        ``CheckpointError`` if all are damaged, or if names, shapes or dtypes are not exactly those
        of ``tensors``; after an error ``tensors`` may be partly overwritten.
        """

        def prepare(found: _Sound) -> tuple[SafeReader, Mapping[str, Tensor]]:
            if accept is not None:
                accept(found.state)
            reader = found.reader()
            saved = reader.tensors()
            if select is None:
                check_fit(found.path, saved, tensors)
                return reader, tensors
            wanted = select(saved)
            check_fit(found.path, {n: saved[n] for n in wanted if n in saved}, wanted)
            return reader, wanted

        return self._load_newest(prepare, step)

    def read(self, prefix: str = "") -> tuple[dict[str, Tensor], Restored]:
        """All tensors whose names start with ``prefix``, whole, on the CPU, without a model.

        From the newest sound checkpoint; names keep their prefix. Raises ``CheckpointError`` if
        there is no checkpoint or no such tensor.
        """
        whole: dict[str, Tensor] = {}

        def prepare(found: _Sound) -> tuple[SafeReader, Mapping[str, Tensor]]:
            reader = found.reader()
            for name, entry in reader.tensors().items():
                if name.startswith(prefix):
                    whole[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            if not whole:
                known = ", ".join(sorted({name.split(".")[0] for name in reader.tensors()}))
                raise CheckpointError(
                    f"{found.path} has no tensor whose name starts with {prefix!r}; the names "
                    f"start with: {known}"
                )
            return reader, whole

        restored = self._load_newest(prepare)
        if restored is None:
            raise CheckpointError(f"there is no checkpoint in {self.folder}")
        return whole, restored

    def _commit(self, step: int, aside: Path, files: dict[str, FileRecord], state: str) -> Path:
        for name, record in files.items():
            path = aside / name
            if not path.is_file() or path.stat().st_size != record.bytes:
                raise CheckpointError(
                    f"{name}, which another process wrote, is not in {aside}: the output folder "
                    "must be on a file system that all machines share"
                )
        write_and_sync(aside / STATE, state.encode())
        Manifest(step, files | {STATE: FileRecord.of(aside / STATE)}).write(aside)
        return self._entries.publish(aside, step)

    def _cannot_save(self, step: int, failure: RankFailure) -> CheckpointError:
        reasons = (no_room(each.errno, self.folder) for each in failure.failures)
        reason = next((reason for reason in reasons if reason is not None), None)
        remedy = "mend that" if reason is None else "make room, or keep fewer checkpoints"
        last = max(self.steps(), default=None)
        left = "there is none before it" if last is None else f"that of step {last:,} is untouched"
        return CheckpointError(
            f"cannot save the checkpoint of step {step:,} in {self.folder}: {reason or failure}\n"
            f"{left}; {remedy} and run the same command again"
        )

    def _load_newest(self, prepare: _Prepare, step: int | None = None) -> Restored | None:
        """``prepare`` says what to load from a sound checkpoint, or raises to end it all."""
        troubles = []
        try:
            for path in broadcast_from_rank0(self._entries.newest_first):
                if step not in (None, step_of(path)):
                    continue
                found, damages = _examine(path)
                if found is not None:
                    reader, tensors = run_on_all_ranks(prepare, found)
                    damages = _load(reader, tensors)
                    if not damages:
                        return Restored(found.manifest.step, found.state, path)
                self._damaged.add(path.name)
                troubles.append(f"{path.name} is damaged: {'; '.join(damages)}")
                if collectives.is_main():
                    _log.warning("passing over checkpoint %s", troubles[-1])
        except RankFailure as failure:
            raise failure.for_person() from None
        if troubles:
            raise CheckpointError(
                "\n  ".join([f"no checkpoint in {self.folder} can be used:", *troubles])
                + "\nbring one back from a copy, or start in another output folder"
            )
        return None


def _records(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    return {name: FileRecord.of(folder / name) for name in names}


def _load(reader: SafeReader, tensors: Mapping[str, Tensor]) -> list[str]:
    """What went wrong, the same on all processes."""
    try:
        load_shards(reader, tensors)
    except RankFailure as failure:
        return [str(failure)]
    return []


def _examine(path: Path) -> tuple[_Sound | None, list[str]]:
    """The checkpoint, or what is wrong with it; each process reads its share of the bytes."""
    found, damages = broadcast_from_rank0(_open, path)
    if found is None:
        return None, damages
    share = found.manifest.share(collectives.rank(), collectives.world_size())
    damages = [
        line for part in gather_from_all_ranks(found.manifest.damages, path, share) for line in part
    ]
    return (None, damages) if damages else (found, [])


def _open(path: Path) -> tuple[_Sound | None, list[str]]:
    try:
        manifest = Manifest.read(path)
        for name in (STATE, INDEX):
            if name not in manifest.files:
                raise Damage(name, "is not in the manifest")
        damages = manifest.damages(path, [STATE])
        if damages:
            return None, damages
        return _Sound(path, manifest, parse_state(read_file(path / STATE))), []
    except Damage as damage:
        return None, [str(damage)]
