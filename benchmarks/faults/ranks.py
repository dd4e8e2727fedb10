"""Ranks, loader workers and plugins that fail, and numbers that are not finite."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from harness import (
    PAUSE,
    TWO,
    Cause,
    Fault,
    Outcome,
    Place,
    again,
    checkpoints,
    ended,
    judge,
    learnt,
    run,
    same,
    start,
    succeeds,
    undisturbed,
    wait_for,
)
from run_support import environment

_SHM = ("batch_size=120", "loader.workers=2")  # batches of 230 KiB


# --------------------------------------------------------------------------- ranks
def rank_hangs(place: Place) -> Iterator[Outcome]:
    trouble = ("losses.t.use=trouble", "losses.t.what=sleep", "losses.t.rank=1")
    words = (*TWO, *trouble, "losses.t.iteration=3", "parallel.timeout=5.0")
    yield ended(run(place.work / "hang", *words), 1, "parallel.timeout = 5 s", "(rank 1, last seen")


def rank_killed(place: Place) -> Iterator[Outcome]:
    output = place.work / "killed"
    killer = ("use=signal_at", "iteration=5", "rank=1")
    done = run(output, *TWO, *(f"observers.killer.{word}" for word in killer))
    yield ended(done, 1, "rank 1 ", "was killed by SIGKILL")
    yield again(place, output, *TWO)


# --------------------------------------------------------------------------- workers
def worker_killed(place: Place) -> Iterator[Outcome]:
    output, mended = place.work / "worker", place.work / "mended"
    place.work.mkdir(parents=True)
    data = ("dataset.use=flaky", "dataset.kill_at=30", f"dataset.unless={mended}")
    words = (*data, "loader.workers=2", "checkpoint.every=1")
    yield ended(run(output, *words), 2, "sample 30")
    mended.touch()
    yield again(place, output, *words)


def worker_starves(place: Place) -> Iterator[Outcome]:
    """The image that cannot be decoded counts as a corrupt one, and nothing else changes."""
    output, data = place.work / "starved", "dataset.use=flaky"
    done = run(output, data, "dataset.starve_at=0", "loader.workers=1")
    yield ended(done, 0)
    said = "takes more memory to decode than there is"
    yield judge(said in (output / "run.log").read_text(), None, "it was decoded: not caused")
    corrupt = undisturbed(place, data, "dataset.corrupt_every=64")
    yield judge(learnt(output) == learnt(corrupt), None, "other bits than with a corrupt image")


def _with_shared_memory(options: str) -> list[str]:
    """A program that gives another one a /dev/shm of its own, in a mount namespace."""
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    return ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"]


def no_shared_memory(options: str) -> Cause:
    def cause(place: Place) -> Iterator[Outcome]:
        within = _with_shared_memory(options)
        if not succeeds(*within, "true"):
            return
        output = place.work / "shm"
        yield ended(run(output, *_SHM, within=within), 2, "worker memory: ")
        if "ro" in options:
            yield again(place, output, _SHM[0], within=within)
        yield again(place, output, *_SHM)

    return cause


def shared_memory_fills(place: Place) -> Iterator[Outcome]:
    """While the run goes on, something else takes all there is."""
    within = _with_shared_memory("size=5m")
    if not succeeds(*within, "true"):
        return
    output = place.work / "shm"
    begun = start(output, *_SHM, PAUSE, within=within)
    wait_for(output, 1, begun)
    seen = Path(f"/proc/{begun.process.pid}/root/dev/shm")
    while begun.process.poll() is None:  # what batches leave free is taken, too
        with suppress(OSError):  # gone with the process
            fill(seen / "filler")
        time.sleep(0.005)
    yield ended(begun.finish(), 2, "worker memory: ")
    yield again(place, output, *_SHM)


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    with path.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\1" * size) == size:
                    continue
            except OSError:
                continue


# --------------------------------------------------------------------------- numbers
def not_finite(*words: str) -> Cause:
    """Nothing that is not finite is saved, and what is saved goes on where that is mended."""

    def cause(place: Place) -> Iterator[Outcome]:
        output = place.work / "run"
        yield ended(run(output, *words, "checkpoint.every=1"), 3, "not finite")
        yield judge(bool(checkpoints(output)), None, "no checkpoint is left")
        script = (
            "import sys; from pathlib import Path; "
            "from dinov3_framework.checkpoints.store import CheckpointStore; "
            "tensors, _ = CheckpointStore(Path(sys.argv[1])).read(); "
            "sys.exit(not all(t.isfinite().all() for t in tensors.values()))"
        )
        finite = succeeds(sys.executable, "-c", script, str(output / "checkpoints"))
        yield judge(finite, None, "the newest checkpoint is not finite")

    return cause


# --------------------------------------------------------------------------- plugins
_PLUGIN = """
import sys
from dinov3_framework import hookimpl

@hookimpl
def dinov3_losses():
    {does}
    return []
"""


def plugin(does: str, said: str) -> Cause:
    """An installed distribution whose hook does something that it should not."""

    def cause(place: Place) -> Iterator[Outcome]:
        site = place.work / "site"
        info = site / "odd_dist-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-dist\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[dinov3_framework]\nodd = odd_plugin\n")
        (site / "odd_plugin.py").write_text(_PLUGIN.format(does=does))
        path = os.pathsep.join([str(site), environment()["PYTHONPATH"]])
        options = {"fresh": True, "variables": {"PYTHONPATH": path}}
        output = place.work / "run"
        done = run(output, **options)
        yield ended(done, 0, "plugin 'odd' of distribution 'odd-dist'", said)
        yield same(place, output)
        shown = run(output, "--print-recipe", **options).stdout
        plain = run(output, "--print-recipe").stdout
        yield judge(shown == plain, None, "what it printed is in the recipe that was asked for")

    return cause


_POISON = ("losses.t.use=poison", "losses.t.iterations=[3, 4, 5, 6, 7]", "max_nonfinite_steps=2")
_OVERFLOW = ("optimizer.lr.peak=1e39", "optimizer.lr.warmup=1")
_BUFFER = ("losses.t.use=center", "losses.t.poisoned=[5]", "losses.t.late=true")

FAULTS = [
    Fault("a rank hangs", "sleeps in a loss", rank_hangs),
    Fault("a rank dies", "SIGKILL of one of two", rank_killed),
    Fault("a worker dies", "SIGKILL in `__getitem__`", worker_killed),
    Fault("a worker has no memory", "RLIMIT_AS while it decodes", worker_starves),
    Fault("/dev/shm is small", "a tmpfs of 400 KB", no_shared_memory("size=400k")),
    Fault("/dev/shm is read-only", "a tmpfs mounted so", no_shared_memory("size=5m,ro")),
    Fault("/dev/shm fills", "a tmpfs of 5 MB, filled meanwhile", shared_memory_fills),
    Fault("NaN", "a loss gives it step after step", not_finite(*_POISON)),
    Fault("NaN in a buffer", "a loss leaves it in its state", not_finite(*_BUFFER)),
    Fault("overflow", "an update after the finite check", not_finite(*_OVERFLOW)),
    Fault("a plugin prints", "a hook", plugin('print("welcome")', "printed: welcome")),
    Fault("a plugin exits", "a hook calls sys.exit", plugin("sys.exit(0)", "SystemExit")),
]
