"""Launchers: where the processes of a run come from."""

from __future__ import annotations

from dinov3_framework import (
    Component,
    InvalidOption,
    LauncherConfig,
    config,
    hookimpl,
    not_negative,
    option,
    positive,
)


@config
class LocalConfig(LauncherConfig):
    """Processes on this machine, by torchrun's agent; one process runs without it."""

    processes: int | None = option(
        "how many; left out, one per visible GPU, or one without any", default=None, check=positive
    )
    shutdown_timeout: int = option(
        "seconds that processes get to save when the run is asked to stop",
        default=300,
        check=positive,
    )


@config
class SlurmConfig(LauncherConfig):
    """A Slurm job, submitted by sbatch, that is requeued until the run is complete.

    What is left out is as the cluster has it.
    """

    nodes: int = option("nodes of the job", default=1, check=positive)
    gpus_per_node: int | None = option("GPUs of each node", default=None, check=not_negative)
    processes_per_node: int | None = option(
        "processes on each node; left out, one per GPU, or one without any",
        default=None,
        check=positive,
    )
    cpus_per_process: int | None = option("CPUs of each process", default=None, check=positive)
    memory: str | None = option('memory of each node, such as "64G"', default=None)
    hours: float | None = option("time limit of one start", default=None, check=positive)
    partition: str | None = option("partition", default=None)
    account: str | None = option("account that is charged", default=None)
    qos: str | None = option("quality of service", default=None)
    constraint: str | None = option("features that nodes must have", default=None)
    exclude: str | None = option("nodes to stay away from", default=None)
    nice: int | None = option("adjustment of the priority", default=None)
    comment: str | None = option("comment of the job", default=None)
    shutdown_timeout: int = option(
        "seconds before the time limit at which the run is asked to save",
        default=300,
        check=positive,
    )
    requeue: bool = option(
        "whether a job that saved its state when it was asked to stop goes on by itself",
        default=True,
    )
    environment: dict[str, str] = option("environment variables of the processes", factory=dict)
    setup: tuple[str, ...] = option(
        "shell commands on the first node, before the processes start", default=()
    )
    sbatch: dict[str, str] = option(
        'further options of sbatch, such as { reservation = "name", exclusive = "" }', factory=dict
    )
    srun: dict[str, str] = option("further options of srun", factory=dict)

    def __attrs_post_init__(self) -> None:
        for name in self.environment:
            if not name.isidentifier():
                raise InvalidOption("environment", f"{name!r} is no name of a variable")
        for name in self.sbatch:
            if name in SBATCH:
                raise InvalidOption("sbatch", f"{name!r} is set by the option {SBATCH[name]}")


# Options of sbatch that have one here, and which.
SBATCH = {
    "nodes": "nodes",
    "ntasks": "processes_per_node",
    "ntasks-per-node": "processes_per_node",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_process",
    "mem": "memory",
    "time": "hours",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "nice": "nice",
    "comment": "comment",
    "signal": "shutdown_timeout",
    "requeue": "requeue",
    "no-requeue": "requeue",
}


@hookimpl
def dinov3_launchers() -> list[Component]:
    return [
        Component("local", LocalConfig, "dinov3_launchers.local:LocalLauncher"),
        Component("slurm", SlurmConfig, "dinov3_launchers.slurm:SlurmLauncher"),
    ]
