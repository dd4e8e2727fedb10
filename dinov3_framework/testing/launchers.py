"""Promises of a launcher."""

from __future__ import annotations

import os
import sys
from functools import cached_property
from pathlib import Path

from dinov3_framework.contracts.running import Job, JobHandle, Launcher, Resources
from dinov3_framework.errors import ExitCode
from dinov3_framework.testing.suite import Suite

# One process of a job: leaves a file named by its rank, and ends with the code that it is given.
_PROCESS = """\
import os, pathlib, sys
rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
pathlib.Path(sys.argv[1], rank).write_text(world)
sys.exit(int(sys.argv[2]))
"""


class LauncherSuite(Suite):
    """Promises of a launcher, by jobs that take no time.

    With ``launch = False`` none is submitted: for launchers that hand jobs over to a cluster.
    """

    kind = "launcher"
    contract = Launcher
    launch: bool = True

    @cached_property
    def launcher(self) -> Launcher:
        launcher: Launcher = self.build()
        return launcher

    def job(self, folder: Path, code: ExitCode = ExitCode.OK) -> Job:
        """A job whose processes leave their ranks in ``folder``."""
        folder.mkdir(parents=True)
        script = folder.with_suffix(".py")
        script.write_text(_PROCESS, "utf-8")

        def run() -> int:
            (folder / os.environ.get("RANK", "0")).write_text(os.environ.get("WORLD_SIZE", "1"))
            return int(code)

        command = (sys.executable, str(script), str(folder), str(int(code)))
        return Job(command=command, output_dir=folder, run=run, name=folder.name)

    def submit(self, job: Job, *after: JobHandle) -> JobHandle:
        handle = self.launcher.submit(job, after=after)
        assert isinstance(handle, JobHandle), f"submit() must give a JobHandle, gave {handle!r}"
        texts = (handle.describe(), handle.id)
        assert all(isinstance(text, str) for text in texts), "describe() and id must be text"
        return handle

    # ------------------------------------------------------------------ promises
    def test_world_size(self) -> None:
        """There is a process at least."""
        world = self.launcher.world_size()
        is_count = type(world) is int and world >= 1
        assert is_count, f"world_size() must be at least 1, is {world!r}"

    def test_preview(self, tmp_path: Path) -> None:
        """``preview`` says what would be started, and starts nothing."""
        job = self.job(tmp_path / "job")
        text, again = self.launcher.preview(job), self.launcher.preview(job, Resources())
        assert isinstance(text, str) and text.strip(), f"preview() gives no text, but {text!r}"
        assert text == again, "preview() says something else where no resources are asked for"
        assert not any(job.output_dir.iterdir()), "preview() starts the job"

    def test_processes(self, tmp_path: Path) -> None:
        """A job becomes processes of the ranks 0 .. world_size - 1, which know the world size."""
        if self.launch:
            code, world = self.submit(self.job(tmp_path / "job")).wait(), self.launcher.world_size()
            ranks = {path.name: path.read_text() for path in (tmp_path / "job").iterdir()}
            wanted = {str(rank): str(world) for rank in range(world)}
            assert ranks == wanted, f"ran as rank: world size {ranks}, not {wanted}"
            assert code == 0, f"wait() gave {code} where the processes ended with 0"

    def test_exit_code(self, tmp_path: Path) -> None:
        """The exit code is the one by which processes explained themselves."""
        if self.launch:
            wanted = ExitCode.WRONG_INPUT
            code = self.submit(self.job(tmp_path / "job", wanted)).wait()
            assert code == wanted, f"wait() gave {code} where the processes ended with {wanted}"

    def test_after(self, tmp_path: Path) -> None:
        """A job begins when those that it waits for ended well, and not where one did not."""
        for code in (ExitCode.OK, ExitCode.WRONG_INPUT) if self.launch else ():
            folder = tmp_path / code.name
            first = self.submit(self.job(folder / "first", code))
            ended = self.submit(self.job(folder / "second"), first).wait()
            ran = [name for name in ("first", "second") if any((folder / name).iterdir())]
            wanted = ["first", "second"] if code == 0 else ["first"]
            assert ran == wanted and (ended == 0) is (code == 0), (
                f"of a job that ended with {code} and one after it ran {ran}, with code {ended}"
            )
