"""The ``slurm`` launcher: a batch script in which srun starts one process for each GPU."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from attrs import frozen

from dinov3_framework import ExitCode, Job, JobHandle, Launcher, Resources, UserError
from dinov3_launchers import SlurmConfig

if TYPE_CHECKING:
    import submitit

# A process finds its place in torchrun's variables.
_PROCESS = (
    "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
    'LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE; exec "$@"'
)
# Of the first node, on which the script runs, and rank 0.
_MASTER = (
    'export MASTER_ADDR="$(hostname)"',
    "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
)
_REQUEUE = (
    f'if [ "$code" -eq {int(ExitCode.REQUEUE)} ]; then',
    '    scontrol requeue "$SLURM_JOB_ID"',
    "fi",
)


class SlurmLauncher(Launcher):
    """Hands the job over to a Slurm cluster."""

    elsewhere = True

    def __init__(self, config: SlurmConfig) -> None:
        self.config = config

    def world_size(self) -> int:
        return self.config.nodes * self._processes_per_node()

    def _processes_per_node(self) -> int:
        return self.config.processes_per_node or self.config.gpus_per_node or 1

    def preview(self, job: Job, resources: Resources | None = None) -> str:
        text: str = self._executor(job, resources)._make_submission_file_text(_command(job), "")
        return text

    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        import submitit

        if shutil.which("sbatch") is None:
            raise UserError(
                "launcher slurm: there is no sbatch on PATH; start this where jobs are submitted, "
                "such as a login node of the cluster"
            )
        executor = self._executor(job, resources, after)
        executor.folder.mkdir(parents=True, exist_ok=True)
        try:
            with _outside_of_a_job():
                submitted = executor._submit_command(_command(job))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as e:
            raise UserError(f"launcher slurm: the job was not accepted\n    {e}") from e
        return SlurmJob(submitted.job_id, submitted)

    def _executor(
        self, job: Job, resources: Resources | None, after: Sequence[JobHandle] = ()
    ) -> submitit.SlurmExecutor:
        """submitit's executor with every option of the config."""
        import submitit

        class SlurmExecutor(submitit.SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 1  # a script can be shown where there is no Slurm

        config, asked = self.config, resources or Resources()
        flags = {
            "nodes": asked.nodes or config.nodes,
            "ntasks-per-node": asked.processes_per_node or self._processes_per_node(),
            "gpus-per-node": config.gpus_per_node or None,
            "cpus-per-task": config.cpus_per_process,
            "mem": config.memory,
            "time": None if config.hours is None else math.ceil(config.hours * 60),
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "constraint": config.constraint,
            "exclude": config.exclude,
            "nice": config.nice,
            "comment": config.comment,
            "signal": f"USR2@{config.shutdown_timeout}",
            "requeue": config.requeue or None,
            "no-requeue": not config.requeue or None,
            "dependency": _dependency(config.sbatch.get("dependency"), after),
        }
        others = {name: value or True for name, value in config.sbatch.items()}
        srun = dict(config.srun)
        if config.cpus_per_process is not None:  # srun takes over all but this one
            srun.setdefault("cpus-per-task", str(config.cpus_per_process))
        exports = [
            f"export {name}={shlex.quote(text)}" for name, text in config.environment.items()
        ]
        executor = SlurmExecutor(job.output_dir / "slurm")
        executor.parameters = {
            "job_name": job.name,
            "time": None,  # submitit has defaults of its own
            "wckey": None,
            "stderr_to_stdout": True,
            "setup": [*_MASTER, *exports, *config.setup, "code=0"],
            "srun_args": [
                f"--{name}={text}" if text else f"--{name}" for name, text in srun.items()
            ],
            "teardown": [*(_REQUEUE if config.requeue else ()), 'exit "$code"'],
            "additional_parameters": others
            | {name: value for name, value in flags.items() if value is not None},
        }
        return executor


def _command(job: Job) -> str:
    """What srun starts in each process."""
    return f"{shlex.join(['bash', '-c', _PROCESS, job.name, *job.command])} || code=$?"


def _dependency(given: str | None, after: Sequence[JobHandle]) -> str | None:
    if others := [handle for handle in after if not isinstance(handle, SlurmJob)]:
        raise UserError(
            f"launcher slurm: a job can wait for jobs of this launcher alone, not for {others[0]!r}"
        )
    ids = ["afterok:" + ":".join(handle.id for handle in after)] if after else []
    return ",".join([*([given] if given else []), *ids]) or None


def _outside_of_a_job() -> AbstractContextManager[Any]:
    """Hide what Slurm tells a process of the job that it is in itself, if it is in one."""
    import submitit

    return submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()


@frozen
class SlurmJob(JobHandle):
    """A job in Slurm's queue."""

    id: str
    submitted: submitit.SlurmJob[Any]

    def wait(self) -> int:
        return ExitCode.OK

    def describe(self) -> str:
        paths = self.submitted.paths
        return (
            f"submitted as Slurm job {self.id}\n"
            f"  script  {paths.submission_file}\n"
            f"  logs    {paths.stdout}, and one for each further rank\n"
            f"  watch   squeue --job {self.id}; tail -F {shlex.quote(str(paths.stdout))}\n"
            f"  cancel  scancel {self.id}"
        )

    def cancel(self) -> None:
        self.submitted.cancel(check=False)
