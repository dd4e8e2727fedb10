"""Promises of a launcher."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov3_framework.contracts.running import Job, Launcher
from dinov3_framework.errors import ExitCode
from dinov3_framework.kinds import LauncherConfig
from dinov3_framework.registry import Registry
from dinov3_framework.testing.subject import Subject

# One process of a job: leaves a file named by its rank, and ends as it is told.
_PROCESS = """\
import os, pathlib, sys
rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
pathlib.Path(sys.argv[1], rank).write_text(world)
sys.exit(int(sys.argv[2]))
"""


def check_launcher(
    config: LauncherConfig,
    output_dir: Path,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    launch: bool = True,
) -> None:
    """Check a launcher by jobs that take no time; ``output_dir`` is an empty folder for them.

    Promises: ``describe()`` is one line, ``world_size()`` at least 1; a job becomes processes of
    the ranks 0 .. world_size - 1, each once, which know the world size from their environment;
    the exit code says that all went well, or is the one by which processes explained themselves.
    ``launch = False`` leaves the last two out, for launchers that hand the job to a cluster.
    """
    subject = Subject.of("launcher", config, registry, factory)
    launcher: Launcher = subject.built(Launcher)
    job = Job(command=("true",), output_dir=output_dir, run=lambda: 0)
    with subject.doing("preview()"):
        subject.require(bool(launcher.preview(job).strip()), "preview() gives no text")
    with subject.doing("world_size()"):
        world = launcher.world_size()
    subject.require(
        type(world) is int and world >= 1, f"world_size() must be at least 1, is {world!r}"
    )
    if launch:
        for code in (ExitCode.OK, ExitCode.WRONG_INPUT):
            _check_launch(subject, launcher, world, output_dir / f"code_{int(code)}", code)


def _check_launch(
    subject: Subject, launcher: Launcher, world: int, folder: Path, code: ExitCode
) -> None:
    folder.mkdir(parents=True)
    script = folder.with_suffix(".py")
    script.write_text(_PROCESS, "utf-8")

    def run() -> int:
        (folder / os.environ.get("RANK", "0")).write_text(os.environ.get("WORLD_SIZE", "1"))
        return int(code)

    command = (sys.executable, str(script), str(folder), str(int(code)))
    with subject.doing("launch()"), contextlib.redirect_stderr(io.StringIO()):
        given = launcher.submit(Job(command=command, output_dir=folder, run=run)).wait()
    ranks = {path.name: path.read_text() for path in folder.iterdir()}
    wanted = {str(rank): str(world) for rank in range(world)}
    if code == ExitCode.OK:  # where processes fail, some may be stopped before they begin
        subject.require(
            ranks == wanted,
            f"a job for world_size() = {world} ran as rank: world size {ranks}, not {wanted}",
        )
    subject.require(
        int(given) == int(code),
        f"launch() gave exit code {int(given)} where the processes ended with {int(code)}",
    )
