"""Runs that somebody disturbs, and how they are judged.

A run begins as a fork of a process that has imported everything, or, ``fresh``, as anybody's: the
former spares seconds of imports and is a process of its own in all else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from run_support import (  # noqa: E402
    TINY,
    Started,
    command,
    environment,
    export_bytes,
    losses,
    started,
)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, runs would ignore it, as they should

Done = subprocess.CompletedProcess[str]

_RUN = ("iterations=12", "checkpoint.every=2", "observers.pause.use=pause")
_NO_PAUSE = "observers.pause.seconds=0.0"
PAUSE = "observers.pause.seconds=0.2"
TWO = ("launcher.use=local", "launcher.processes=2", "launcher.shutdown_timeout=5")
# Keys that change nothing of what is learnt, so that an undisturbed run does without them.
_FREE = ("observers", "launcher.shutdown_timeout", "parallel.timeout", "checkpoint", "loader")


class Outcome(NamedTuple):
    """Whether a run survived a fault, and what was lost."""

    survived: bool
    lost: str


class Place(NamedTuple):
    """Where a fault is caused: a folder of its own, and one of runs that several compare with."""

    work: Path
    shared: Path


Cause = Callable[[Place], Iterator[Outcome]]


class Fault(NamedTuple):
    """Something that goes wrong, how it is injected, and what does it."""

    name: str
    how: str
    cause: Cause


# --------------------------------------------------------------------------- runs
def words_of(words: Sequence[str]) -> list[str]:
    """Overrides with those that all runs here have, where they say nothing else."""
    given = {word.partition("=")[0] for word in words}
    return [
        *(word for word in (*_RUN, _NO_PAUSE) if word.partition("=")[0] not in given),
        *words,
    ]


def start(
    output: Path,
    *words: str,
    recipe: Path = TINY,
    fresh: bool = False,
    within: Sequence[str] = (),
    variables: dict[str, str] | None = None,
    plain: bool = False,
    **options: Any,
) -> Started:
    """Begin a run; ``within`` are the words of a program that starts it, ``plain`` adds none."""
    overrides = words if plain else words_of(words)
    line = command(output, *overrides, recipe=recipe)
    if within or fresh:
        line = [*(within or ["env"]), *line]
    return started(line, env=environment() | (variables or {}), **options)


def run(output: Path, *words: str, **options: Any) -> Done:
    """One start of a run, to its end."""
    return start(output, *words, **options).finish()


def checkpoints(output: Path) -> list[Path]:
    """The complete ones, from the oldest."""
    return sorted(path.parent for path in output.glob("checkpoints/step_*/COMPLETE"))


def wait_until(what: Callable[[], object], begun: Started, seconds: float = 90) -> bool:
    """Wait for something to become true of a run that goes on; whether it did."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if what():
            return True
        if begun.process.poll() is not None:
            return bool(what())
        time.sleep(0.02)
    return False


def wait_for(output: Path, count: int, begun: Started) -> None:
    """Until so many checkpoints were saved; older ones may be gone by then."""
    if not wait_until(lambda: _saves(output) >= count, begun):
        raise TimeoutError(f"{output}: no {count} checkpoints; {begun.finish(1).stderr}")


def _saves(output: Path) -> int:
    there = checkpoints(output)
    return int(there[-1].name.removeprefix("step_")) // 2 if there else 0


def halted(begun: Started, output: Path, pattern: str) -> bool:
    """Halt a process (SIGSTOP) while it has a file there; whether that was caught."""
    until = time.monotonic() + 60
    while time.monotonic() < until and begun.process.poll() is None:
        if any(output.glob(pattern)):
            os.kill(begun.process.pid, signal.SIGSTOP)
            time.sleep(0.02)
            if any(output.glob(pattern)):
                return True
            os.kill(begun.process.pid, signal.SIGCONT)
        time.sleep(0.0005)
    return False


def undisturbed(place: Place, *words: str) -> Path:
    """A run that nobody disturbs; made once for each set of words that change what is learnt."""
    kept = [word for word in words if not word.startswith(_FREE)]
    name = "-".join(["undisturbed", *(word.replace("/", "_")[-40:] for word in kept)])
    output = place.shared / name
    if not (output / "results.json").exists():
        done = run(output, *kept)
        if done.returncode != 0:
            raise RuntimeError(f"a run that nobody disturbs failed: {done.stderr}")
    return output


def finished(place: Place) -> Path:
    """A copy of a complete run, to be harmed."""
    return _copied(undisturbed(place), place)


def interrupted(place: Place, *words: str) -> Path:
    """A copy of a run that was killed after its second checkpoint, to be harmed."""
    name = "-".join(["interrupted", *(word.replace("/", "_")[-40:] for word in words)])
    output = place.shared / name
    if not output.exists():
        begun = start(output, PAUSE, *words)
        wait_for(output, 2, begun)
        begun.process.kill()
        begun.finish()
    return _copied(output, place)


def _copied(output: Path, place: Place) -> Path:
    place.work.mkdir(parents=True, exist_ok=True)
    target = place.work / f"run{len(list(place.work.iterdir()))}"
    return Path(shutil.copytree(output, target, symlinks=True))


# --------------------------------------------------------------------------- judgments
def learnt(output: Path) -> tuple[bytes, list[tuple[int, str]]]:
    """The export, and every figure of metrics.jsonl that is not a time, in hex."""
    return export_bytes(output), losses(output)


def judge(right: bool, done: Done | None, what: str = "") -> Outcome:
    """``what`` is what was lost if not all is right; left out, the last that was said."""
    if right:
        return Outcome(True, "nothing")
    said = "" if done is None else f"exit code {done.returncode}: {_last_line(done.stderr)}"
    return Outcome(False, what or said)


def ended(done: Done, code: int, *said: str) -> Outcome:
    """Whether a run ended with a code and said certain words, and nobody saw a traceback."""
    right = done.returncode == code and all(words in done.stderr for words in said)
    return judge(right and "Traceback" not in done.stderr, done)


def refused(output: Path, said: str, *words: str, **options: Any) -> Outcome:
    """Start, and be refused with exit code 2 and one clear complaint."""
    return ended(run(output, *words, **options), 2, said)


def again(place: Place, output: Path, *words: str, **options: Any) -> Outcome:
    """Start once more, to the end, and compare with a run that nobody disturbed."""
    done = run(output, *words, **options)
    if done.returncode != 0:
        return judge(False, done)
    return same(place, output, *words)


def same(place: Place, output: Path, *words: str) -> Outcome:
    """Whether a run that is complete has the bits of one that nobody disturbed."""
    equal = learnt(output) == learnt(undisturbed(place, *words))
    return judge(equal, None, "other bits than an undisturbed run's")


def _last_line(text: str) -> str:
    return next((line for line in text.splitlines()[::-1] if line.strip()), "")[:100]


def succeeds(*line: str) -> bool:
    """Whether a program is there and does what it is asked to."""
    try:
        return subprocess.run(line, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
