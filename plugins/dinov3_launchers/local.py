"""The ``local`` launcher: N processes of one machine under torchrun's agent."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dinov3_framework import ExitCode, Job, JobHandle, Launcher, Resources
from dinov3_launchers import LocalConfig

# Exit codes by which a process says that it has explained itself.
_EXPLAINED = {code.value for code in ExitCode} - {ExitCode.OK, ExitCode.FAILED}


class LocalLauncher(Launcher):
    """Runs the job in this process, or in N children that it watches to their end."""

    def __init__(self, config: LocalConfig) -> None:
        self.config = config

    def world_size(self) -> int:
        if self.config.processes is not None:
            return self.config.processes
        return max(torch.cuda.device_count(), 1)

    def preview(self, job: Job, resources: Resources | None = None) -> str:
        count = self.world_size()
        return "this process" if count == 1 else f"{count} processes of this machine (torchrun)"

    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        return _LocalJob(self, job, after)

    def launch(self, job: Job) -> int:
        """Run a job to its end; its exit code."""
        if self.world_size() == 1:
            return job.run()
        # Its warnings repeat in a page what one line of ours says.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        python, *arguments = job.command
        try:
            elastic_launch(self._settings(), entrypoint=python)(*arguments)
        except SignalException as stop:
            interrupted = stop.sigval == signal.SIGINT
            return ExitCode.INTERRUPTED if interrupted else ExitCode.REQUEUE
        except ChildFailedError as failed:
            return _exit_code(failed)
        return ExitCode.OK

    def _settings(self) -> LaunchConfig:
        optional: dict[str, Any] = {"shutdown_timeout": self.config.shutdown_timeout}
        known = inspect.signature(LaunchConfig).parameters  # older torch waits a fixed 30 s
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.world_size(),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            signals_to_handle="SIGTERM,SIGINT,SIGUSR2",
            **{key: value for key, value in optional.items() if key in known},
        )


@frozen
class _LocalJob(JobHandle):
    """A job that runs while somebody waits for it."""

    launcher: LocalLauncher
    job: Job
    after: Sequence[JobHandle]

    def wait(self) -> int:
        for earlier in self.after:
            if code := earlier.wait():
                return code
        return self.launcher.launch(self.job)


def _exit_code(failed: ChildFailedError) -> int:
    """The code of a process that explained itself; else a line that names those that died."""
    for failure in failed.failures.values():
        if failure.exitcode in _EXPLAINED:
            return int(failure.exitcode)
    first_rank, first = failed.get_first_failure()
    reason = (
        f"was killed by {signal.Signals(-first.exitcode).name}"
        if first.exitcode < 0
        else f"ended with exit code {first.exitcode}"
    )
    print(
        f"dinov3-run: rank {first_rank} (pid {first.pid}) {reason}; the run stopped. "
        "The same command goes on from the last checkpoint.",
        file=sys.stderr,
    )
    return ExitCode.FAILED
