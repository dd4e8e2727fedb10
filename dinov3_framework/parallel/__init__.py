"""Networks on many processes: sharding, precision, compiling, activation checkpointing."""

from __future__ import annotations

import re
from typing import Literal

from dinov3_framework.configs import config, option, positive, seconds


def _expression(value: str) -> str | None:
    try:
        re.compile(value)
    except re.error as error:
        return f"is no regular expression ({error}): {value!r}"
    return None


@config
class ParallelConfig:
    """Devices, precision, sharding, and what is traded between memory and speed."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "where to compute; auto takes CUDA where there is one", default="auto"
    )
    param_dtype: Literal["fp32", "bf16"] = option(
        "type that parameters are gathered in for forward and backward", default="fp32"
    )
    reduce_dtype: Literal["fp32", "bf16"] = option(
        "type that gradients are reduced in", default="fp32"
    )
    replicas: int = option(
        "groups of processes that each hold all of a network, whose parameters are spread over "
        "the processes of a group",
        default=1,
        check=positive,
    )
    checkpointing: Literal["none", "selective", "full"] = option(
        "what the backward pass computes anew of each block of the backbone, to save memory: "
        "nothing, all but matrix products, convolutions and attention, or everything",
        default="none",
    )
    compile: bool = option("compile each block of the backbone (torch.compile)", default=False)
    fp8: Literal["off", "on", "emulated"] = option(
        "multiply in float8 in linear layers of the backbone; emulated gives the same rounding "
        "on any device, slowly",
        default="off",
    )
    fp8_filter: str = option(
        "regular expression that is found in the names, within the backbone, of the linear "
        "layers that fp8 concerns",
        default="blocks",
        check=_expression,
    )
    timeout: float = option(
        "seconds after which a collective that somebody missed ends the run",
        default=600.0,
        check=seconds,
    )
