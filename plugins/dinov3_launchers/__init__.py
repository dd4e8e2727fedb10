"""Launchers: where the processes of a run come from."""

from __future__ import annotations

from dinov3_framework import Component, LauncherConfig, config, hookimpl, option, positive


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


@hookimpl
def dinov3_launchers() -> list[Component]:
    return [Component("local", LocalConfig, "dinov3_launchers.local:LocalLauncher")]
