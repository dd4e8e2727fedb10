"""The ``slurm`` launcher: the batch script, how it is submitted, and what it does in a job.

A cluster's commands are scripts on PATH: ``sbatch`` keeps what it is given, ``srun`` starts the
processes of a job one after another, ``scontrol`` and ``scancel`` take note.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dinov3_launchers import SlurmConfig
from dinov3_launchers.slurm import SlurmLauncher

from dinov3_framework import (
    ExitCode,
    InvalidOption,
    Job,
    JobHandle,
    Registry,
    Resources,
    UserError,
)
from dinov3_framework.cli import main

COMMANDS = {
    "sbatch": 'cp "$1" "$CALLS/script"; echo "$@" >> "$CALLS/sbatch"; env > "$CALLS/env"\n'
    'echo "Submitted batch job $((40 + $(wc -l < "$CALLS/sbatch")))"',
    "srun": """\
while [[ "$1" == --* ]]; do
    echo "$1" >> "$CALLS/srun"
    if [[ "$1" == --output ]]; then shift; fi
    shift
done
code=0
for rank in 0 1 2 3; do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 "$@" \\
        || code=$?
done
exit $code""",
    "scontrol": 'echo "$@" >> "$CALLS/scontrol"',
    "scancel": 'echo "$@" >> "$CALLS/scancel"',
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster's commands on PATH, and the folder with what they were called with."""
    calls, programs = tmp_path / "calls", tmp_path / "bin"
    calls.mkdir()
    programs.mkdir()
    for name, text in COMMANDS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    return calls


def never() -> int:
    raise AssertionError("the job was run in this process")


def job(folder: Path, *command: str) -> Job:
    return Job(command or ("python", "a file.py"), folder / "runs" / "mine", never, "mine")


def launcher(**options: Any) -> SlurmLauncher:
    built = Registry.load().build(SlurmConfig(**options))
    assert isinstance(built, SlurmLauncher)
    return built


def flags(text: str) -> dict[str, str | None]:
    """Options of a batch script by name."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    words = [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]
    pairs = [word.removeprefix("--").partition("=") for word in words]
    return {name: value if sign else None for name, sign, value in pairs}


# --------------------------------------------------------------------------- the script
def test_without_options_the_cluster_decides(tmp_path: Path) -> None:
    found = flags(launcher().preview(job(tmp_path)))
    assert found == {
        "job-name": "mine",
        "nodes": "1",
        "ntasks-per-node": "1",
        "open-mode": "append",
        "output": str(tmp_path / "runs/mine/slurm/%j_0_log.out"),
        "requeue": None,
        "signal": "USR2@300",
    }
    assert launcher().world_size() == 1


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"nodes": 4}, "nodes", "4"),
        ({"gpus_per_node": 8}, "gpus-per-node", "8"),
        ({"gpus_per_node": 8}, "ntasks-per-node", "8"),
        ({"gpus_per_node": 8, "processes_per_node": 2}, "ntasks-per-node", "2"),
        ({"cpus_per_process": 12}, "cpus-per-task", "12"),
        ({"memory": "64G"}, "mem", "64G"),
        ({"hours": 1.5}, "time", "90"),
        ({"hours": 0.001}, "time", "1"),
        ({"partition": "long"}, "partition", "long"),
        ({"account": "mine"}, "account", "mine"),
        ({"qos": "high"}, "qos", "high"),
        ({"constraint": "a100&nvlink"}, "constraint", "a100&nvlink"),
        ({"exclude": "n[1-3]"}, "exclude", "n[1-3]"),
        ({"nice": 0}, "nice", "0"),
        ({"comment": "it's mine"}, "comment", "it's mine"),
        ({"shutdown_timeout": 60}, "signal", "USR2@60"),
        ({"requeue": False}, "no-requeue", None),
        ({"sbatch": {"reservation": "a b"}}, "reservation", "a b"),
        ({"sbatch": {"exclusive": ""}}, "exclusive", None),
        ({"sbatch": {"dependency": "singleton"}}, "dependency", "singleton"),
    ],
)
def test_every_option_reaches_sbatch(
    tmp_path: Path, options: dict[str, Any], name: str, value: str | None
) -> None:
    found = flags(launcher(**options).preview(job(tmp_path)))
    assert name in found
    assert found[name] == value
    assert ("requeue" in found) is not ("no-requeue" in found)


def test_no_option_is_forgotten() -> None:
    """Every one of them changes the script."""
    plain = launcher().preview(job(Path("/x")))
    values = {int: 7, float: 7.0, str: "7", bool: False, dict: {"seven": "7"}, tuple: ("seven",)}
    kinds = {"requeue": bool, "setup": tuple, "hours": float}
    kinds |= dict.fromkeys(("environment", "sbatch", "srun"), dict)
    kinds |= dict.fromkeys(
        ("memory", "partition", "account", "qos", "constraint", "exclude", "comment"), str
    )
    for field in SlurmConfig.__attrs_attrs__:
        changed = {field.name: values[kinds.get(field.name, int)]}
        assert launcher(**changed).preview(job(Path("/x"))) != plain, field.name


def test_resources_of_a_job_go_before_those_of_the_config(tmp_path: Path) -> None:
    asked = Resources(nodes=3, processes_per_node=5)
    found = flags(launcher(nodes=2, gpus_per_node=8).preview(job(tmp_path), asked))
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == ("3", "5", "8")
    assert launcher(nodes=2, gpus_per_node=8).world_size() == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sbatch": {"mem": "1G"}}, "'mem' is set by the option memory"),
        ({"environment": {"A B": ""}}, "'A B' is no name of a variable"),
        ({"nodes": 0}, "must be above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        SlurmConfig(**options)


# --------------------------------------------------------------------------- submitting
def test_the_script_that_was_shown_is_submitted(calls: Path, tmp_path: Path) -> None:
    ours, mine = launcher(nodes=2, gpus_per_node=4), job(tmp_path)
    handle = ours.submit(mine)
    assert (calls / "script").read_text() == ours.preview(mine)
    assert handle.id == "41"
    assert handle.wait() == 0, "it is in a queue"
    said = handle.describe()
    for words in ("Slurm job 41", "41_0_log.out", "squeue --job 41", "scancel 41"):
        assert words in said
    kept = mine.output_dir / "slurm" / "41_submission.sh"
    assert kept.read_text() == ours.preview(mine)
    assert str(kept) in said
    handle.cancel()
    assert (calls / "scancel").read_text() == "41\n"


def test_a_job_waits_for_others(calls: Path, tmp_path: Path) -> None:
    ours = launcher(sbatch={"dependency": "singleton"})
    first, second = (ours.submit(job(tmp_path / name)) for name in ("a", "b"))
    ours.submit(job(tmp_path / "c"), after=[first, second])
    assert flags((calls / "script").read_text())["dependency"] == "singleton,afterok:41:42"
    ours.submit(job(tmp_path / "d"))
    assert flags((calls / "script").read_text())["dependency"] == "singleton"


def test_a_job_cannot_wait_for_other_launchers(calls: Path, tmp_path: Path) -> None:
    class Elsewhere(JobHandle):
        def wait(self) -> int:
            return 0

    with pytest.raises(UserError, match="can wait for jobs of this launcher alone"):
        launcher().submit(job(tmp_path), after=[Elsewhere()])
    assert not (calls / "sbatch").exists()


def test_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on PATH"):
        launcher().submit(job(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_sbatch_refuses(calls: Path, tmp_path: Path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/bash\necho invalid partition specified >&2\nexit 1\n")
    with pytest.raises(UserError, match="not accepted\n    invalid partition specified"):
        launcher(partition="none").submit(job(tmp_path))


def test_in_a_job_another_can_be_submitted(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    launcher().submit(job(tmp_path))
    assert "SBATCH_ACCOUNT=mine" in (calls / "env").read_text()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    launcher().submit(job(tmp_path))
    assert "SLURM_JOB_ID" not in (calls / "env").read_text(), "it is no step of this one"


# --------------------------------------------------------------------------- in the job
PROCESS = """\
import os, sys
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "GREETING", "SET"]
with open(sys.argv[1], "a") as file:
    print(*(os.environ[name] for name in names), bool(os.environ["MASTER_ADDR"]), file=file)
