"""Kills and requests to stop, at any moment."""

from __future__ import annotations

import os
import random
import signal
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
    halted,
    judge,
    run,
    start,
    wait_for,
    wait_until,
)
from run_support import Started, processes_with

_ASKED = ("SIGTERM", "SIGUSR2")
_SAVE, _EXPORT = "checkpoints/.saving-*", "exports/.*"
_TRIES = 5  # a save of a tiny network takes some milliseconds, so that it may be missed


def kills(count: int) -> Cause:
    """SIGKILL at so many moments between the start of a run and its end."""

    def cause(place: Place) -> Iterator[Outcome]:
        chance = random.Random(0)
        for number in range(count):
            output = place.work / f"kill{number}"
            begun = start(output, "observers.pause.seconds=0.2", fresh=True)
            time.sleep(chance.uniform(1.0, 7.0))
            begun.process.kill()
            begun.finish()
            if not (output / "results.json").exists():  # or it was quicker
                yield again(place, output)

    return cause


def _halted(place: Place, pattern: str) -> tuple[Path, Started] | None:
    """A run that is halted within a save or an export; None if it was always quicker."""
    for number in range(_TRIES):
        output = place.work / f"halted{number}-{time.monotonic_ns()}"
        begun = start(output)
        if halted(begun, output, pattern):
            return output, begun
        begun.process.kill()
        begun.finish()
    return None


def killed_within(pattern: str) -> Cause:
    """SIGKILL while there are files that are not whole."""

    def cause(place: Place) -> Iterator[Outcome]:
        if (found := _halted(place, pattern)) is None:
            return
        output, begun = found
        begun.process.kill()
        begun.finish()
        left = list(output.glob(pattern))
        yield judge(bool(left), None, "nothing was left by the kill: not caused")
        yield again(place, output)
        swept = not any(path.exists() for path in left)
        yield judge(swept, None, "what the killed process left is still there")

    return cause


def rank_killed_within_a_save(place: Place) -> Iterator[Outcome]:
    """SIGKILL of one of two that write a checkpoint together; the other is not to complete it."""
    for number in range(_TRIES):
        output = place.work / f"rank{number}"
        begun = start(output, PAUSE, *TWO, fresh=True)
        wait_for(output, 1, begun)
        ranks = [pid for pid in processes_with(str(output)) if pid != begun.process.pid]
        while begun.process.poll() is None and not any(output.glob(_SAVE)):
            time.sleep(0.0005)
        with suppress(ProcessLookupError):
            os.kill(max(ranks), signal.SIGKILL)
        done = begun.finish()
        if any(output.glob(_SAVE)):  # or else the save was quicker
            yield ended(done, 1, "was killed by SIGKILL")
            yield again(place, output, *TWO)
            return


def asked_within(pattern: str) -> Cause:
    """A request to stop while there are files that are not whole."""

    def cause(place: Place) -> Iterator[Outcome]:
        for name in _ASKED:
            if (found := _halted(place, pattern)) is None:
                return
            output, begun = found
            begun.process.send_signal(getattr(signal, name))
            begun.process.send_signal(signal.SIGCONT)
            yield ended(begun.finish(60), 75)
            left = [*output.glob(_SAVE), *output.glob(_EXPORT), *output.glob("results.json")]
            yield judge(not left, None, f"left behind: {left[:1]}")
            yield again(place, output)

    return cause


def asked(name: str, code: int) -> Cause:
    """A request to stop between two steps."""

    def cause(place: Place) -> Iterator[Outcome]:
        output = place.work / name
        begun = start(output, PAUSE)
        wait_for(output, 1, begun)
        begun.process.send_signal(getattr(signal, name))
        yield ended(begun.finish(60), code)
        yield again(place, output)

    return cause


