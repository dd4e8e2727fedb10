"""The ``local`` launcher: N processes of one machine under torchrun's agent."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, field
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dinov3_framework import ExitCode, Job, JobHandle, Launcher, Resources, UserError
from dinov3_framework.runtime.stopping import LAUNCHER
from dinov3_launchers import LocalConfig

# Exit codes by which a process says that it has explained itself.
_STOPPED = {ExitCode.REQUEUE.value, ExitCode.INTERRUPTED.value}
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
        count = self._count(resources)
        return "this process" if count == 1 else f"{count} processes of this machine (torchrun)"

    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        if queued := [handle.id for handle in after if handle.id]:
            raise UserError(f"launcher local: cannot wait for {queued[0]}, a job in a queue")
        return LocalJob(job, self._count(resources), self.config.shutdown_timeout, tuple(after))

    def _count(self, resources: Resources | None) -> int:
        if resources is None:
            return self.world_size()
        if resources.nodes not in (None, 1):
            raise UserError(f"launcher local: {resources.nodes} nodes are asked for, this is one")
        return resources.processes_per_node or self.world_size()


@define(eq=False)
class LocalJob(JobHandle):
    """A job that runs when it is first waited for, after those that it waits for itself."""

    job: Job
    processes: int
    shutdown_timeout: int
    after: tuple[JobHandle, ...]
    _code: int | None = field(default=None, init=False)

    def wait(self) -> int:
        if self._code is None:
            failed = (code for earlier in self.after if (code := earlier.wait()))
            self._code = next(failed, None) or self._run()
        return self._code

    def _run(self) -> int:
        if self.processes == 1:
            return self.job.run()
        # Its warnings repeat in a page what one line of ours says.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        python, *arguments = self.job.command
        os.environ[LAUNCHER] = str(os.getpid())  # its processes end with this one
        try:
            elastic_launch(self._settings(), entrypoint=python)(*arguments)
        except SignalException as stop:
            interrupted = stop.sigval == signal.SIGINT
            return ExitCode.INTERRUPTED if interrupted else ExitCode.REQUEUE
        except ChildFailedError as failed:
            return _exit_code(failed)
        finally:
            del os.environ[LAUNCHER]
        return ExitCode.OK

    def _settings(self) -> LaunchConfig:
        signals = ["SIGTERM", "SIGINT", "SIGUSR2"]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signals.append("SIGHUP")
        optional: dict[str, Any] = {"shutdown_timeout": self.shutdown_timeout}
        known = inspect.signature(LaunchConfig).parameters  # older torch waits a fixed 30 s
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            signals_to_handle=",".join(signals),
            **{key: value for key, value in optional.items() if key in known},
        )


def _exit_code(failed: ChildFailedError) -> int:
    """The code of a process that explained itself; else a line that names those that died."""
    failures = failed.failures
    # Where one fails, the others are stopped for that reason.
    own = {rank: each for rank, each in failures.items() if each.exitcode not in _STOPPED}
    for failure in (own or failures).values():
        if failure.exitcode in _EXPLAINED:
            return int(failure.exitcode)
    first_rank, first = min(own.items(), key=lambda each: each[1].timestamp)
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
