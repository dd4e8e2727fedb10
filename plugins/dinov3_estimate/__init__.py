"""What a training step takes, on as many processes as wanted, without taking it: a dry run."""

from __future__ import annotations

from dinov3_framework import Flag, hookimpl


@hookimpl
def dinov3_flags() -> list[Flag]:
    return [
        Flag(
            "rehearse",
            "say what a training step takes (memory, FLOPs, messages, time), on any number of "
            "processes, and write nothing",
            "dinov3_estimate.command:rehearse",
            {
                "world-size": (int, "N", "processes to rehearse (else the launcher's)"),
                "accelerator": (
                    str,
                    "NAME",
                    "what to rehearse for: h100 (default), rtx4090, t4, ...",
                ),
            },
        )
    ]