sys.exit(int(sys.argv[2]) if os.environ["RANK"] == "2" else 0)
"""


def in_a_job(calls: Path, tmp_path: Path, code: int, **options: Any) -> tuple[int, list[str]]:
    """What a script ends with, and what its processes saw, where one of them ends with ``code``."""
    (tmp_path / "process.py").write_text(PROCESS)
    seen = tmp_path / "what they saw"
    command = (sys.executable, str(tmp_path / "process.py"), str(seen), str(code))
    options |= {"environment": {"GREETING": "it's $HOME"}, "setup": ("export SET=up",)}
    launcher(nodes=2, processes_per_node=2, **options).submit(job(tmp_path, *command))
    environment = os.environ | {"SLURM_JOB_ID": "30041"}
    script = [str(calls / "script")]
    done = subprocess.run(["bash", *script], env=environment, check=False)
    return done.returncode, seen.read_text().splitlines()


def test_processes_know_their_place(calls: Path, tmp_path: Path) -> None:
    code, seen = in_a_job(calls, tmp_path, 0, cpus_per_process=3, srun={"gpu-bind": "none"})
    assert code == 0
    assert seen == [f"{rank} 4 {rank % 2} 2 20041 it's $HOME up True" for rank in range(4)]
    assert not (calls / "scontrol").exists()
    assert (calls / "srun").read_text().split() == [
        "--unbuffered",
        "--output",
        "--gpu-bind=none",
        "--cpus-per-task=3",
    ]


def test_a_run_that_saved_its_state_is_requeued(calls: Path, tmp_path: Path) -> None:
    code, _ = in_a_job(calls, tmp_path, ExitCode.REQUEUE)
    assert code == ExitCode.REQUEUE
    assert (calls / "scontrol").read_text() == "requeue 30041\n"


@pytest.mark.parametrize("requeue", [True, False])
@pytest.mark.parametrize("code", [1, 2, 3, 75])
def test_the_job_ends_as_its_processes_do(
    calls: Path, tmp_path: Path, code: int, requeue: bool
) -> None:
    ended, _ = in_a_job(calls, tmp_path, code, requeue=requeue)
    assert ended == code
    assert (calls / "scontrol").exists() is (requeue and code == ExitCode.REQUEUE)


# --------------------------------------------------------------------------- the command line
def test_from_the_command_line(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(Path(__file__).parents[1] / "support" / "tiny.toml")
    arguments = [recipe, "--launcher", "slurm", "launcher.nodes=2"]
    arguments.append('launcher.sbatch={ exclusive = "" }')
    assert main([*arguments, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --exclusive\n" in shown
    assert not (tmp_path / "runs").exists()
    assert main(arguments) == 0
    script = (calls / "script").read_text()
    assert script in shown
    assert "-m dinov3_framework runs/tiny/recipe.toml" in script
    assert (tmp_path / "runs" / "tiny" / "recipe.toml").exists()
    assert "submitted as Slurm job 41" in capsys.readouterr().out
