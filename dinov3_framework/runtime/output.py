"""The output folder of a run: who may write into it, and what says that it is complete.

    recipe.toml  metrics.jsonl  run.log  checkpoints/  exports/  figures/  results.json

``results.json`` comes last, by a rename: where it is, the run is complete.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinov3_framework.errors import ExitCode, OutputError
from dinov3_framework.kinds import TaskConfig
from dinov3_framework.recipes.plain import unstructure
from dinov3_framework.recipes.toml_text import KeyPath, parse_toml, to_toml
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.durable import (
    clear_aside,
    irregular,
    parse_json,
    read_file,
    unwritable,
    written_aside,
)
from dinov3_framework.runtime.inner_runs import naming_stage
from dinov3_framework.runtime.lock import locked, refuse_in_use, verify_held

log = logging.getLogger(__name__)

RECIPE, RESULTS = "recipe.toml", "results.json"
# What any run leaves. The recipe goes last: while it is there, the rest is known to be a run's.
_OF_ANY_RUN = ("results.csv", "run.log", "environment.json", RESULTS, RECIPE)
# Keys that may change between two starts of the same run: they do not touch what is learnt.
_FREE_KEYS = (
    "output_dir",
    "launcher",
    "loader",
    "workers",
    "checkpoint",
    "observers",
    "parallel.timeout",
    "teacher.weights",  # its fingerprint is compared
    # These change how fast and in how much memory, and figures by no more than rounding.
    "parallel.replicas",
    "parallel.checkpointing",
    "parallel.compile",
    "log_every",
    "max_nonfinite_steps",
    "stages",  # each has a folder, and a recipe there
)


class RunComplete(OutputError):
    """Nothing is left to do."""

    exit_code = ExitCode.OK


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when all of it is there: a whole file or none.

    Makes the folder. Raises ``OutputError`` where the file cannot be written, or where a folder
    that this process holds is not its own any more.
    """
    verify_held()
    try:
        with written_aside(path) as aside:
            yield aside
    except OSError as error:
        raise unwritable(error, path) from error


def write_aside(path: Path, text: str) -> None:
    """Write a whole file or none; errors as of :func:`output_file`."""
    with output_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def prepared(
    config: TaskConfig,
    registry: Registry,
    output_dir: Path,
    inherited: Iterable[KeyPath] = (),
) -> Iterator[None]:
    """Make the folder ready for this recipe and hold it, or say why not.

    ``inherited`` are keys whose values are paths into folders beside this one, which may have moved
    with it. Raises :class:`RunComplete` if there is nothing left to do and :class:`OutputError` if
    the folder is in use, belongs to another recipe, or cannot be written.
    """
    with locked(output_dir):
        _refuse(config, registry, output_dir, inherited)
        _set_aside_unusable(output_dir)
        if (output_dir / RESULTS).exists():  # there is more in it to do than there was
            _remove(output_dir / RESULTS)
        clear_aside(output_dir)
        write_aside(output_dir / RECIPE, to_toml(unstructure(registry, config)))
        yield


def check_output(config: TaskConfig, registry: Registry, output_dir: Path) -> None:
    """Raise what :func:`prepared` would, as far as it can be told without writing anything."""
    refuse_in_use(output_dir)
    _refuse(config, registry, output_dir)
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise OutputError(f"{there} is no folder; choose another --output-dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{there} cannot be written; choose another --output-dir")


def _refuse(
    config: TaskConfig, registry: Registry, output_dir: Path, inherited: Iterable[KeyPath] = ()
) -> None:
    """Raise :class:`OutputError` where this recipe cannot run in a folder, or need not."""
    if complaint := irregular(output_dir):
        raise OutputError(f"{complaint}, or choose another --output-dir")
    _refuse_another_recipe(config, registry, output_dir, inherited)
    if not _inner_runs_complete(config, registry, output_dir):
        return
    path = output_dir / RESULTS
    if is_complete(output_dir):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        raise RunComplete(
            f"This run is complete (since {when}): {path}\n  {elsewhere(config, output_dir)}"
        )


def check_overwrite(config: TaskConfig, registry: Registry, output_dir: Path) -> None:
    """Raise ``OutputError`` for a task whose runs are not overwritten, and for another's run."""
    task = registry.of_config(config).component.name
    if config.overwritten is None:
        raise OutputError(
            f"--overwrite is not for the task {task}; choose another --output-dir, or delete "
            f"{output_dir} yourself"
        )
    before = (_read_recipe(output_dir) or {"task": task}).get("task")
    if before != task:
        raise OutputError(
            f"{output_dir} holds a run of the task {before}, which --overwrite does not delete for "
            f"one of {task}; choose another --output-dir"
        )


def overwrite(config: TaskConfig, registry: Registry, output_dir: Path) -> None:
    """Delete what an earlier run of the same task left in the folder, and nothing else.

    Raises ``OutputError`` as :func:`check_overwrite` does.
    """
    check_overwrite(config, registry, output_dir)
    with locked(output_dir):
        if (output_dir / RECIPE).exists():
            patterns = (*_named_files(output_dir), *(config.overwritten or ()), *_OF_ANY_RUN)
            for path in dict.fromkeys(itertools.chain(*map(output_dir.glob, patterns))):
                _remove(path)


