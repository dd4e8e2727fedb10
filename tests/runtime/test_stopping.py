"""Signals: whenever they come, a process ends soon, and with a code that says why."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import popen
from run_support import (
    TINY,
    Started,
    command,
    environment,
    metrics,
    processes_with,
    run,
    run_here,
    start,
)

from dinov3_framework.errors import ExitCode

LONG = ("iterations=100000", "checkpoint.every=100000")
TWO = ("launcher.use=local", "launcher.processes=2")


def python(script: str, *numbers: int, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A few lines of Python, signalled each time that they print; the code counts."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from dinov3_framework.runtime.stopping import *\n{script}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )
    assert process.stdout is not None
    for number in numbers:
        assert process.stdout.readline()
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def wait_until(path: Path, started: Started, text: str = "") -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline
        assert started.process.poll() is None
        time.sleep(0.02)


# --------------------------------------------------------------------------- anywhere
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 75, "stopped by SIGTERM"), ("SIGHUP", 75, "")],
)
def test_an_import_that_swallows_interrupts(
    tmp_path: Path, name: str, code: int, words: str
) -> None:
    (tmp_path / "swallows.py").write_text(
        "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "except BaseException:\n    raise ImportError\n"
    )
    done = python("with EndOnSignal(): import swallows", getattr(signal, name), cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.slow
def test_what_swallows_an_interrupt_elsewhere_ends_too() -> None:
    script = """
with EndOnSignal():
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            continue
"""
    assert python(script, signal.SIGUSR2).returncode == ExitCode.REQUEUE
    assert python(script, signal.SIGINT, signal.SIGINT).returncode == ExitCode.INTERRUPTED


def test_what_nohup_ignores_stays_ignored() -> None:
    script = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with EndOnSignal(), StopFlag() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    print(bool(stop))
"""
    done = python(script)
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_the_end_of_a_program_keeps_its_code() -> None:
    script = """
import sys
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 15)
late = Late()
with EndOnSignal() as ending:
    ending.code = 3
sys.exit(3)
"""
    assert python(script).returncode == 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_at_the_start(tmp_path: Path, name: str) -> None:
    output = tmp_path / "run"
    started = start(output)
    wait_until(started.files[0], started, "recipe ")
    started.process.send_signal(getattr(signal, name))
    done = started.finish()
    assert done.returncode == (ExitCode.INTERRUPTED if name == "SIGINT" else ExitCode.REQUEUE)
    assert "Traceback" not in done.stderr


def test_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "run"
    last = ("observers.s.use=signal_at", "observers.s.iteration=0", "observers.s.signal=SIGTERM")
    done = run(output, *last)
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    assert "stopped by SIGTERM" in done.stderr
    assert not (output / "results.json").exists()
    assert run_here(output).returncode == 0
    assert len(metrics(output)) == 6


@pytest.mark.slow
def test_an_evaluation(tmp_path: Path) -> None:
    assert run_here(tmp_path / "run").returncode == 0
    recipe, output = tmp_path / "knn.toml", tmp_path / "measured"
    recipe.write_text(
        f'task = "evaluate"\nweights = "{tmp_path / "run"}"\n[evaluations.knn]\nuse = "knn"\n'
        'train = { use = "fashion_mnist", split = "train" }\n'
        'test = { use = "fashion_mnist", split = "test" }\nsize = 224\n'
    )
    started = start(output, recipe=recipe)
    wait_until(output / "recipe.toml", started)
    started.process.send_signal(signal.SIGTERM)
    done = started.finish()
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    assert not (output / "results.json").exists()


# --------------------------------------------------------------------------- in the loop
def test_a_second_ctrl_c_quits(tmp_path: Path) -> None:
    output = tmp_path / "run"
    started = start(output, *LONG, "observers.slow.use=pause", "observers.slow.seconds=600")
    wait_until(output / "run.log", started)
    time.sleep(1)
    started.process.send_signal(signal.SIGINT)
    wait_until(started.files[1], started, "Ctrl-C again to quit now")
    started.process.send_signal(signal.SIGINT)
    done = started.finish(timeout=30)
    assert done.returncode == ExitCode.INTERRUPTED
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_reader_that_hangs(tmp_path: Path) -> None:
    output = tmp_path / "run"
    data = ("dataset.use=flaky", "dataset.hang_at=30", "checkpoint.every=1")
    started = start(output, *data, "iterations=50", "parallel.timeout=2.0")
    wait_until(output / "metrics.jsonl", started, '"iteration": 1')
    time.sleep(3)
    started.process.send_signal(signal.SIGTERM)
    done = started.finish(timeout=30)
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    assert "no step was reached" in done.stderr
    assert any((output / "checkpoints").glob("step_*"))


def test_a_terminal_that_closes(tmp_path: Path) -> None:
    output, (master, slave) = tmp_path / "run", pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        process = popen(command(output, *LONG), env=environment(), stdout=terminal, stderr=terminal)
    started = Started(process, (TINY, TINY))
    wait_until(output / "metrics.jsonl", started, '"iteration": 2')
    os.close(master)
    started.process.send_signal(signal.SIGHUP)
    assert started.process.wait(60) == ExitCode.REQUEUE
    assert any((output / "checkpoints").glob("step_*"))


# --------------------------------------------------------------------------- ranks
@pytest.mark.slow
def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    output = tmp_path / "run"
    hangs = ("dataset.use=flaky", "dataset.hang_at=30", "loader.workers=1")
    words = command(output, *LONG, *TWO, *hangs)
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(words, env=environment(), stdout=log, stderr=log)
    wait_until(output / "metrics.jsonl", Started(launcher, (TINY, TINY)), '"iteration": 1')
    time.sleep(3)
    assert len(processes_with(str(output))) == 5
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 4
    while processes_with(str(output)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
