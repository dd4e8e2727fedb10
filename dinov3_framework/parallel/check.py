"""What a check finds in ``[parallel]``, and what it says of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dinov3_framework.contracts.networks import Shardable
from dinov3_framework.errors import Problem
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.compiling import compiler_complaint
from dinov3_framework.parallel.fp8 import CAPABILITY, chip_complaint
from dinov3_framework.parallel.fp8_linears import chosen, layer_problems


def parallel_problems(config: ParallelConfig, processes: int) -> Iterator[Problem]:
    """What is wrong whatever the backbone and the machine; ``processes`` share a network."""
    if processes % config.replicas:
        near = [n for n in range(1, processes + 1) if processes % n == 0]
        yield Problem(
            "parallel.replicas",
            f"{processes} process{'es' if processes > 1 else ''} cannot be split into "
            f"{config.replicas} replicas",
            f"take {', '.join(map(str, near))}, or a multiple of {config.replicas} processes",
        )
    if config.fp8 == "on" and config.param_dtype != "bf16":
        yield Problem(
            "parallel.fp8",
            f'float8 products come out in bf16, but parallel.param_dtype is "{config.param_dtype}"',
            'set param_dtype = "bf16", or take fp8 = "emulated" to see the rounding alone',
        )


def machine_problems(config: ParallelConfig, device: torch.device) -> Iterator[Problem]:
    """What this machine cannot do with ``device``."""
    if config.compile and (complaint := compiler_complaint(device)):
        yield Problem("parallel.compile", complaint, "install one, or set compile = false")
    if config.fp8 == "on" and (complaint := chip_complaint(device)):
        wanted = ".".join(map(str, CAPABILITY))
        yield Problem(
            "parallel.fp8",
            complaint,
            f'it takes a CUDA device of capability {wanted} or more; set fp8 = "off", or '
            '"emulated" to see the rounding (slow)',
        )


def network_problems(config: ParallelConfig, network: Shardable) -> Iterator[Problem]:
    """What this network, which may be on the meta device, does not offer."""
    if not list(network.blocks_to_shard()):
        name = type(network).__name__
        for key, on in (
            ("checkpointing", config.checkpointing != "none"),
            ("compile", config.compile),
        ):
            if on:
                yield Problem(
                    f"parallel.{key}",
                    f"goes by blocks, and a {name} names none (blocks_to_shard)",
                    "leave it out, or take another one",
                )
    if config.fp8 != "off":
        yield from layer_problems(config, network)


def parallel_rows(
    config: ParallelConfig, network: Shardable, processes: int
) -> list[tuple[str, str]]:
    """The section of a check's report."""
    blocks = len(list(network.blocks_to_shard()))
    row = processes // config.replicas
    mesh = "1, networks whole" if processes == 1 else f"{processes}, networks spread over them"
    if config.replicas > 1:
        mesh = f"{config.replicas} replicas x {row}, networks spread over each {row}"
    fp8: str = config.fp8
    if fp8 != "off":
        layers = len(chosen(config, network))
        fp8 = f"{fp8}, {layers} linear layers with {config.fp8_filter!r} in their names"
    return [
        ("processes", mesh),
        ("precision", f"{config.param_dtype}, gradients reduced in {config.reduce_dtype}"),
        ("checkpointing", _of_blocks(config.checkpointing, config.checkpointing != "none", blocks)),
        ("compile", _of_blocks("yes" if config.compile else "no", config.compile, blocks)),
        ("fp8", fp8),
    ]


def _of_blocks(value: str, on: bool, blocks: int) -> str:
    return f"{value}, {blocks} blocks" if on else value
