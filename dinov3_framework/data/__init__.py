"""Samples on their way to a network: decoding, sampling, loading, looking at whole datasets."""

from __future__ import annotations

from dinov3_framework.configs import config, not_negative, option, positive, seconds


@config
class LoaderConfig:
    """How batches are made."""

    workers: int = option("loader processes per training process", default=8, check=not_negative)
    prefetch: int = option("batches that each worker makes ahead", default=2, check=positive)
    timeout: float = option(
        "seconds to wait for a batch before the run ends", default=300.0, check=seconds
    )
    max_corrupt: int = option(
        "undecodable samples, each counted once in each process, after which the run ends",
        default=1000,
        check=not_negative,
    )
