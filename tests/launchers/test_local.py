"""The ``local`` launcher: how many processes, and what their ends mean."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from dinov3_launchers import LocalConfig
from dinov3_launchers.local import LocalLauncher

from dinov3_framework import ExitCode, Job, JobHandle, Registry, Resources, UserError


def launcher(processes: int | None) -> LocalLauncher:
    built = Registry.load().build(LocalConfig(processes=processes))
    assert isinstance(built, LocalLauncher)
    return built


def never() -> int:
    raise AssertionError("the job was run in this process")


def launch(tmp_path: Path, script: str, processes: int = 2) -> int:
    """Run a few lines of Python, which know their ``rank``, as a job."""
    path = tmp_path / "job.py"
    path.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{script}\n")
    job = Job(command=[sys.executable, str(path), "an argument"], output_dir=tmp_path, run=never)
    return launcher(processes).submit(job).wait()


# --------------------------------------------------------------------------- how many
@pytest.mark.parametrize(
    ("processes", "gpus", "world", "words"),
    [
        (None, 0, 1, "this process"),
        (None, 4, 4, "4 processes of this machine (torchrun)"),
        (1, 4, 1, "this process"),
        (3, 0, 3, "3 processes of this machine (torchrun)"),
    ],
)
def test_how_many(
    monkeypatch: pytest.MonkeyPatch, processes: int | None, gpus: int, world: int, words: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert launcher(processes).world_size() == world
    job = Job(command=["true"], output_dir=Path(), run=never)
    assert launcher(processes).preview(job) == words


@pytest.mark.parametrize("code", [0, 2, 75])
def test_one_process_is_this_one(tmp_path: Path, code: int) -> None:
    job = Job(command=["no such program"], output_dir=tmp_path, run=lambda: code)
    assert launcher(1).submit(job).wait() == code


def test_a_job_may_ask_for_its_own_number_of_processes() -> None:
    job = Job(command=["true"], output_dir=Path(), run=never)
    assert launcher(1).preview(job, Resources(processes_per_node=3)).startswith("3 processes")
    with pytest.raises(UserError, match="2 nodes are asked for"):
        launcher(1).submit(job, Resources(nodes=2))


def test_a_job_runs_once_however_often_it_is_waited_for(tmp_path: Path) -> None:
    ran: list[str] = []

    def job(name: str) -> Job:
        return Job(command=["true"], output_dir=tmp_path, run=lambda: ran.append(name) or 0)

    first = launcher(1).submit(job("first"))
    others = [launcher(1).submit(job(name), after=[first]) for name in ("second", "third")]
    assert ran == [], "a job runs when it is waited for"
    assert [other.wait() for other in others] == [0, 0]
    assert ran == ["first", "second", "third"]


def test_a_job_in_a_queue_cannot_be_waited_for(tmp_path: Path) -> None:
    class Queued(JobHandle):
        id = "41"

        def wait(self) -> int:
            return 0

    job = Job(command=["true"], output_dir=tmp_path, run=never)
    with pytest.raises(UserError, match="cannot wait for 41"):
        launcher(1).submit(job, after=[Queued()])


# --------------------------------------------------------------------------- several
def test_each_process_knows_its_place(tmp_path: Path) -> None:
    script = """
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"]
open(f"{os.path.dirname(__file__)}/rank{rank}", "w").write(
    " ".join([*(os.environ[name] for name in names), *sys.argv[1:]]))
"""
    assert launch(tmp_path, script) == ExitCode.OK
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == f"{rank} 2 {rank} localhost an argument"


@pytest.mark.parametrize(
    "code", [ExitCode.WRONG_INPUT, ExitCode.DIVERGED, ExitCode.REQUEUE, ExitCode.INTERRUPTED]
)
def test_a_code_that_explains_itself_is_passed_on(
    tmp_path: Path, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, f"sys.exit({int(code)})") == code
    assert capsys.readouterr().err == "", "the process has said everything"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(
    tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"os.kill(os.getpid(), signal.SIGKILL) if rank == {rank} else time.sleep(60)"
    assert launch(tmp_path, script) == ExitCode.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert f"rank {rank} (pid " in line
    assert "was killed by SIGKILL" in line
    assert "The same command goes on from the last checkpoint." in line


def test_a_crash_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, "sys.exit(7) if rank else time.sleep(60)") == ExitCode.FAILED
    assert "rank 1 (pid " in (err := capsys.readouterr().err)
    assert "ended with exit code 7" in err


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", ExitCode.REQUEUE),
        ("SIGUSR2", ExitCode.REQUEUE),
        ("SIGINT", ExitCode.INTERRUPTED),
    ],
)
def test_a_signal_is_handed_on_and_waited_for(tmp_path: Path, name: str, code: int) -> None:
    """The processes get time to save; the launcher's own process is signalled by rank 0."""
    script = f"""
def save(number, frame):
    time.sleep(0.5)
    open(f"{{os.path.dirname(__file__)}}/saved{{rank}}", "w").close()
    sys.exit(75)
for each in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
    signal.signal(each, save)
folder = os.path.dirname(__file__)
open(f"{{folder}}/ready{{rank}}", "w").close()
while rank == 0 and not os.path.exists(f"{{folder}}/ready1"):
    time.sleep(0.02)
if rank == 0:
    os.kill(os.getppid(), signal.{name})
time.sleep(60)
"""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        assert launch(tmp_path, script) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
