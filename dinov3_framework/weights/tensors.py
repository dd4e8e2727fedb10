"""Tensors of modules: shapes, initial values, and values that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dinov3_framework.contracts.layouts import Shape


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of a module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def not_finite(name: str, tensor: Tensor) -> str | None:
    """A line on how many values of a tensor are NaN or infinite; None if there are none."""
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return None
    return f"{name}: {int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} values"


def initial_tensors(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What ``init_weights`` gives to some tensors, on the CPU, at the cost of those alone.

    For values that do not depend on chance: whatever else it would draw stays without memory.
    """
    wanted = set(names)
    if not wanted:
        return {}
    twin = copy.deepcopy(module).to("meta")
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    for name in wanted:
        set_tensor(twin, name, torch.empty_like(tensors[name], device="cpu"))
    with torch.random.fork_rng(devices=[]):
        twin.init_weights()  # type: ignore[operator]
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    return {name: tensors[name].detach() for name in wanted}


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter or buffer."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    if last in owner._parameters:
        setattr(owner, last, nn.Parameter(tensor, requires_grad=False))
    else:
        owner._buffers[last] = tensor
