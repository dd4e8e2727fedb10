"""Checkpoints of a run: written whole or not at all, verified, read without running anything."""

from __future__ import annotations

from dinov3_framework.configs import config, option, positive
from dinov3_framework.schedules import Span


@config
class CheckpointConfig:
    """What is kept of a run while it goes on."""

    every: Span = option("iterations between checkpoints", default=1000, check=positive)
    keep: int = option("how many of the newest to keep", default=3, check=positive)
    keep_every: int | None = option(
        "iterations between those that are kept for good", default=None, check=positive
    )
