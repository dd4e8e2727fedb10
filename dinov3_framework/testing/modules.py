"""Promises of everything that has weights: backbones, projectors, heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Head
from dinov3_framework.kinds import HeadConfig
from dinov3_framework.parallel.sharder import initial_values, tensors_of
from dinov3_framework.registry import Registry
from dinov3_framework.testing.subject import Subject, some

M = TypeVar("M", bound=nn.Module)


@frozen
class Twins:
    """Two networks of one blueprint with the same weights, as student and teacher begin."""

    first: Any
    second: Any  # initialised otherwise, then loaded from the first's state dict


def check_head(
    config: HeadConfig,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    embed_dim: int = 32,
) -> None:
    """Check an evaluation head's weights; ``embed_dim`` is the backbone's width.

    Promises: it is built on the meta device, ``init_weights`` gives every parameter and buffer a
    finite value that depends on torch's seed alone, state dicts load strictly.
    """
    check_weights(Subject.of("head", config, registry, factory, embed_dim=embed_dim), Head)


def check_weights(subject: Subject, base: type) -> Twins:
    """Check how a network gets its weights, and return two that share theirs."""
    with torch.device("meta"):
        blueprint = subject.built(base)
    real = [name for name, tensor in tensors_of(blueprint) if not tensor.is_meta]
    subject.require(
        not real, f"built on the meta device, it takes memory all the same: {some(real)}"
    )
    with subject.doing("init_weights()"):
        first, again = initial_values(blueprint, seed=1), initial_values(blueprint, seed=1)
        second = initial_values(blueprint, seed=2)
    moved = [name for name, tensor in tensors_of(first) if not _equal(tensor, again, name)]
    subject.require(
        not moved,
        f"init_weights() gives other values for the same seed of torch's generator: {some(moved)}",
    )
    with subject.doing("load_state_dict(strict=True) of its own state dict"):
        second.load_state_dict(first.state_dict(), strict=True)
    _check_built_for_real(subject, base, first)
    return Twins(first, second)


def _equal(tensor: Tensor, module: nn.Module, name: str) -> bool:
    return torch.equal(tensor, dict(tensors_of(module))[name])


def _check_built_for_real(subject: Subject, base: type, network: nn.Module) -> None:
    """Away from the meta device, the same names and shapes must come about."""
    with torch.random.fork_rng(devices=[]):
        other = subject.built(base)
    shapes, others = (
        {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        for module in (network, other)
    )
    differing = [name for name in shapes | others if shapes.get(name) != others.get(name)]
    subject.require(
        not differing,
        f"two builds of one config differ in names or shapes of tensors: {some(differing)}",
    )


def in_bfloat16(network: M) -> M:
    """A copy as sharding computes with it: parameters in bfloat16, buffers as they are."""
    low = copy.deepcopy(network)
    for parameter in low.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    return low
