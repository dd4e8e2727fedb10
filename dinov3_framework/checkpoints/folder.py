"""The folder that checkpoints lie in: their names, how they appear there and how they go.

Works on files alone; one process of a run calls what changes anything.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from dinov3_framework.checkpoints.manifest import MARKER
from dinov3_framework.runtime.durable import sync

_log = logging.getLogger(__name__)

_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced"
_NAME = re.compile(rf"step_(\d{{8,}})({re.escape(_REPLACED)})?")


def name_of(step: int) -> str:
    """``step_00001200``"""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a folder is a checkpoint of, in force or replaced, by its name."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


class CheckpointFolder:
    """Checkpoints as folders ``step_00001200`` in ``path``.

    A checkpoint that gives way to another of the same step is ``step_00001200.replaced`` for a
    moment, which :meth:`newest_first` knows too: at no time is there none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left: set[str] = set()  # what could not be removed

    def newest_first(self) -> list[Path]:
        """All checkpoints, whole or not; of one step the replaced one last."""
        return [path for _, path in reversed(self._entries())]

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending; their contents are not verified."""
        return sorted({step for step, path in self._entries() if (path / MARKER).is_file()})

    def make_room(self, step: int) -> Path:
        """Remove what killed processes left and make a fresh folder to write to."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            if path.name.startswith((_SAVING, _REMOVING)) and path.name not in self._left:
                _log.info("removing %s, left by an interrupted process", path)
                self._delete(path)
        aside = self.path / f"{_SAVING}{name_of(step)}-{secrets.token_hex(4)}"
        aside.mkdir()
        return aside

    def publish(self, aside: Path, step: int) -> Path:
        """Give a whole checkpoint its name."""
        target = self.path / name_of(step)
        if target.exists():
            replaced = target.with_name(target.name + _REPLACED)
            self._remove(replaced)
            target.rename(replaced)
        aside.rename(target)
        sync(self.path)
        return target

    def prune(
        self, newest: int, keep: int, keep_every: int | None, damaged: Collection[str]
    ) -> None:
        """Remove what step ``newest`` supersedes: all but the ``keep`` newest and every
        ``keep_every``-th; checkpoints named in ``damaged`` count for nothing.

        Later steps, of a run that was resumed from an earlier one, are left alone.
        """
        entries = [(step, path) for step, path in self._entries() if step <= newest]
        present = {path.name for _, path in entries}
        sound = sorted({step for step, path in entries if path.name not in damaged})
        wanted = set(sound[-keep:])
        if keep_every is not None:
            wanted.update(step for step in sound if step % keep_every == 0)
        for step, path in entries:
            superseded = path.name != name_of(step) and name_of(step) in present
            if (superseded or step not in wanted) and path.name not in self._left:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint if that can be done; a link stays, as does what it leads to."""
        if path.is_symlink():
            self._leave(path, "it is a symbolic link")
        elif path.exists():
            # Renamed first, so that one half removed is not taken for one that was damaged.
            doomed = self.path / f"{_REMOVING}{path.name}-{secrets.token_hex(4)}"
            try:
                path.rename(doomed)
            except OSError as error:
                self._leave(path, error)
            else:
                self._delete(doomed)

    def _delete(self, path: Path) -> None:
        try:
            shutil.rmtree(path)
        except OSError as error:
            self._leave(path, error)

    def _leave(self, path: Path, reason: object) -> None:
        self._left.add(path.name)
        _log.warning("%s cannot be removed and is left there: %s", path, reason)

    def _entries(self) -> list[tuple[int, Path]]:
        if not self.path.is_dir():
            return []
        entries = []
        for path in self.path.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None and path.is_dir():
                entries.append((int(match[1]), path))
        return sorted(entries, key=lambda entry: (entry[0], entry[1].name == name_of(entry[0])))
