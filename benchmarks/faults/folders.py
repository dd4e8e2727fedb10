"""Disks that are full, and files of a run that are damaged, foreign, locked or gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import (
    PAUSE,
    ROOT,
    Cause,
    Fault,
    Outcome,
    Place,
    again,
    checkpoints,
    ended,
    finished,
    halted,
    interrupted,
    judge,
    refused,
    run,
    same,
    start,
    succeeds,
    wait_for,
    wait_until,
)
from ranks import fill
from run_support import losses

from dinov3_framework.checkpoints.manifest import FileRecord, Manifest

_AS_ANYBODY = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "env")  # root's rights dropped


# --------------------------------------------------------------------------- disks
@contextmanager
def _disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of a certain size; whether it could be mounted."""
    folder.mkdir(parents=True)
    mounted = succeeds("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def disk_full(place: Place) -> Iterator[Outcome]:
    with _disk(place.work / "disk", "1m") as mounted:
        if mounted:
            output = place.work / "disk" / "run"
            yield ended(run(output), 2, "disk full")
            grow = ["mount", "-o", "remount,size=64m", str(place.work / "disk")]
            subprocess.run(grow, check=True)
            yield again(place, output)


def disk_full_at_the_end(place: Place) -> Iterator[Outcome]:
    """All is trained and saved; the export finds no room."""
    with _disk(place.work / "disk", "8m") as mounted:
        if mounted:
            output, filler = place.work / "disk" / "run", place.work / "disk" / "filler"
            begun = start(output)
            if not halted(begun, output, "exports/.*"):
                return  # it was quicker
            fill(filler)
            begun.process.send_signal(signal.SIGCONT)
            yield ended(begun.finish(), 2, "cannot be written: disk full")
            yield judge(not (output / "results.json").exists(), None, "it counts as complete")
            filler.unlink()
            yield again(place, output)


def metrics_full(place: Place) -> Iterator[Outcome]:
    """The disk fills between two checkpoints, and lines of metrics and of the log find no room."""
    with _disk(place.work / "disk", "8m") as mounted:
        if mounted:
            output, filler = place.work / "disk" / "run", place.work / "disk" / "filler"
            words = ("checkpoint.every=4", "dataset.use=flaky", "dataset.corrupt_every=2")
            begun = start(output, PAUSE, *words)
            wait_for(output, 2, begun)
            fill(filler)
            yield ended(begun.finish(), 2, "metrics.jsonl cannot be written: disk full")
            saved = [path.name for path in checkpoints(output)]
            yield judge(saved == ["step_00000004"], None, f"checkpoints: {saved}")
            filler.unlink()
            yield again(place, output, *words)


# --------------------------------------------------------------------------- checkpoints
def damaged(*harms: Callable[[Path], object]) -> Cause:
    """The newest checkpoint is harmed, in several ways one after the other."""

    def cause(place: Place) -> Iterator[Outcome]:
        for harm in harms:
            output = interrupted(place)
            harm(checkpoints(output)[-1])
            yield again(place, output)

    return cause


def _shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


def truncate(checkpoint: Path) -> None:
    os.truncate(_shard(checkpoint), _shard(checkpoint).stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    content = bytearray(_shard(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    _shard(checkpoint).write_bytes(content)


def vouch(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file and have the manifest vouch for it."""
    manifest = Manifest.read(checkpoint)
    for each in (name, "manifest.json", "COMPLETE"):
        (checkpoint / each).unlink()
    (checkpoint / name).write_bytes(content)
    record = FileRecord.of(checkpoint / name)
    Manifest(manifest.step, {**manifest.files, name: record}).write(checkpoint)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def other_checkpoint(place: Place) -> Iterator[Outcome]:
    ours, other = interrupted(place), interrupted(place, "seed=1")
    shutil.rmtree(ours / "checkpoints")
    shutil.copytree(other / "checkpoints", ours / "checkpoints")
    yield refused(ours, "is of another run")


# --------------------------------------------------------------------------- leftovers
def immutable(place: Place) -> Iterator[Outcome]:
    output = interrupted(place)
    kept = checkpoints(output)[0] / "state.json"
    if not succeeds("chattr", "+i", str(kept)):
        return
    try:
        yield again(place, output)
        yield judge("cannot be removed" in (output / "run.log").read_text(), None, "nobody said so")
    finally:
        for path in output.rglob(kept.name):
            succeeds("chattr", "-i", str(path))


def foreign(place: Place) -> Iterator[Outcome]:
    """An old checkpoint belongs to another user, whose files this one must not touch."""
    output = interrupted(place)
    if os.geteuid() != 0 or not succeeds(*_AS_ANYBODY, "true"):
        return
    old = checkpoints(output)[0]
    for path in (old, *old.iterdir()):
        os.chown(path, 65534, 65534)
    yield again(place, output, within=_AS_ANYBODY)
    yield judge("cannot be removed" in (output / "run.log").read_text(), None, "nobody said so")


def linked(place: Place) -> Iterator[Outcome]:
    output = interrupted(place)
    old = checkpoints(output)[0]
    moved = Path(shutil.move(old, output.with_name("elsewhere")))
    old.symlink_to(moved)
    before = sorted(path.name for path in moved.iterdir())
    yield again(place, output)
    kept = old.is_symlink() and sorted(path.name for path in moved.iterdir()) == before
    yield judge(kept, None, "what the link leads to was removed")


# --------------------------------------------------------------------------- other files
def pipes(place: Place) -> Iterator[Outcome]:
    """Files of a run that are FIFOs: to read one would wait for ever."""
    for name in ("recipe.toml", "metrics.jsonl", "run.log", "results.json", "environment.json"):
        output = interrupted(place)
        _pipe(output / name)
        yield refused(output, f"{name} is no regular file")


def metrics_byte(place: Place) -> Iterator[Outcome]:
    output = interrupted(place)
    file = output / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\xff\x00{\n", *lines[1:]]))
    done = run(output)
    yield ended(done, 0)
    good = [line for line in file.read_bytes().splitlines(keepends=True) if line[:2] == b'{"']
    file.write_bytes(b"".join(good))
    yield same(place, output)


def results(content: str | None) -> Cause:
    """results.json, which says that a run is complete, is not what it was."""

    def cause(place: Place) -> Iterator[Outcome]:
        output = finished(place)
        if content is None:
            (output / "results.json").unlink()
        else:
            (output / "results.json").write_text(content)
        yield again(place, output)
        whole = "task" in json.loads((output / "results.json").read_text())
        yield judge(whole, None, "there are no results")

    return cause


def recipe_gone(place: Place) -> Iterator[Outcome]:
    for output in (interrupted(place), finished(place)):
        (output / "recipe.toml").unlink()
        yield again(place, output)


# --------------------------------------------------------------------------- whose folder it is
def two_runs(place: Place) -> Iterator[Outcome]:
    output = place.work / "run"
    begun = start(output, "observers.pause.seconds=0.7")
    wait_for(output, 1, begun)
    (output / ".lock").open().close()  # somebody looks at it
    yield refused(output, "is in use by process")
    yield ended(begun.finish(), 0)
    yield same(place, output)


def lock_removed(place: Place) -> Iterator[Outcome]:
    output = place.work / "run"
    begun = start(output, "observers.pause.seconds=0.7")
    wait_for(output, 1, begun)
    (output / ".lock").unlink()
    wait_until((output / ".lock").exists, begun)
    yield refused(output, "is in use by process")
    yield ended(begun.finish(), 0)
    yield same(place, output)


def folder_gone(place: Place) -> Iterator[Outcome]:
    output, moved = place.work / "run", place.work / "moved"
    begun = start(output, PAUSE)
    wait_for(output, 1, begun)
    output.rename(moved)
    yield ended(begun.finish(), 2, "was removed or renamed while")
    yield again(place, moved)


def students_folder(place: Place) -> Iterator[Outcome]:
    """Of several students that learn side by side, one's own recipe is started alone."""
    crops = ("augmentation.global_size=64", "augmentation.local_size=32")
    wide = ("backbone.embed_dim=48", "backbone.num_heads=4", "backbone.patch_size=16")
    teacher = place.work / "teacher"
    yield ended(run(teacher, *wide, *crops), 0)
    recipe = ROOT / "tests" / "support" / "tiny_multi_distill.toml"
    two = ("students.wide.processes=1", "launcher.processes=2", 'drop=["students.conv"]')
    words = (f"teacher.weights={teacher}", *two)
    whole, output = place.work / "whole", place.work / "run"
    yield ended(run(whole, *words, recipe=recipe), 0)
    begun = start(output, *words, "observers.pause.seconds=1.0", recipe=recipe)
    student = output / "wide"
    wait_until(lambda: checkpoints(student), begun)
    yield refused(student, "is in use by process", recipe=student / "recipe.toml", plain=True)
    yield ended(begun.finish(), 0)
    yield judge(losses(student) == losses(whole / "wide"), None, "other figures than undisturbed")


def _state(content: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: vouch(checkpoint, "state.json", content)


_FILES = ("state.json", "manifest.json", "COMPLETE", ".metadata")
_PIPED = [lambda checkpoint, name=name: _pipe(checkpoint / name) for name in _FILES]
_STATES = [_state(content) for content in (b"{", b"[1]", b"\xff", b"[" * 100_000)]

FAULTS = [
    Fault("disk full", "a tmpfs of 1 MB", disk_full),
    Fault("disk full at the end", "a tmpfs filled during the export", disk_full_at_the_end),
    Fault("metrics and log find no room", "a tmpfs filled between two saves", metrics_full),
    Fault("shard truncated", "`os.truncate` of the newest", damaged(truncate)),
    Fault("byte altered", "one bit of the newest", damaged(flip)),
    Fault("index missing", "`unlink` in the newest", damaged(lambda c: (c / ".metadata").unlink())),
    Fault("state malformed", "with the hash in the manifest", damaged(*_STATES)),
    Fault("checkpoint's files are FIFOs", "four files of the newest", damaged(*_PIPED)),
    Fault("run's files are FIFOs", "five files", pipes),
    Fault("leftover is immutable", "`chattr +i` in an old checkpoint", immutable),
    Fault("leftover is another's", "`chown`, root's rights dropped", foreign),
    Fault("checkpoint is a link", "an old one, moved away", linked),
    Fault("metrics damaged", "bytes that are no text in a line", metrics_byte),
    Fault("results empty", "after the end", results("")),
    Fault("results damaged", "no JSON, after the end", results('{"task')),
    Fault("results missing", "after the end", results(None)),
    Fault("recipe missing", "before and after the end", recipe_gone),
    Fault("checkpoint of another run", "copied in", other_checkpoint),
    Fault("two runs", "a second start, its lock file read", two_runs),
    Fault("two runs", "a student of several started alone", students_folder),
    Fault("lock file removed", "`unlink` while it trains", lock_removed),
    Fault("folder moved away", "rename while it trains", folder_gone),
]