def asked_at_the_start(place: Place) -> Iterator[Outcome]:
    """While Python imports, when the check is printed, and when the folder is there."""
    for name in _ASKED:
        for moment in ("imports", "check", "folder"):
            output = place.work / f"{name}-{moment}"
            begun = start(output, fresh=True)
            if moment == "imports":
                time.sleep(0.5)
            elif moment == "check":
                wait_until(lambda: "recipe " in begun.files[0].read_text(), begun)  # noqa: B023
            else:
                wait_until((output / "recipe.toml").exists, begun)
            begun.process.send_signal(getattr(signal, name))
            done = begun.finish(60)
            if done.returncode == -getattr(signal, name):  # no line of ours had run yet
                yield judge(not output.exists(), done)
            else:
                yield ended(done, 75)
            yield again(place, output)


def asked_at_the_end(place: Place) -> Iterator[Outcome]:
    """In the last evaluation, which observers make when all steps are done."""
    for name, words in ((name, words) for name in _ASKED for words in ((), TWO)):
        output = place.work / f"{name}{len(words)}"
        observer = ("use=signal_at", "iteration=0", f"signal={name}", f"rank={int(bool(words))}")
        done = run(output, *words, *(f"observers.s.{word}" for word in observer))
        yield ended(done, 75)
        if not words:  # or else the other one may have completed what it had to do
            yield judge(not (output / "results.json").exists(), None, "it counts as complete")
        yield again(place, output, *words)


def launcher_killed(place: Place) -> Iterator[Outcome]:
    output = place.work / "launcher"
    begun = start(output, PAUSE, *TWO, fresh=True)
    wait_for(output, 1, begun)
    ranks = len(processes_with(str(output))) - 1
    yield judge(ranks >= 2, None, f"{ranks} ranks were there: not caused")
    begun.process.kill()
    begun.finish()
    began = time.monotonic()
    while processes_with(str(output)) and time.monotonic() - began < 30:
        time.sleep(0.1)
    seconds = time.monotonic() - began
    if left := processes_with(str(output)):
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        yield Outcome(False, "its ranks train on")
        return
    yield Outcome(seconds < 10, f"nothing; ranks ended after {seconds:.1f} s")
    yield again(place, output, *TWO)


def reader_hangs(place: Place) -> Iterator[Outcome]:
    """No worker reads, so that the process itself hangs when it is asked to stop."""
    output, mended = place.work / "reader", place.work / "mended"
    place.work.mkdir(parents=True)
    data = ("dataset.use=flaky", "dataset.hang_at=30", f"dataset.unless={mended}")
    begun = start(output, *data, "checkpoint.every=1", "parallel.timeout=2.0")
    wait_until(lambda: checkpoints(output), begun)
    time.sleep(3)
    begun.process.send_signal(signal.SIGTERM)
    yield ended(begun.finish(60), 75, "no step was reached")
    mended.touch()
    yield again(place, output, *data)


def faults(count: int) -> list[Fault]:
    return [
        Fault("killed", "SIGKILL at random moments", kills(count)),
        Fault("killed in a save", "SIGKILL with half a checkpoint there", killed_within(_SAVE)),
        Fault("killed in an export", "SIGKILL with half an export there", killed_within(_EXPORT)),
        Fault("a rank killed in a save", "SIGKILL of one of two", rank_killed_within_a_save),
        Fault("asked to stop", "SIGTERM", asked("SIGTERM", 75)),
        Fault("asked to stop", "SIGUSR2", asked("SIGUSR2", 75)),
        Fault("terminal closed", "SIGHUP", asked("SIGHUP", 75)),
        Fault("Ctrl-C", "SIGINT", asked("SIGINT", 130)),
        Fault("asked at the start", "both, at three moments", asked_at_the_start),
        Fault("asked in a save", "both, halted within it", asked_within(_SAVE)),
        Fault("asked in an export", "both, halted within it", asked_within(_EXPORT)),
        Fault("asked in the last evaluation", "both, by one of two, too", asked_at_the_end),
        Fault("asked while a reader hangs", "SIGTERM, no workers", reader_hangs),
        Fault("launcher killed", "SIGKILL of the parent of two ranks", launcher_killed),
    ]