def _named_files(output_dir: Path) -> list[str]:
    """The files in the folder that its results.json names, as patterns."""
    try:
        names = parse_json(read_file(output_dir / RESULTS)).get("files", [])
        inside = [each for each in names if not os.path.isabs(each) and ".." not in each]
        return [glob.escape(each) for each in inside]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def elsewhere(config: TaskConfig, output_dir: Path) -> str:
    """What to do about a folder that another run of this recipe cannot have."""
    if config.overwritten is not None:
        return "choose another --output-dir, or add --overwrite"
    ways = config.ways_on(output_dir)
    return "choose another --output-dir" + (f"; there, {ways}" if ways else "")


def is_complete(output_dir: Path) -> bool:
    """Whether a run has left its results, whole, beside its recipe."""
    try:
        results = parse_json(read_file(output_dir / RESULTS))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and (output_dir / RECIPE).exists()


def _set_aside_unusable(output_dir: Path) -> None:
    """Rename results that are none of a complete run, which would be taken for one later."""
    path = output_dir / RESULTS
    if path.is_file() and not is_complete(output_dir):
        why = "there is no recipe beside it"
        if (output_dir / RECIPE).exists():
            why = "it is empty or no JSON object"
        aside = path.with_name(f"{RESULTS}.unusable")
        try:
            path.replace(aside)
        except OSError as error:
            raise unwritable(error, path) from error
        log.warning("%s does not mean a complete run: %s; it is now %s", path, why, aside.name)


def _inner_runs_complete(config: TaskConfig, registry: Registry, output_dir: Path) -> bool:
    """Whether there is nothing left to do for the runs inside; refuses as for this one."""
    runs = config.inner_runs(output_dir)
    for run in runs:
        with naming_stage(run.name):
            _refuse_another_recipe(run.config, registry, output_dir / run.name, run.inherited)
    complete = {run.name for run in runs if is_complete(output_dir / run.name)}
    for run in runs:
        absent = sorted({name for name in run.inherited.values() if name not in complete})
        if absent and (output_dir / run.name / RECIPE).exists():
            raise OutputError(
                f"stage {run.name} has begun with what stage {absent[0]} left, and that one is not "
                f"complete any more; delete {output_dir / run.name} too, so that it starts anew"
            )
    return len(complete) == len(runs)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise unwritable(error, path) from error


def _refuse_another_recipe(
    config: TaskConfig, registry: Registry, output_dir: Path, inherited: Iterable[KeyPath] = ()
) -> None:
    before = _read_recipe(output_dir)
    if before is None:
        return
    recipe, free = unstructure(registry, config), config.free_keys(output_dir)
    old, new = _settled(flatten(before), inherited), _settled(flatten(recipe), inherited)
    if changed := _differences(old, new, free):
        raise OutputError(
            f"{output_dir} holds a run of another recipe:\n{changed}\n"
            f"  {elsewhere(config, output_dir)}"
        )


def is_of_recipe(config: TaskConfig, registry: Registry, output_dir: Path) -> bool:
    """Whether what a folder holds, if anything, may go on with this recipe."""
    try:
        _refuse_another_recipe(config, registry, output_dir)
    except OutputError:
        return False
    return True


def identity(config: TaskConfig, registry: Registry) -> dict[str, Any]:
    """What a recipe says of what is learnt, by key: a checkpoint's way to know its run again.

    Two runs of one identity and the same data are the same bits. Paths are left out: folders move.
    """
    flat = flatten(unstructure(registry, config))
    places = {key for key, value in flat.items() if isinstance(value, str) and "/" in value}
    places.update(config.places())
    return {key: value for key, value in flat.items() if key not in places and not _is_free(key)}


def identity_complaint(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], remedy: str
) -> str:
    """How a checkpoint's run is another one than this; "" if it is not, or if nobody knows.

    ``remedy`` is what to do in place of removing the checkpoint, as :func:`elsewhere` says.
    """
    changed = "" if before is None else _differences(before, now)
    return changed and (
        f"is of another run:\n{changed}\n    remove it from the folder, or {remedy}"
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """The first keys that have other values, a line each; "" if there are none."""
    changed = sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key) and key not in free and not _is_free(key)
    )
    lines = (f"    {key}: {_show(old, key)} there, {_show(new, key)} now" for key in changed[:8])
    more = [f"    and {len(changed) - 8} more"] if len(changed) > 8 else []
    return "\n".join([*lines, *more])


def _read_recipe(output_dir: Path) -> dict[str, Any] | None:
    """The recipe of the run that the folder holds, if there is one."""
    path = output_dir / RECIPE
    if not path.exists():
        return None
    try:
        return parse_toml(read_file(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is no recipe: {error}; choose another --output-dir") from error


def _settled(flat: dict[str, Any], inherited: Iterable[KeyPath]) -> dict[str, Any]:
    """The same with inherited paths as they are seen from the run's own folder."""
    here = flat.get("output_dir")
    for key in map(".".join, inherited):
        if isinstance(flat.get(key), str) and here is not None:
            flat[key] = os.path.relpath(flat[key], here)
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def _show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "nothing"


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
